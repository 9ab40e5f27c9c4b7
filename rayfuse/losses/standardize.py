"""The z-score over kept logits that makes models of different sharpness comparable.

Shapes: N positions, K kept values per position.
"""

import torch

from rayfuse.errors import LossError


def standardize(values: torch.Tensor, eps: float = 1e-7) -> torch.Tensor:
    """(values - mean) / (std + eps) over the last axis, with the unbiased standard deviation.

    The mean and the deviation are differentiated. Computed in float32 (float64 stays float64) and returned so, in the
    shape of the input; a row of equal values becomes zeros, with a zero gradient. O(values).

    Raises LossError where the last axis holds fewer than two values.

    Paper: InfiFusion (arXiv 2501.02795), logit standardisation over the Top-K of each model; the estimator and eps are
    those of logit standardisation in knowledge distillation (arXiv 2403.01427).
    """
    if values.ndim == 0 or values.shape[-1] < 2:
        raise LossError(
            f"standardize needs at least 2 values on the last axis, got shape {tuple(values.shape)}: "
            "a deviation of one value is not defined; keep k >= 2 logits"
        )
    promoted = values.to(torch.promote_types(values.dtype, torch.float32))
    if promoted.numel() == 0:
        return promoted
    centred = promoted - promoted.mean(dim=-1, keepdim=True)
    return centred / (promoted.std(dim=-1, keepdim=True) + eps)
