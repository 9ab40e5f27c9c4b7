"""ULD, the original (Boizard et al. 2024, arXiv 2402.12030): probabilities sorted and compared rank by rank.

    L_s = tokenmean sum_i | p_(i) - q_(i) |       p, q: sorted probabilities of student and teacher, the shorter filled
                                                  with zeros; position t with position t (the original's eq. 2)
    L   = L_SFT + 1.5 L_s                         with lam 0.6 0.4 L_SFT + 0.6 L_s: the same but for the factor 0.4

It differs from `infifusion` with `standardized: false, space: probs` in that these are probabilities among the whole
vocabulary, not among the K kept: of p and q the K largest are compared, the rest is left out; with K = V it is the
original. The student's probabilities exp(z - lse) are differentiated through the log-sum-exp too.
"""

from __future__ import annotations

import torch

from rayfuse.batch import Counts, FusionBatch
from rayfuse.config import ULD
from rayfuse.losses import HeadOutput
from rayfuse.stages.distillation import distill
from rayfuse.stages.tensors import on_device


def uld_original_loss(
    stage: ULD, head: HeadOutput, batch: FusionBatch, totals: Counts
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """This micro-batch's share of the global batch's loss; `loss_uld/TEACHER` is L_s. Needs head.lse's gradient."""

    def distance(s: int) -> torch.Tensor:
        target = batch.targets[s]
        rows_P = on_device(target.rows, head.topk.device)
        student_Pk = (head.topk[rows_P] - head.lse[rows_P, None]).exp()
        teacher_Pk = on_device(target.logps, head.topk.device).float().exp()
        return (student_Pk - teacher_Pk).abs().sum(1)

    return distill(stage, head, batch, totals, "loss_uld", distance)
