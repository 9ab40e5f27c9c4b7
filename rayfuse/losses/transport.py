"""Optimal transport between kept distributions, batched over positions: entropic plans, ranks on a line, positions.

Shapes: N problems side by side, n and m masses of the two sides, k kept values, W channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.utils.rnn import pad_sequence

from rayfuse.errors import LossError

TINY = 1e-30


def rank_costs(k: int, device: torch.device | None = None) -> torch.Tensor:
    """Cost [k, k] of moving mass between ranks: |i - j| / (k - 1), so that the farthest way costs 1."""
    if k < 2:
        raise LossError(f"rank_costs needs at least 2 ranks, got {k}")
    ranks = torch.arange(k, device=device, dtype=torch.float32)
    return (ranks[:, None] - ranks[None]).abs() / (k - 1)


def sinkhorn_plan(
    a: torch.Tensor, b: torch.Tensor, costs: torch.Tensor, regularisation: float, iterations: int
) -> torch.Tensor:
    """Plans [N, n, m] of min_T <T, costs> - regularisation * entropy(T) between masses a [N, n] and b [N, m].

    costs: [n, m] or [N, n, m]. Sinkhorn's iterations in the log domain, `iterations` of them from zero potentials, the
    last half-step on a: the sums over m are a exactly, those over n approach b. The same numbers as POT's sinkhorn with
    as many iterations. Differentiable in all tensors, through the iterations. O(iterations N n m).

    Paper: Cuturi 2013 (arXiv 1306.0895).
    """
    log_a, log_b = a.clamp_min(TINY).log(), b.clamp_min(TINY).log()
    kernel = -costs / regularisation
    f = torch.zeros_like(log_a)
    g = torch.zeros_like(log_b)
    for _ in range(iterations):
        g = log_b - (kernel + f[:, :, None]).logsumexp(dim=1)
        f = log_a - (kernel + g[:, None, :]).logsumexp(dim=2)
    return (f[:, :, None] + kernel + g[:, None, :]).exp()


def wasserstein_ranks(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Exact 1-Wasserstein distances [N] between masses on ranks, a and b [N, k], with the costs of rank_costs.

    On a line it is the L1 distance of the cumulative sums: O(N k), no solver.
    """
    if a.shape != b.shape or a.shape[-1] < 2:
        raise LossError(
            f"wasserstein_ranks compares [N, k] with [N, k], k >= 2; got {tuple(a.shape)}, {tuple(b.shape)}"
        )
    return (a - b).cumsum(dim=-1)[..., :-1].abs().sum(dim=-1) / (a.shape[-1] - 1)


def channels(mass: torch.Tensor, ids: torch.Tensor, width: int) -> torch.Tensor:
    """The kept masses [N, k] of tokens ids [N, k] as columns [N, W] of one channel order for the whole batch.

    Channel w is the token with the w-th largest mass summed over all N positions (of equal ones the smaller id); what
    a position does not keep is 0 there, and tokens beyond the W-th are dropped. Differentiable in mass. O(N k log N k).
    """
    tokens, column_Nk = ids.unique(return_inverse=True)
    total = torch.zeros(len(tokens), dtype=mass.dtype, device=mass.device)
    total.index_add_(0, column_Nk.flatten(), mass.detach().flatten())
    order = total.argsort(descending=True, stable=True)[:width]
    place = torch.full_like(tokens, width)
    place[order] = torch.arange(len(order), device=place.device)
    return mass.new_zeros(len(mass), width + 1).scatter_add(1, place[column_Nk], mass)[:, :width]


def sinkhorn_positions(
    x: torch.Tensor, y: torch.Tensor, lengths: Sequence[int], regularisation: float, iterations: int
) -> torch.Tensor:
    """Entropic transport [B] between the positions of two sides of each sample, at the L1 cost of their rows.

    x, y: [N, W], the rows of B samples end to end, `lengths` of each. Every position has mass 1. Sinkhorn's iterations
    as the authors of MultiLevelOT write them: rows, then columns of exp(-cost / regularisation) are made to sum to 1.
    A sample without rows gives 0. O(iterations sum of squared lengths), padded to the longest.

    Paper: MultiLevelOT (arXiv 2412.14528), sequence-level Sinkhorn distance; after SinKD (arXiv 2402.17110).
    """
    if sum(lengths) != len(x) or x.shape != y.shape:
        raise LossError(f"sinkhorn_positions: {tuple(x.shape)}, {tuple(y.shape)} for {sum(lengths)} rows in all")
    x_BLW, y_BLW = (pad_sequence(list(side.split(list(lengths))), batch_first=True) for side in (x, y))
    costs_BLL = torch.cdist(x_BLW, y_BLW, p=1)
    real_BL = torch.arange(x_BLW.shape[1], device=x.device)[None] < torch.tensor(lengths, device=x.device)[:, None]
    padding_BL = (~real_BL).to(costs_BLL.dtype)  # its rows and columns are divided by 1, not by their sum of 0
    plan_BLL = (-costs_BLL / regularisation).exp() * (real_BL[:, :, None] & real_BL[:, None, :])
    for _ in range(iterations):
        plan_BLL = plan_BLL / (plan_BLL.sum(dim=2) + padding_BL)[:, :, None]
        plan_BLL = plan_BLL / (plan_BLL.sum(dim=1) + padding_BL)[:, None, :]
    return (plan_BLL * costs_BLL).sum(dim=(1, 2))
