"""Cross-entropy and the top-K logits of a student from its hidden states, without ever holding [N, V] logits.

Shapes: N positions, H hidden size, V vocabulary, k kept logits; C positions of one chunk.

Cross-entropy's gradient to hidden states and weight is taken inside each chunk, while its logits are there (as Liger's
fused linear cross-entropy, arXiv 2410.10989). The gradient of the k kept logits is a product with k gathered rows of
the weight, taken in backward. So a loss on the top-K costs N k H on top of the N V H that fine-tuning costs anyway.
"""

from dataclasses import dataclass
from typing import Any

import torch

from rayfuse.errors import LossError
from rayfuse.losses.head import (
    SLICE_BYTES,
    Head,
    Options,
    add_products,
    check_inputs,
    chunk_logits,
    chunks,
    exp_in_place,
    label_logits,
    slices,
    to_inner_logits,
    valid_rows,
)
from rayfuse.losses.topk import block_topk


@dataclass(frozen=True)
class HeadOutput:
    """The student's answer at N positions; `loss_ce`, `topk` and `picked` are differentiable, `lse` where asked for."""

    loss_ce: torch.Tensor  # scalar float32, (weighted) mean over the labels that are not ignored; 0 where all are
    topk: torch.Tensor  # [N, k] float32 logits, sorted descending
    ids: torch.Tensor  # [N, k] int64, the tokens of topk
    lse: torch.Tensor  # [N] float32 log-sum-exp of the position's logits
    label_logps: torch.Tensor  # [N] float32 log-probability of the label, 0 where it is ignored
    count: int  # labels that are not ignored
    picked: torch.Tensor | None = None  # [N, M] float32 logits at the asked ids; differentiable
    weighted: bool = False  # whether loss_ce counts each label by a weight


def fused_head(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    k: int,
    *,
    bias: torch.Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    valid_vocab: int | None = None,
    ignore_index: int = -100,
    chunk: int | None = None,
    picks: torch.Tensor | None = None,
    lse_gradient: bool = False,
    weights: torch.Tensor | None = None,
) -> HeadOutput:
    """Mean cross-entropy and top-K logits of hidden [N, H] under the head weight [V, H] (bias [V]).

    labels: [N], the token that follows each position, `ignore_index` where there is none to learn; the top-K is given
    for those positions too. `picks` [N, M]: ids whose logits are wanted besides the top-K. `scale`, `softcap` and
    `valid_vocab` describe the head, see head.Head. The gradient of a loss on `topk` holds the kept ids fixed, as that
    of torch.topk does. A weight shared with the embedding works like any other use of a parameter.

    `lse_gradient` makes `lse` differentiable, for losses on probabilities exp(topk - lse): the softmax's gradient then
    waits for backward, where each chunk is computed again.

    `weights` [N] float32: how much each label's cross-entropy counts in `loss_ce`, which is still divided by the number
    of labels that are not ignored (not by the sum of their weights); None: all by 1.

    Time: 3 N V H multiply-adds for values and gradients (N V H where no gradient is asked for, 4 N V H with
    `lse_gradient`), 2 N (k + M) H more for the gradient of top-K and picks. Memory beyond inputs and outputs:
    `chunk * V * 4` bytes of logits (times 2 with softcap, plus `chunk * V * 2` below float32), `V * H * 4` for the
    weight's gradient and `N * H * 4` for the hidden states', and 64 MiB for gathered rows or a slice of products.
    `chunk` defaults to as many positions as make 64 MiB of logits, on CUDA 256. Gradients are summed in float32
    (float64 for float64 input) and cast once. On a CPU the same input gives the same bits; on CUDA the scattered sum
    of the top-K's weight gradient is ordered only under torch.use_deterministic_algorithms.

    Backward may run once: it works in the buffers that forward filled. Raises LossError when it runs again, and on
    shapes or dtypes that do not fit, labels outside the vocabulary, k < 1 or k > V.
    """
    head = Head(scale, softcap, valid_vocab)
    check_inputs(hidden, weight, labels, k, bias, head, ignore_index)
    if picks is not None:
        _check_picks(picks, len(hidden), valid_vocab or len(weight))
    if weights is not None and (weights.shape != labels.shape or not bool((weights >= 0).all())):
        raise LossError(f"fused_head: weights must be [{len(labels)}] numbers >= 0, got {tuple(weights.shape)}")
    count = int((labels != ignore_index).sum())
    with torch.autocast(hidden.device.type, enabled=False):
        options = _Options(head, ignore_index, chunk, k, count, torch.is_grad_enabled(), lse_gradient)
        loss_ce, topk, ids, lse, label_logps, picked = _FusedHead.apply(
            hidden, weight, bias, labels, picks, weights, options
        )
    chosen = None if picks is None else picked
    return HeadOutput(loss_ce, topk, ids, lse, label_logps, count, chosen, weights is not None)


def _check_picks(picks: torch.Tensor, positions: int, vocabulary: int) -> None:
    if picks.ndim != 2 or len(picks) != positions:
        raise LossError(f"fused_head: picks must be [N, M] with N = {positions}, got {tuple(picks.shape)}")
    if picks.numel() and not 0 <= int(picks.min()) <= int(picks.max()) < vocabulary:
        raise LossError(
            f"fused_head: picks hold {int(picks.min())}..{int(picks.max())}, the vocabulary is 0..{vocabulary - 1}"
        )


@dataclass(frozen=True)
class _Options(Options):
    """Beside what every head needs: kept logits, labels that count, whether gradients are asked for, and lse's."""

    k: int
    count: int
    gradients: bool
    lse_gradient: bool


class _FusedHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        picks: torch.Tensor | None,
        weights: torch.Tensor | None,
        options: _Options,
    ) -> tuple[torch.Tensor, ...]:
        N, head = len(hidden), options.head
        weight_VH, bias_V = valid_rows(weight, bias, head)
        work_dtype = torch.promote_types(hidden.dtype, torch.float32)
        topk = hidden.new_empty((N, options.k), dtype=work_dtype)
        ids = labels.new_empty((N, options.k), dtype=torch.int64)
        picks = labels.new_empty((N, 0), dtype=torch.int64) if picks is None else picks
        picked = hidden.new_empty(picks.shape, dtype=work_dtype)
        lse = hidden.new_empty(N, dtype=work_dtype)
        label_logps = hidden.new_empty(N, dtype=work_dtype)
        wants = [options.gradients and need for need in ctx.needs_input_grad[:3]]
        now = [want and not options.lse_gradient for want in wants]
        grads = _zeros((hidden, weight, bias), now, work_dtype)

        for rows in chunks(hidden, len(weight_VH), options.chunk):
            logits_CV = chunk_logits(hidden[rows], weight_VH, bias_V, head)
            topk[rows], ids[rows] = block_topk(logits_CV, options.k)
            picked[rows] = logits_CV.gather(1, picks[rows])
            label_C, ignored_C = label_logits(logits_CV, labels[rows], options.ignore_index)
            slope_CV = logits_CV.square() if any(now) and head.softcap is not None else None
            lse[rows], sums_C1 = exp_in_place(logits_CV, topk[rows, :1])
            label_logps[rows] = (label_C - lse[rows]).masked_fill(ignored_C, 0.0)
            if any(now):
                learned_C1 = (~ignored_C).to(work_dtype)[:, None]
                if weights is not None:
                    learned_C1 *= weights[rows, None]
                _to_gradient(logits_CV, sums_C1, learned_C1, learned_C1, labels[rows])
                to_inner_logits(logits_CV, slope_CV, head)
                add_products(grads, rows, logits_CV, hidden[rows], weight_VH)
            del logits_CV, slope_CV

        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(ids, label_logps, *([] if options.lse_gradient else [lse]))
        ctx.save_for_backward(hidden, weight, bias, labels, topk, ids, picked, picks, weights)
        ctx.grads, ctx.wants, ctx.options = grads, wants, options
        counted = label_logps if weights is None else label_logps * weights
        return -counted.sum() / max(options.count, 1), topk, ids, lse, label_logps, picked

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # type: ignore[override]
        ctx: Any, grad_loss: torch.Tensor | None, grad_topk: torch.Tensor | None, *others: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        if ctx.grads is None:
            raise LossError(
                "backward ran twice through one fused_head call: its gradient buffers serve once; "
                "add the losses and call backward on the sum, or call fused_head again"
            )
        grads, ctx.grads = ctx.grads, None
        hidden, weight, _, _, topk, ids, picked, picks, _ = ctx.saved_tensors
        share = topk.new_zeros(()) if grad_loss is None else grad_loss / max(ctx.options.count, 1)
        if ctx.options.lse_gradient:
            grads = _softmax_gradient(ctx, share, others[1])
        else:
            for grad in grads:
                if grad is not None:
                    grad.mul_(share)
        for grad_values, values, token_ids in ((grad_topk, topk, ids), (others[-1], picked, picks)):
            if grad_values is not None and token_ids.numel():
                _add_gathered_gradient(grads, grad_values, values, token_ids, hidden, weight, ctx.options.head)
        cast = [None if grad is None else grad.to(hidden.dtype) for grad in grads]
        return *cast, None, None, None, None  # labels, picks, weights, options


def _zeros(inputs: tuple[torch.Tensor | None, ...], wants: list[bool], dtype: torch.dtype) -> list[torch.Tensor | None]:
    """Gradient buffers of the inputs that want one."""
    return [
        torch.zeros_like(x, dtype=dtype) if want and x is not None else None
        for x, want in zip(inputs, wants, strict=True)
    ]


def _to_gradient(
    exps_CV: torch.Tensor,
    sums_C1: torch.Tensor,
    lse_share_C1: torch.Tensor,
    label_share_C1: torch.Tensor,
    labels_C: torch.Tensor,
) -> None:
    """Turn exp(logits) into the gradient of `lse_share * lse - label_share * logit of the label`, in place.

    `label_share` is 0 where the label is ignored.
    """
    exps_CV *= lse_share_C1 / sums_C1
    exps_CV.scatter_add_(1, labels_C[:, None].masked_fill(label_share_C1 == 0, 0), -label_share_C1)


def _softmax_gradient(ctx: Any, share: torch.Tensor, grad_lse: torch.Tensor | None) -> list[torch.Tensor | None]:
    """The cross-entropy's gradient times `share`, and that of lse, chunk by chunk."""
    hidden, weight, bias, labels, topk, *_, weights = ctx.saved_tensors
    options = ctx.options
    weight_VH, bias_V = valid_rows(weight, bias, options.head)
    grads = _zeros((hidden, weight, bias), ctx.wants, topk.dtype)
    learned_N = labels != options.ignore_index
    label_share_N1 = (share * (learned_N if weights is None else learned_N * weights))[:, None].to(topk.dtype)
    lse_share_N1 = label_share_N1 if grad_lse is None else label_share_N1 + grad_lse[:, None]
    for rows in chunks(hidden, len(weight_VH), options.chunk):
        grad_CV = chunk_logits(hidden[rows], weight_VH, bias_V, options.head)
        squares_CV = grad_CV.square() if options.head.softcap is not None else None
        _, sums_C1 = exp_in_place(grad_CV, topk[rows, :1])
        _to_gradient(grad_CV, sums_C1, lse_share_N1[rows], label_share_N1[rows], labels[rows])
        to_inner_logits(grad_CV, squares_CV, options.head)
        add_products(grads, rows, grad_CV, hidden[rows], weight_VH)
    return grads


def _add_gathered_gradient(
    grads: list[torch.Tensor | None],
    grad_values: torch.Tensor,
    values: torch.Tensor,
    ids: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    head: Head,
) -> None:
    """Add the gradient that arrives on the logits of ids [N, k]: N k H work, at most 64 MiB gathered at a time."""
    grad_hidden, grad_weight, grad_bias = grads
    N, k = ids.shape
    inner_Nk = grad_values.clone()
    to_inner_logits(inner_Nk, values.square(), head)
    if grad_bias is not None:
        grad_bias.index_add_(0, ids.flatten(), inner_Nk.flatten())
    rows_at_once = max(1, SLICE_BYTES // (4 * k * hidden.shape[1]))
    for rows in slices(N, rows_at_once):
        inner_Ck = inner_Nk[rows]
        if grad_hidden is not None:
            grad_hidden[rows] += torch.bmm(inner_Ck[:, None], weight[ids[rows]].to(inner_Ck.dtype))[:, 0]
        if grad_weight is not None:
            shares_CkH = inner_Ck[..., None] * hidden[rows, None].to(inner_Ck.dtype)
            grad_weight.index_add_(0, ids[rows].flatten(), shares_CkH.flatten(0, 1))
