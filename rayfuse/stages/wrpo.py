"""WRPO (arXiv 2412.03187; InfiFPO app. C): a teacher's best response and the pivot's own best, above the rejected one.

d(y) = lp_policy(y) - lp_ref(y)       y_ws best response of a teacher, y_wp best of the pivot, y_l the rejected one
u    = alpha beta d(y_ws) + (1 - alpha) beta d(y_wp) - beta d(y_l)
L    = promptmean -log sigmoid(u)

The reference is the model that the stage starts from, or the teachers fused as in infifpo (both chosen responses are
then clipped from below, the rejected one from above).
"""

from __future__ import annotations

import torch

from rayfuse.batch import Counts, FusionBatch
from rayfuse.config import WRPO
from rayfuse.losses import wrpo_loss
from rayfuse.stages.preferences import fuse_teachers, mean_over_prompts, of_model, of_policy


def wrpo_stage_loss(
    stage: WRPO, logps_N: torch.Tensor, batch: FusionBatch, totals: Counts
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """This micro-batch's share of the mean over the prompts of the global batch.

    The last of `batch.targets` is the model that the stage starts from; the others are the teachers, where asked for.
    `preferred` counts prompts whose two chosen responses, mixed by alpha, are likelier than the rejected one.
    """
    *teachers, initial = [of_model(stage, target, logps_N.device) for target in batch.targets]
    policy = of_policy(stage, logps_N, batch)
    weights = [target.weight for target in batch.targets[:-1]]
    reference = fuse_teachers(stage, teachers, initial, policy, weights) if stage.reference == "fused" else initial
    loss_P = wrpo_loss(
        *(policy[side] for side in stage.sides),
        *(reference[side] for side in stage.sides),
        alpha=stage.alpha,
        beta=stage.beta,
    )
    gains = {side: policy[side] - reference[side] for side in stage.sides}
    mixed = [stage.alpha * of["chosen"] + (1 - stage.alpha) * of["chosen_pivot"] for of in (policy, gains)]
    return mean_over_prompts(stage, loss_P, mixed[1] - gains["rejected"], mixed[0] > policy["rejected"], totals)
