"""Exact Gromov-Wasserstein distance between logit graphs, its coupling held constant: the measure of the closed form.

Shapes: N positions laid end to end, B samples, k kept values (the nodes of a graph), C and D the [k, k] graphs of
student and teacher, T a coupling of their nodes: [k, k], nothing negative, rows and columns summing to 1/k.

    GW(C, D) = min_T  sum_ijpq (C_ij - D_pq)^2 T_ip T_jq

Envelope theorem: where the minimum is unique, the derivative of GW with respect to C is that of the sum with T held.
So T needs no gradient, and whoever solves for it (POT, on a CPU) need not be where the student is.
"""

from __future__ import annotations

import numpy as np
import torch

from rayfuse.errors import LossError
from rayfuse.losses.gld import unit_columns

PERMUTATIONS = 12
"""Random starts of the descent."""


def gld_graphs(values: torch.Tensor, sample: torch.Tensor, samples: int) -> torch.Tensor:
    """Cosine graphs [B, k, k] of a batch of samples: of each, C = Z^T Z with columns of unit norm.

    Arguments and errors are those of gld_features, whose features are the sorted row means of these graphs.
    Differentiable in values. O(N k^2) time and memory: for small k.
    """
    unit_Nk = unit_columns(values, sample, samples)
    products_Nkk = unit_Nk[:, :, None] * unit_Nk[:, None, :]
    return products_Nkk.new_zeros(samples, *products_Nkk.shape[1:]).index_add(0, sample, products_Nkk)


def gw_couplings(student: np.ndarray, teacher: np.ndarray) -> np.ndarray:
    """Couplings [B, k, k] of B pairs of symmetric graphs [B, k, k] with uniform node weights, float64, by POT.

    The graphs are Gram matrices, so the sum is concave in T: its minimum is a permutation over k, and POT's conditional
    gradients go from a start to a local one. Of several starts (the independent coupling, rank i with rank i, the
    closed form's, which sorts both sides by row means, and PERMUTATIONS at random) the lowest is kept. Deterministic.
    O(k^3) per step of the descent.

    Raises LossError on shapes that do not match.
    """
    import ot

    if student.shape != teacher.shape or student.ndim != 3 or student.shape[1] != student.shape[2]:
        raise LossError(f"gw_couplings takes two arrays [B, k, k], got {student.shape} and {teacher.shape}")
    k = student.shape[1]
    uniform, same, random = np.full(k, 1 / k), np.eye(k) / k, np.random.default_rng(k)
    shuffled = [same[random.permutation(k)] for _ in range(PERMUTATIONS)]
    found = np.empty(student.shape)
    for b, (C, D) in enumerate(zip(student.astype(np.float64), teacher.astype(np.float64), strict=True)):
        sorted_by_mean = np.zeros((k, k))
        sorted_by_mean[np.argsort(C.mean(1), kind="stable"), np.argsort(D.mean(1), kind="stable")] = 1 / k
        tried = []
        for start in (None, same, sorted_by_mean, *shuffled):
            T, log = ot.gromov.gromov_wasserstein(C, D, uniform, uniform, "square_loss", True, log=True, G0=start)
            tried.append((float(log["gw_dist"]), T))
        found[b] = min(tried, key=lambda pair: pair[0])[1]
    return found


def gw_distance(student: torch.Tensor, teacher: torch.Tensor, couplings: torch.Tensor) -> torch.Tensor:
    """The objective [B] of given couplings, all [B, k, k]; differentiable in the student's graphs alone.

    Equals POT's gromov_wasserstein2 (square loss) at the coupling POT finds. O(k^3).
    """
    if not student.shape == teacher.shape == couplings.shape or student.ndim != 3:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (student, teacher, couplings))
        raise LossError(f"gw_distance takes graphs and couplings [B, k, k], got {shapes}")
    teacher, couplings = (tensor.detach().to(student) for tensor in (teacher, couplings))
    carried = couplings @ teacher @ couplings.mT
    squares = student.square().mean(dim=(1, 2)) + teacher.square().mean(dim=(1, 2))
    return squares - 2 * (student * carried).sum(dim=(1, 2))
