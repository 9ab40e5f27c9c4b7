"""The output head a chunk of positions at a time: logits, their top-K, and a teacher's answer made of both.

Shapes: N positions, H hidden size, V vocabulary, k kept logits; C positions of one chunk.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from rayfuse.errors import LossError

CHUNK_BYTES = 64 * 2**20
BLOCK = 64


@dataclass(frozen=True)
class Head:
    """How a model turns hidden states into logits: softcap * tanh(scale * (hidden @ weight.T + bias) / softcap).

    `scale` is Cohere's logit_scale or the inverse of Granite's logits_scaling; `softcap` is Gemma 2's
    final_logit_softcapping (None: no tanh). Rows of the weight from `valid_vocab` on are padding: they take no part in
    the softmax, the top-K or the gradient.
    """

    scale: float = 1.0
    softcap: float | None = None
    valid_vocab: int | None = None


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
    logits, `chunk * V * 4` bytes (one and a half times that in bfloat16), at most 64 MiB for the float32 part.

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
        for rows in chunks(len(hidden), len(weight_VH), chunk):
            logits_CV = chunk_logits(hidden[rows], weight_VH, bias_V, head)
            values_Ck, ids[rows] = block_topk(logits_CV, k)
            next_C, ignored_C = label_logits(logits_CV, next_ids[rows], ignore_index)
            lse[rows] = exp_in_place(logits_CV, values_Ck[:, :1])[0]
            logps[rows] = values_Ck - lse[rows, None]
            next_logps[rows] = (next_C - lse[rows]).masked_fill(ignored_C, 0.0)
    return TeacherTopK(logps, ids, lse, next_logps)


def check_inputs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    k: int,
    bias: torch.Tensor | None,
    head: Head,
    ignore_index: int,
) -> None:
    """Raise LossError unless the head's inputs fit each other; says which do not. One device synchronisation."""
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise LossError(
            f"the head multiplies hidden [N, H] with weight [V, H], got {tuple(hidden.shape)} and "
            f"{tuple(weight.shape)}: select the positions to score and flatten them first"
        )
    if labels.shape != hidden.shape[:1] or labels.is_floating_point():
        raise LossError(f"labels must be [{len(hidden)}] token ids, got {tuple(labels.shape)} of {labels.dtype}")
    if hidden.dtype != weight.dtype or not hidden.is_floating_point():
        raise LossError(f"hidden is {hidden.dtype} and weight {weight.dtype}: cast hidden to the weight's dtype")
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != weight.dtype):
        raise LossError(f"bias is {tuple(bias.shape)} of {bias.dtype}, the weight has {len(weight)} rows")
    vocab = len(weight) if head.valid_vocab is None else head.valid_vocab
    if not 1 <= vocab <= len(weight):
        raise LossError(f"valid_vocab is {vocab}, it must be between 1 and the weight's {len(weight)} rows")
    if not 1 <= k <= vocab:
        raise LossError(f"k is {k}, it must be between 1 and the vocabulary's {vocab} entries")
    if head.softcap is not None and head.softcap <= 0:
        raise LossError(f"softcap is {head.softcap}, it must be positive, or None for a head without one")
    wrong = ((labels < 0) | (labels >= vocab)) & (labels != ignore_index)
    if wrong.any():
        raise LossError(
            f"labels {labels[wrong][:8].tolist()} at positions {wrong.nonzero()[:8, 0].tolist()} are outside the "
            f"vocabulary of {vocab}: were these ids made by another model's tokenizer?"
        )


def valid_rows(weight: torch.Tensor, bias: torch.Tensor | None, head: Head) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The part of the head that belongs to real tokens, as views."""
    if head.valid_vocab is None:
        return weight, bias
    return weight[: head.valid_vocab], None if bias is None else bias[: head.valid_vocab]


def chunk_size(vocab: int) -> int:
    """Positions per chunk: 64 MiB / (4 bytes * V), at least one. V = 100,352 gives 167, V = 262,144 gives 64."""
    return max(1, CHUNK_BYTES // (4 * vocab))


def chunks(positions: int, vocab: int, size: int | None) -> Iterator[slice]:
    """Slices of at most `size` (default chunk_size) positions, as equal in length as they can be."""
    size = chunk_size(vocab) if size is None else size
    if size < 1:
        raise LossError(f"chunk is {size} positions, it must be at least 1")
    count = -(-positions // size)
    for i in range(count):
        yield slice(i * positions // count, (i + 1) * positions // count)


def chunk_logits(
    hidden_CH: torch.Tensor, weight_VH: torch.Tensor, bias_V: torch.Tensor | None, head: Head
) -> torch.Tensor:
    """[C, V] logits in float32 (float64 for float64 input), rounded to the weight's dtype by the product itself."""
    logits_CV = hidden_CH @ weight_VH.T
    logits_CV = logits_CV.to(torch.promote_types(logits_CV.dtype, torch.float32))
    if bias_V is not None:
        logits_CV += bias_V
    if head.scale != 1.0:
        logits_CV *= head.scale
    if head.softcap is not None:
        logits_CV.div_(head.softcap).tanh_().mul_(head.softcap)
    return logits_CV


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


def label_logits(
    logits_CV: torch.Tensor, labels_C: torch.Tensor, ignore_index: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each label's logit [C] (that of token 0 where ignored), and the mask [C] of ignored positions."""
    ignored_C = labels_C == ignore_index
    return logits_CV.gather(1, labels_C.masked_fill(ignored_C, 0)[:, None])[:, 0], ignored_C


def exp_in_place(logits_CV: torch.Tensor, max_C1: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Overwrite the logits with exp(logits - max); log-sum-exp [C] and the sums [C, 1]."""
    sums_C1 = logits_CV.sub_(max_C1).exp_().sum(dim=-1, keepdim=True)
    return (sums_C1.log() + max_C1)[:, 0], sums_C1
