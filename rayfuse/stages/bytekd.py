"""Byte-prefix distillation (ours): cross-entropy against a mixture of the written text and what the teachers expected.

    q_s(v)  = teacher s's top-K probabilities as bytes, each carried to the longest student token that is a prefix of it
    w_s     ~ v_s P_s(response)                            how well each teacher foresaw the response as a whole, times
                                                           how much it counts (teachers[].weight)
    t       = (1 - lam) onehot(y) + lam SUM_s w_s q_s      one sparse target per position, over the student's own ids
    L       = tokenmean - SUM_v t(v) log P_student(v)

Rank-based distillation passes on how sure a teacher is; this passes on of what. It costs no second pass over the
vocabulary: with z the student's logits and q = SUM_s w_s q_s,

    - SUM_v t(v) log P(v)  =  - log P(y)  +  lam ( z_y - SUM_v q(v) z_v ),

and the second term is over the few ids of q only. See carry for q.
"""

from __future__ import annotations

import torch

from rayfuse.batch import Counts, FusionBatch
from rayfuse.config import ByteKD
from rayfuse.losses import HeadOutput
from rayfuse.stages.mixed_target import mixed_target_loss


def bytekd_loss(
    stage: ByteKD, head: HeadOutput, batch: FusionBatch, totals: Counts
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """This micro-batch's share of the global batch's loss; `loss_kl` is KL(q || student), nats per token."""
    return mixed_target_loss(stage, head, batch, totals)
