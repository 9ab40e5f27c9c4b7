"""Sinkhorn distance between top-K distributions, one problem per position where both have read the same bytes.

    p, q   = softmax over the kept K of student and teacher, at one temperature     masses on the ranks
    d_ij   = |i - j| / (K - 1)                                                      cost of moving from rank i to rank j
    T      = argmin <T, d> - eps entropy(T),   T 1 = p,  T' 1 = q                   10 Sinkhorn iterations
    L_s    = tokenmean <T, d>
    L      = (1 - lam) L_SFT + lam * SUM_s w_s L_s

It is WKD-L (arXiv 2412.08139, "Wasserstein Distance Rivals KL Divergence for Knowledge Distillation") with its solver,
eps and number of iterations, but for the cost: there it comes from how the classes that both models share relate to
each other. Models with different tokenizers share no classes; what they do share at a position is the order of their
ranks. The gradient goes through the iterations, as there.
"""

from __future__ import annotations

import torch

from rayfuse.batch import Counts, FusionBatch
from rayfuse.config import Sinkhorn
from rayfuse.losses import HeadOutput
from rayfuse.losses.transport import rank_costs, sinkhorn_plan
from rayfuse.stages.distillation import distill, kept_ranks


def sinkhorn_loss(
    stage: Sinkhorn, head: HeadOutput, batch: FusionBatch, totals: Counts
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """This micro-batch's share of the global batch's loss; `loss_ot/TEACHER` is L_s."""

    def distance(s: int) -> torch.Tensor:
        student_Pk, teacher_Pk = kept_ranks(head, batch, s)
        p_Pk, q_Pk = ((values / stage.temperature).softmax(dim=1) for values in (student_Pk, teacher_Pk))
        costs_kk = rank_costs(p_Pk.shape[1], p_Pk.device)
        plan_Pkk = sinkhorn_plan(p_Pk, q_Pk, costs_kk, stage.regularisation, stage.iterations)
        return (plan_Pkk * costs_kk).sum((1, 2))

    return distill(stage, head, batch, totals, "loss_ot", distance)
