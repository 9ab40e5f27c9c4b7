"""Wasserstein distance mixed with KL, both between top-K distributions rank by rank.

    p, q   = softmax over the kept K of student and teacher at temperature t        masses on the ranks
    W      = sum_{i<K} | P_i - Q_i | / (K - 1)       exact 1-Wasserstein for the cost |i - j| / (K - 1); P, Q cumulated
    KL     = t^2 sum_i q_i log(q_i / p_i)
    L_s    = tokenmean  mix W + (1 - mix) KL
    L      = (1 - lam) L_SFT + lam * SUM_s w_s L_s

The mixture is that of "Stage-Adaptive Knowledge Distillation via KL-Wasserstein Hybrid Distribution Alignment" (WKL):
Wasserstein sees how far mass has to go and never saturates, KL matches each probability. WKL moves its weight from the
first to the second over the epochs; here it stays. Classes are ranks, for the models share no others (see sinkhorn.py),
and on a line of ranks the Wasserstein distance needs no solver.
"""

from __future__ import annotations

import torch

from rayfuse.batch import Counts, FusionBatch
from rayfuse.config import WassersteinKL
from rayfuse.losses import HeadOutput
from rayfuse.losses.transport import wasserstein_ranks
from rayfuse.stages.distillation import distill, kept_ranks


def wasserstein_kl_loss(
    stage: WassersteinKL, head: HeadOutput, batch: FusionBatch, totals: Counts
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """This micro-batch's share of the global batch's loss; `loss_wkl/TEACHER` is L_s."""

    def distance(s: int) -> torch.Tensor:
        student_Pk, teacher_Pk = kept_ranks(head, batch, s)
        log_p_Pk, log_q_Pk = ((values / stage.temperature).log_softmax(dim=1) for values in (student_Pk, teacher_Pk))
        q_Pk = log_q_Pk.exp()
        kl = stage.temperature**2 * (q_Pk * (log_q_Pk - log_p_Pk)).sum(1)
        return stage.mix * wasserstein_ranks(log_p_Pk.exp(), q_Pk) + (1 - stage.mix) * kl

    return distill(stage, head, batch, totals, "loss_wkl", distance)
