"""Supervised fine-tuning, the baseline and the first term of every fusion loss.

L_SFT = tokenmean -log P_student(y_t | x, y_<t)          over the responses, end-of-turn included
"""

from __future__ import annotations

import torch

from rayfuse.batch import Counts, FusionBatch
from rayfuse.config import Stage
from rayfuse.losses import HeadOutput


def sft_loss(
    stage: Stage, head: HeadOutput, batch: FusionBatch, totals: Counts
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """This micro-batch's share of the global batch's mean cross-entropy (nats per token)."""
    loss = head.loss_ce * (head.count / totals.tokens)
    return loss, {"loss_sft": loss.detach()}
