"""FuseLLM (Wan et al. 2024, arXiv 2401.10491), and FuseChat (arXiv 2408.07990), which is its pairwise form.

    MinED   the teacher's distributions are brought onto the student's positions by dynamic time warping over the edit
            distance of token strings, and onto its vocabulary by minimum edit distance; where a position finds no
            partner, the written token has all the mass                                           (see prepare/min_edit)
    MinCE   of the teachers, each sample takes the one with the lowest cross-entropy per token of its own on the
            response
    L       = (1 - lam) L_SFT + lam tokenmean - SUM_v q(v) log P_student(v)        lam = 0.1

FuseChat trains a student per teacher so, and merges them by SCE (`merge`). In both papers the pivot itself is one of
the candidates of MinCE: give it as a teacher to have that.
"""

from __future__ import annotations

import torch

from rayfuse.batch import Counts, FusionBatch
from rayfuse.config import FuseChat, FuseLLM
from rayfuse.losses import HeadOutput
from rayfuse.stages.mixed_target import mixed_target_loss


def fusellm_loss(
    stage: FuseLLM | FuseChat, head: HeadOutput, batch: FusionBatch, totals: Counts
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """This micro-batch's share of the global batch's loss; `loss_kl` is KL(q || student), nats per token."""
    return mixed_target_loss(stage, head, batch, totals)
