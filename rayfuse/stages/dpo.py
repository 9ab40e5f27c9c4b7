"""DPO (arXiv 2305.18290), the baseline of InfiFPO: the reference is the model that the stage starts from.

u = beta [ (lp_policy(y_w) - lp_init(y_w)) - (lp_policy(y_l) - lp_init(y_l)) ]         L = pairmean -log sigmoid(u)
"""

from __future__ import annotations

import torch

from rayfuse.batch import Counts, FusionBatch
from rayfuse.config import DPO
from rayfuse.stages.preferences import of_model, of_policy, preference_loss


def dpo_loss(
    stage: DPO, logps_N: torch.Tensor, batch: FusionBatch, totals: Counts
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """This micro-batch's share of the mean over the pairs of the global batch."""
    initial = of_model(stage, batch.targets[-1], logps_N.device)
    return preference_loss(stage, of_policy(stage, logps_N, batch), initial, totals)
