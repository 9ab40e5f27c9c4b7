"""The formulas of merges: task arithmetic, TIES and SCE, tensor by tensor."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

DENSITIES = {"ties": 0.2, "sce": 0.1}  # the papers' own


@dataclass(frozen=True)
class Recipe:
    """The numbers of a merge.

    Attributes:
        weights: S factors of the task vectors (task arithmetic, TIES).
        density: share of the elements of a tensor that is kept (TIES, SCE), in (0, 1].
        scale: factor on the merged task vector, lambda in the papers.
    """

    weights: tuple[float, ...]
    density: float
    scale: float


def task_arithmetic(base: torch.Tensor, students_S: Sequence[torch.Tensor], recipe: Recipe) -> torch.Tensor:
    """base + scale * sum_s weight_s * delta_s, in float32 (float64 where the base is).

    Paper: Ilharco et al. 2023, arXiv 2212.04089, section 2.
    """
    deltas_S = _task_vectors(base, students_S)
    return _weighted_sum(deltas_S, recipe.weights).mul_(recipe.scale).add_(base)


def ties(base: torch.Tensor, students_S: Sequence[torch.Tensor], recipe: Recipe) -> torch.Tensor:
    """Trim each task vector to its largest elements, elect a sign per element, average those that agree with it.

    Trim keeps the max(1, floor(density * n)) elements of largest magnitude of this tensor, and all that are as large as
    the smallest of them. The elected sign is that of sum_s weight_s * delta_s; where this sum is exactly 0 nothing is
    elected and the base stays. The mean is over the agreeing students only, weighted. O(S n).

    Paper: Yadav et al. 2023, arXiv 2306.01708, algorithm 1, which ranks a model's elements all together; here, as in
    mergekit, each tensor is trimmed by itself, so that one pass over the files is enough.
    """
    deltas_S = _task_vectors(base, students_S)
    keep = max(1, int(recipe.density * base.numel()))
    if keep < base.numel():
        for delta in deltas_S:
            delta.mul_(_largest(delta.abs(), keep))
    elected = _weighted_sum(deltas_S, recipe.weights).sign_()
    return _agreeing_mean(deltas_S, elected, recipe.weights).mul_(recipe.scale).add_(base)


def sce(base: torch.Tensor, students_S: Sequence[torch.Tensor], recipe: Recipe) -> torch.Tensor:
    """Select the elements on which the students differ most, calculate a weight per student, erase minority signs.

    Select keeps the floor(density * m) elements of largest variance over the students, and all with a variance as large
    as the smallest of them; m counts the elements whose variance is not 0. Density 1 keeps every element. Calculate:
    the weight of a student is its share of the sum of squares of the selected elements of this tensor. Erase: what
    disagrees in sign with sum_s delta_s goes, and the weights of the rest are normalised to sum to 1. O(S^2 n).

    Paper: Wan et al. 2024 (FuseChat), arXiv 2408.07990, SCE merging. Normalising after Erase is as in mergekit. Unlike
    there, no absolute threshold on the sum of squares: mergekit 0.1.5 weighs all students alike where their mean
    squares add up to less than 1e-6, which task vectors of 5e-4 per element already do.
    """
    deltas_S = _task_vectors(base, students_S)
    if recipe.density < 1:
        variances = _variances(deltas_S)
        keep = int(recipe.density * int(variances.count_nonzero()))
        deltas_S.mul_(_largest(variances, keep))
        del variances
    energies = [_sum_of_squares(delta) for delta in deltas_S]
    whole = sum(energies)
    shares = [energy / whole for energy in energies] if whole > 0 else [1 / len(energies)] * len(energies)
    elected = deltas_S.sum(dim=0).sign_()
    return _agreeing_mean(deltas_S, elected, shares).mul_(recipe.scale).add_(base)


MERGES: dict[str, Callable[[torch.Tensor, Sequence[torch.Tensor], Recipe], torch.Tensor]] = {
    "task_arithmetic": task_arithmetic,
    "ties": ties,
    "sce": sce,
}


def _task_vectors(base: torch.Tensor, students_S: Sequence[torch.Tensor]) -> torch.Tensor:
    """[S, *shape], student minus base in float32 or wider."""
    promoted_base = base.to(torch.promote_types(base.dtype, torch.float32))
    deltas_S = torch.empty(len(students_S), *base.shape, dtype=promoted_base.dtype)
    for s, student in enumerate(students_S):
        torch.sub(student, promoted_base, out=deltas_S[s])
    return deltas_S


def _weighted_sum(deltas_S: torch.Tensor, weights: Sequence[float]) -> torch.Tensor:
    total = torch.zeros_like(deltas_S[0])
    for delta, weight in zip(deltas_S, weights, strict=True):
        total.add_(delta, alpha=weight)
    return total


def _agreeing_mean(deltas_S: torch.Tensor, elected: torch.Tensor, weights: Sequence[float]) -> torch.Tensor:
    """Weighted mean, per element, of the task vectors with the elected sign (-1, 0, 1); 0 where there is none."""
    total, mass, agrees = torch.zeros_like(elected), torch.zeros_like(elected), torch.empty_like(elected)
    for delta, weight in zip(deltas_S, weights, strict=True):
        torch.mul(delta, elected, out=agrees).gt_(0)
        mass.add_(agrees, alpha=weight)
        total.add_(agrees.mul_(delta), alpha=weight)
    return total.div_(mass.masked_fill_(mass == 0, 1))


def _largest(scores: torch.Tensor, keep: int) -> torch.Tensor:
    """Mask of the `keep` largest scores (>= 0) and of all that tie with the smallest of them.

    Keeping ties, as the authors of TIES do, makes the choice independent of the order of the elements; tied task
    vectors are common where weights are stored in bfloat16. O(n), one copy.
    """
    if keep == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    rank = scores.numel() - keep
    threshold = float(np.partition(scores.numpy().reshape(-1), rank)[rank])
    return scores >= threshold


def _variances(deltas_S: torch.Tensor) -> torch.Tensor:
    """S^2 times the variance over the students, as the sum of (delta_s - delta_t)^2 over pairs s < t.

    Exactly 0 where all are equal, and for the few students of a merge ten times as fast as torch.var over dimension 0.
    """
    total, step = torch.zeros_like(deltas_S[0]), torch.empty_like(deltas_S[0])
    for s, t in itertools.combinations(range(len(deltas_S)), 2):
        torch.sub(deltas_S[s], deltas_S[t], out=step)
        total.addcmul_(step, step)
    return total


def _sum_of_squares(values: torch.Tensor) -> float:
    return sum(float(part.double().square().sum()) for part in values.reshape(-1).split(1 << 22))
