"""Graph-on-logits distillation: compare how a model's ranks move together over a response, in closed form.

Shapes: L response positions of one sample, N positions of a whole batch laid end to end, B samples, k kept values.
The k ranks are the nodes of a graph; its edge (i, j) is the cosine, over the positions of the sample, between the
series of values at rank i and at rank j. Nothing is aligned: L may differ between student and teacher.
"""

import torch

from rayfuse.errors import LossError

TINY = 1e-24


def gauge(topk: torch.Tensor, lse: torch.Tensor | None = None) -> torch.Tensor:
    """Bring k logits (or log-probabilities) per position [..., k] into a form that a constant does not change.

    A cosine graph depends on a constant added to a position's logits, and teachers that answer log-probabilities do
    not tell it. Default: log-softmax over the k kept values, whose gradient stays on them. With `lse` [...] (each
    position's log-sum-exp): full log-probabilities topk - lse; pass zeros for values that already are. A detached
    `lse`, as HeadOutput's, is a constant to the gradient. float32 (float64 stays float64), O(values).
    """
    promoted = topk.to(torch.promote_types(topk.dtype, torch.float32))
    return promoted.log_softmax(dim=-1) if lse is None else promoted - lse[..., None]


def gld_features(values: torch.Tensor, sample: torch.Tensor, samples: int) -> torch.Tensor:
    """Sorted node features [B, k] of the cosine graphs of a batch of samples, in float32 (float64 stays float64).

    values: [N, k], already in a common gauge; sample: int64 [N], the sample each row belongs to, in any order;
    samples: B. Feature i of a sample is the mean of row i of its graph C = Z^T Z, where Z [L, k] has columns of unit
    L2 norm (a column of zeros stays zero). A row mean of C needs no C: it is Z^T (Z 1) / k. So this is O(N k) time and
    memory, plus B k log k for the sort. A sample without rows has features 0. Differentiable in values.

    Raises LossError on shapes that do not match, on values that are not finite, on samples outside 0..B-1, and on
    values whose rows all sum to zero (see `_refuse_centred`).

    Paper: InfiGFusion (arXiv 2505.13893), graph on logits and its node features; cosine and mean in place of the raw
    outer products keep the features independent of L and of the scale of the logits.
    """
    unit_Nk = unit_columns(values, sample, samples)
    shares_Nk = unit_Nk * unit_Nk.mean(dim=1, keepdim=True)
    return shares_Nk.new_zeros(samples, values.shape[1]).index_add(0, sample, shares_Nk).sort(dim=1).values


def unit_columns(values: torch.Tensor, sample: torch.Tensor, samples: int) -> torch.Tensor:
    """The values [N, k] with each sample's columns divided by their L2 norm; see gld_features for arguments, errors."""
    _check(values, sample, samples)
    values_Nk = values.to(torch.promote_types(values.dtype, torch.float32))
    squares_Bk = values_Nk.new_zeros(samples, values.shape[1]).index_add(0, sample, values_Nk.square())
    return values_Nk * squares_Bk.clamp_min(TINY).rsqrt()[sample]


def gld_distance(student_features: torch.Tensor, teacher_features: torch.Tensor) -> torch.Tensor:
    """Closed-form Gromov-Wasserstein distance per sample [B]: the L1 between sorted features [B, k], summed over k.

    The teacher is detached. Divided by k it is a lower bound of GW_1 between the two graphs with uniform node weights
    (Memoli 2011, the first lower bound; with row means as eccentricities it follows from the triangle inequality).

    Paper: InfiGFusion (arXiv 2505.13893), the sorted closed form, O(k log k) in place of O(k^4).
    """
    if student_features.shape != teacher_features.shape or student_features.ndim != 2:
        raise LossError(
            f"gld_distance compares features [B, k], got student {tuple(student_features.shape)} and teacher "
            f"{tuple(teacher_features.shape)}: keep the same samples and the same k on both sides"
        )
    return (student_features - teacher_features.detach()).abs().sum(dim=1)


def gld_loss(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Graph-on-logits distance of one sample, a scalar: student [Ls, k] and teacher [Lt, k] in a common gauge.

    gld_features and gld_distance for a batch of one. Raises LossError where they do.

    Paper: InfiGFusion (arXiv 2505.13893), graph-on-logits distillation loss, for one teacher.
    """
    features = []
    for name, values in (("student", student), ("teacher", teacher.detach())):
        if values.ndim != 2:
            raise LossError(f"gld_loss compares [L, k] with [L, k], the {name} is {tuple(values.shape)}")
        features.append(gld_features(values, values.new_zeros(len(values), dtype=torch.int64), 1))
    return gld_distance(*features)[0]


def _check(values: torch.Tensor, sample: torch.Tensor, samples: int) -> None:
    if values.ndim != 2 or sample.shape != values.shape[:1]:
        raise LossError(
            f"gld_features takes values [N, k] and the sample of each row [N], got {tuple(values.shape)} and "
            f"{tuple(sample.shape)}"
        )
    if not len(values):
        return
    if ((sample < 0) | (sample >= samples)).any():
        raise LossError(f"gld_features: rows belong to samples {sample.min()}..{sample.max()}, there are {samples}")
    finite_N = torch.isfinite(values).all(dim=1)
    if not finite_N.all():
        raise LossError(f"gld_features: values are not finite in rows {(~finite_N).nonzero()[:8, 0].tolist()}")
    _refuse_centred(values.detach())


def _refuse_centred(values_Nk: torch.Tensor) -> None:
    """Raise LossError where every row sums to zero, as z-scores do.

    Then every row of the Gram matrix Z^T Z sums to zero as well, whatever the model said: features and gradient are
    identically zero, and with columns of unit norm nothing but differences of those norms is left.
    """
    wide_Nk = values_Nk.to(torch.promote_types(values_Nk.dtype, torch.float32))
    largest_N = wide_Nk.abs().amax(dim=1)
    if ((wide_Nk.mean(dim=1).abs() <= 1e-3 * largest_N) & (largest_N > 0)).all():
        raise LossError(
            "gld: every row of the values sums to zero, as z-scored values do; the rows of their Gram matrix then sum "
            "to zero too, so that the gradient is identically zero. Pass logits through rayfuse.losses.gauge instead"
        )
