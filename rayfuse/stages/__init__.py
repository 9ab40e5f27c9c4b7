"""The stages of a run: one file per method, each reading like the method section of its paper.

A method is a loss on one micro-batch: `loss(stage, output, batch, totals) -> (loss, parts)`, where `output` is what the
student says about it: its fused head's output or, for preferences, the log-probabilities of its tokens. The
denominators in `totals` are those of the GLOBAL batch (all workers, all micro-steps), so that the losses of the
micro-batches simply add up and the result does not depend on how the batch was cut.

On preferences, the batch's samples are the stage's `sides` of one prompt after another (chosen, rejected, chosen, ...),
the student's output is log-probabilities, and the last target is the stage's first model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from rayfuse.batch import Counts, FusionBatch
from rayfuse.stages.bytekd import bytekd_loss
from rayfuse.stages.dpo import dpo_loss
from rayfuse.stages.fusellm import fusellm_loss
from rayfuse.stages.infifpo import infifpo_loss
from rayfuse.stages.infifusion import infifusion_loss
from rayfuse.stages.infigfusion import infigfusion_loss
from rayfuse.stages.kl import kl_loss
from rayfuse.stages.minilogit import minilogit_loss
from rayfuse.stages.multilevelot import multilevelot_loss
from rayfuse.stages.on_policy import on_policy_loss
from rayfuse.stages.sft import sft_loss
from rayfuse.stages.sinkhorn import sinkhorn_loss
from rayfuse.stages.trust import trust_loss
from rayfuse.stages.uld import uld_original_loss
from rayfuse.stages.uld_hybrid import uld_hybrid_loss
from rayfuse.stages.wasserstein_kl import wasserstein_kl_loss
from rayfuse.stages.wrpo import wrpo_stage_loss

Parts = dict[str, torch.Tensor]
Loss = Callable[[Any, Any, FusionBatch, Counts], tuple[torch.Tensor, Parts]]


METHODS: dict[str, Loss] = {
    "sft": sft_loss,
    "infifusion": infifusion_loss,
    "infigfusion": infigfusion_loss,
    "bytekd": bytekd_loss,
    "trust": trust_loss,
    "onpolicy": on_policy_loss,
    "infifpo": infifpo_loss,
    "dpo": dpo_loss,
    "kl": kl_loss,
    "minilogit": minilogit_loss,
    "uld": uld_original_loss,
    "uld_hybrid": uld_hybrid_loss,
    "fusellm": fusellm_loss,
    "fusechat": fusellm_loss,
    "multilevelot": multilevelot_loss,
    "sinkhorn": sinkhorn_loss,
    "wasserstein_kl": wasserstein_kl_loss,
    "wrpo": wrpo_stage_loss,
}
"""The loss of each method by its name. What else a method says of itself is in its configuration class."""
