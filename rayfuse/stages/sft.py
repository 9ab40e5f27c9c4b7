"""Supervised fine-tuning, the baseline and the first term of every fusion loss.

L_SFT = tokenmean -log P_student(y_t | x, y_<t)          over the responses, end-of-turn included
"""

from __future__ import annotations

import numpy as np
import torch

from rayfuse.batch import FusionBatch
from rayfuse.config import SFT
from rayfuse.losses import HeadOutput


def sft_loss(
    stage: SFT, head: HeadOutput, batch: FusionBatch, totals: np.ndarray
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """This micro-batch's share of the global batch's mean cross-entropy (nats per token)."""
    loss = head.loss_ce * (head.count / totals[0])
    return loss, {"loss_sft": loss.detach()}
