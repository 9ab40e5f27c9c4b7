"""Supervised fine-tuning, the baseline and the first term of every fusion loss.

L_SFT = tokenmean v_b -log P_student(y_t | x, y_<t)      over the responses, end-of-turn included

v_b is 1, or how probably the response is right (sample_weights: consensus). The mean is over the tokens, not over their
weights: what is doubtful pulls less, and nothing else more.
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
    assert head.weighted == (batch.sample_weights is not None), "the engine left the samples' weights out"
    loss = head.loss_ce * (head.count / totals.tokens)
    return loss, {"loss_sft": loss.detach()}
