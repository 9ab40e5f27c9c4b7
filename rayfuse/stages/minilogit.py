"""MiniLogit: regression of the student's logits on the teacher's top-K, the baseline of the papers' tables.

At a position where both have read the same bytes, C is the set of the teacher's top-K tokens that the student has too.
A constant on all logits of a position means nothing, and a teacher reached through an API gives log-probabilities, so
both sides are brought into one gauge, mean zero over C:

    L_s = tokenmean 1/|C| sum_{v in C} ( (z_v - mean_C z) - (l_v - mean_C l) )^2

The papers name the method without its formula; token by token rather than rank by rank is our reading (rank by rank it
would be InfiFusion without the z-score). A position with fewer than two shared tokens counts with 0.
"""

from __future__ import annotations

import torch

from rayfuse.batch import Counts, FusionBatch
from rayfuse.config import MiniLogit
from rayfuse.losses import HeadOutput
from rayfuse.stages.distillation import distill, kept_tokens


def minilogit_loss(
    stage: MiniLogit, head: HeadOutput, batch: FusionBatch, totals: Counts
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """This micro-batch's share of the global batch's loss; `loss_mse/TEACHER` is L_s."""

    def distance(s: int) -> torch.Tensor:
        student_Pk, teacher_Pk, shared_Pk = kept_tokens(head, batch, s)
        count_P1 = shared_Pk.sum(1, keepdim=True).clamp_min(1)
        gap_Pk = (student_Pk - teacher_Pk) * shared_Pk
        centred_Pk = (gap_Pk - gap_Pk.sum(1, keepdim=True) / count_P1) * shared_Pk
        return (centred_Pk.square() / count_P1).sum(1)

    return distill(stage, head, batch, totals, "loss_mse", distance)
