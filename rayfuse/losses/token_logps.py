"""Log-probabilities of given tokens whose gradient is asked for later, without ever holding [N, V] logits.

Shapes: N positions, H hidden size, V vocabulary; C positions of one chunk.

A preference loss weighs a response's gradient by how both responses scored, so the gradient cannot be taken in
forward as fused_head does: each chunk's logits are computed again in backward.
"""

from typing import Any

import torch

from rayfuse.losses.head import (
    Head,
    Options,
    add_products,
    check_inputs,
    chunk_logits,
    chunks,
    exp_in_place,
    label_logits,
    to_inner_logits,
    valid_rows,
)


def token_logps(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    valid_vocab: int | None = None,
    ignore_index: int = -100,
    chunk: int | None = None,
) -> torch.Tensor:
    """Log-probability [N] of each label under the head, float32, 0 where the label is `ignore_index`; differentiable.

    Arguments, chunks and gradient precision are those of fused_head. Time: N V H multiply-adds forward, 3 N V H in
    backward. Memory: a chunk's logits, and in backward `V * H * 4` bytes for the weight's gradient and `N * H * 4` for
    the hidden states'. Backward may run any number of times. Raises LossError where fused_head does.

    Paper: InfiFPO (arXiv 2505.13878), the log-probabilities of eq. 10.
    """
    head = Head(scale, softcap, valid_vocab)
    check_inputs(hidden, weight, labels, 1, bias, head, ignore_index)
    with torch.autocast(hidden.device.type, enabled=False):
        return _TokenLogps.apply(hidden, weight, bias, labels, Options(head, ignore_index, chunk))


class _TokenLogps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        options: Options,
    ) -> torch.Tensor:
        weight_VH, bias_V = valid_rows(weight, bias, options.head)
        logps_N = hidden.new_empty(len(hidden), dtype=torch.promote_types(hidden.dtype, torch.float32))
        for rows in chunks(hidden, len(weight_VH), options.chunk):
            logits_CV = chunk_logits(hidden[rows], weight_VH, bias_V, options.head)
            label_C, ignored_C = label_logits(logits_CV, labels[rows], options.ignore_index)
            lse_C, _ = exp_in_place(logits_CV, logits_CV.amax(dim=-1, keepdim=True))
            logps_N[rows] = (label_C - lse_C).masked_fill(ignored_C, 0.0)
        ctx.save_for_backward(hidden, weight, bias, labels)
        ctx.options = options
        return logps_N

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_N: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        hidden, weight, bias, labels = ctx.saved_tensors
        options = ctx.options
        weight_VH, bias_V = valid_rows(weight, bias, options.head)
        grads = [
            torch.zeros_like(x, dtype=grad_N.dtype) if want and x is not None else None
            for x, want in zip((hidden, weight, bias), ctx.needs_input_grad[:3], strict=True)
        ]
        for rows in chunks(hidden, len(weight_VH), options.chunk):
            grad_CV = chunk_logits(hidden[rows], weight_VH, bias_V, options.head)
            squares_CV = grad_CV.square() if options.head.softcap is not None else None
            ignored_C1 = (labels[rows] == options.ignore_index)[:, None]
            grad_C1 = grad_N[rows, None].masked_fill(ignored_C1, 0.0)
            _, sums_C1 = exp_in_place(grad_CV, grad_CV.amax(dim=-1, keepdim=True))
            grad_CV *= -grad_C1 / sums_C1
            grad_CV.scatter_add_(1, labels[rows, None].masked_fill(ignored_C1, 0), grad_C1)
            to_inner_logits(grad_CV, squares_CV, options.head)
            add_products(grads, rows, grad_CV, hidden[rows], weight_VH)
        cast = [None if grad is None else grad.to(hidden.dtype) for grad in grads]
        return *cast, None, None  # labels, options
