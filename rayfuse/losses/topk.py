"""The k largest logits of each position, and a teacher's answer made of them.

Shapes: N positions, H hidden size, V vocabulary, k kept logits; C positions of one chunk.
"""

from typing import NamedTuple

import torch

from rayfuse.losses.head import Head, check_inputs, chunk_logits, chunks, exp_in_place, label_logits, valid_rows

BLOCK = 64


class TeacherTopK(NamedTuple):
    """What a teacher says at N positions, all in float32 without gradient."""

    logps: torch.Tensor  # [N, k] log-probabilities, sorted descending
    ids: torch.Tensor  # [N, k] int64
    lse: torch.Tensor  # [N] log-sum-exp: logps + lse are the logits
    next_logps: torch.Tensor  # [N] log-probability of the actual next token, 0 where it is ignored


def teacher_topk(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    next_ids: torch.Tensor,
    k: int,
    *,
    bias: torch.Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    valid_vocab: int | None = None,
    ignore_index: int = -100,
    chunk: int | None = None,
) -> TeacherTopK:
    """Score N positions with a head: top-K log-probabilities, log-sum-exp and the next token's log-probability.

    hidden: [N, H]; weight: [V, H]; next_ids: [N], `ignore_index` where there is no next token. The twin of fused_head
    without gradients: same chunks, same bits. Time O(N V H); memory beyond the inputs and the answer is one chunk's
    logits, `chunk * V * 4` bytes (one and a half times that in bfloat16), the float32 part at most 64 MiB
    (on CUDA 256).

    Raises LossError on shapes or dtypes that do not fit, ids outside the vocabulary, k < 1 or k > V.
    """
    head = Head(scale, softcap, valid_vocab)
    check_inputs(hidden, weight, next_ids, k, bias, head, ignore_index)
    weight_VH, bias_V = valid_rows(weight, bias, head)
    accurate = torch.promote_types(hidden.dtype, torch.float32)
    logps = hidden.new_empty((len(hidden), k), dtype=accurate)
    ids = next_ids.new_empty((len(hidden), k), dtype=torch.int64)
    lse = hidden.new_empty(len(hidden), dtype=accurate)
    next_logps = hidden.new_empty(len(hidden), dtype=accurate)
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        for rows in chunks(hidden, len(weight_VH), chunk):
            logits_CV = chunk_logits(hidden[rows], weight_VH, bias_V, head)
            values_Ck, ids[rows] = block_topk(logits_CV, k)
            next_C, ignored_C = label_logits(logits_CV, next_ids[rows], ignore_index)
            lse[rows] = exp_in_place(logits_CV, values_Ck[:, :1])[0]
            logps[rows] = values_Ck - lse[rows, None]
            next_logps[rows] = (next_C - lse[rows]).masked_fill(ignored_C, 0.0)
    return TeacherTopK(logps, ids, lse, next_logps)


def block_topk(logits_CV: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Values [C, k] sorted descending and ids [C, k], equal in value to torch.topk, in one pass over the logits.

    The k largest values lie in the k blocks of 64 whose maxima are largest, or in the remainder that fills no block:
    torch.topk then sees 64 k + 63 candidates instead of V. Falls back to torch.topk where that saves nothing.
    """
    C, V = logits_CV.shape
    blocks = V // BLOCK
    if blocks <= 2 * k:
        values, ids = logits_CV.topk(k, dim=-1)
        return values, ids
    whole_CBb = logits_CV[:, : blocks * BLOCK].unflatten(1, (blocks, BLOCK))
    best_Ck = whole_CBb.amax(dim=-1).topk(k, dim=-1).indices
    kept_CkB = whole_CBb.gather(1, best_Ck[..., None].expand(C, k, BLOCK))
    offsets_B = torch.arange(BLOCK, device=logits_CV.device)
    rest = torch.arange(blocks * BLOCK, V, device=logits_CV.device).expand(C, -1)
    ids = torch.cat(((best_Ck[..., None] * BLOCK + offsets_B).flatten(1), rest), dim=1)
    values, picked = torch.cat((kept_CkB.flatten(1), logits_CV[:, blocks * BLOCK :]), dim=1).topk(k, dim=-1)
    return values, ids.gather(1, picked)
