"""A language model's output head, a chunk of positions at a time: its options, checks, logits and gradients.

Shapes: N positions, H hidden size, V vocabulary; C positions of one chunk.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from rayfuse.errors import LossError

CHUNK_BYTES = {"cpu": 64 * 2**20, "cuda": 256 * 2**20}
"""Float32 logits of one chunk. A CPU's caches like few rows. A GPU needs more: with C rows in bfloat16 a product does C
operations per byte of the weight, an H100 can do 300 in that time; and the weight's gradient moves once per chunk."""
SLICE_BYTES = 64 * 2**20
"""Of what is made and added to a gradient at a time."""


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


@dataclass(frozen=True)
class Options:
    """What is no tensor among the arguments of a computation under a head.

    Attributes:
        head: see Head.
        ignore_index: label of a position that is not learnt.
        chunk: positions whose logits are held at once; None: as many as the default's bytes hold.
    """

    head: Head
    ignore_index: int
    chunk: int | None


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


def chunk_size(vocab: int, device: str = "cpu") -> int:
    """Positions per chunk: 64 MiB (CUDA: 256) / (4 bytes * V), at least one. V = 100,352 gives 167 (668)."""
    return max(1, CHUNK_BYTES.get(device, CHUNK_BYTES["cpu"]) // (4 * vocab))


def chunks(hidden_NH: torch.Tensor, vocab: int, size: int | None) -> Iterator[slice]:
    """Slices of at most `size` (default chunk_size) of the positions, as equal in length as they can be."""
    return slices(len(hidden_NH), chunk_size(vocab, hidden_NH.device.type) if size is None else size)


def slices(length: int, size: int) -> Iterator[slice]:
    """Slices of at most `size`, as equal in length as they can be."""
    if size < 1:
        raise LossError(f"chunk is {size} positions, it must be at least 1")
    count = -(-length // size)
    for i in range(count):
        yield slice(i * length // count, (i + 1) * length // count)


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


def to_inner_logits(grad_CV: torch.Tensor, squares_CV: torch.Tensor | None, head: Head) -> None:
    """Turn a gradient on logits into one on hidden @ weight.T + bias, in place: times scale (1 - (logit / softcap)^2).

    squares_CV holds the squared logits; it is overwritten.
    """
    if head.softcap is not None:
        assert squares_CV is not None
        grad_CV *= squares_CV.mul_(-(head.softcap**-2)).add_(1.0)
    if head.scale != 1.0:
        grad_CV *= head.scale


def add_products(
    grads: list[torch.Tensor | None],
    rows: slice,
    grad_CV: torch.Tensor,
    hidden_CH: torch.Tensor,
    weight_VH: torch.Tensor,
) -> None:
    """Add one chunk's share to the gradients of hidden (its rows), weight and bias."""
    grad_hidden, grad_weight, grad_bias = grads
    if grad_bias is not None:
        grad_bias[: len(weight_VH)] += grad_CV.sum(dim=0)
    grad_CV = grad_CV.to(weight_VH.dtype)
    if grad_hidden is not None:
        grad_hidden[rows] = grad_CV @ weight_VH
    if grad_weight is not None:
        grad_valid_VH = grad_weight[: len(weight_VH)]
        if grad_valid_VH.dtype == grad_CV.dtype:
            grad_valid_VH.addmm_(grad_CV.T, hidden_CH)
        else:  # a product of [V, H] would be half as large as the gradient itself
            for part in slices(len(weight_VH), max(1, SLICE_BYTES // (4 * hidden_CH.shape[1]))):
                grad_valid_VH[part] += grad_CV[:, part].T @ hidden_CH
