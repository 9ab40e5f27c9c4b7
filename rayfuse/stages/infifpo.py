"""InfiFPO (arXiv 2505.13878): preference optimisation against the teachers' fused sequence probabilities.

lp_m(y) = (1/|y|_m) log M_m(y|x)       |y|_m tokens of y under model m's own tokenizer, end-of-turn counted   eq. 10
clip:     y_w: lp_i <- max(lp_i, lp_init)      y_l: lp_i <- min(lp_i, lp_init)                                eq. 11
lp_fu   = lp_{i*},  i* = argmax_i | exp(lp_i) - exp(lp_policy) |     (or a mean, or weighted by confidence)   eq. 12
u       = beta [ (lp_policy(y_w) - lp_fu(y_w)) - (lp_policy(y_l) - lp_fu(y_l)) ]
L       = pairmean -log sigmoid(u)                                                                            eq. 13
"""

from __future__ import annotations

import torch

from rayfuse.batch import Counts, FusionBatch
from rayfuse.config import InfiFPO
from rayfuse.stages.preferences import answered_sides, fuse_teachers, of_model, of_policy, preference_loss


def infifpo_loss(
    stage: InfiFPO, logps_N: torch.Tensor, batch: FusionBatch, totals: Counts
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """This micro-batch's share of the mean over the pairs of the global batch.

    The last of `batch.targets` is the model that the stage starts from; the others are the teachers.
    """
    *teachers, initial = [of_model(stage, target, logps_N.device) for target in batch.targets]
    policy = of_policy(stage, logps_N, batch)
    answered = answered_sides(stage, batch, logps_N.device)
    weights = [target.weight for target in batch.targets[:-1]]
    fused = fuse_teachers(stage, teachers, initial, policy, weights, answered)
    return preference_loss(stage, policy, fused, totals)
