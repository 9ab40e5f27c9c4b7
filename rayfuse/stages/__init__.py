"""The stages of a run: one file per method, each reading like the method section of its paper.

A method is a loss on one micro-batch: `loss(stage, output, batch, totals) -> (loss, parts)`, where `output` is what the
student says about it: its fused head's output or, for preferences, the log-probabilities of its tokens. The
denominators in `totals` are those of the GLOBAL batch (all workers, all micro-steps), so that the losses of the
micro-batches simply add up and the result does not depend on how the batch was cut.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from rayfuse.batch import Counts, FusionBatch
from rayfuse.config import Config, Stage
from rayfuse.stages.bytekd import bytekd_loss
from rayfuse.stages.dpo import dpo_loss
from rayfuse.stages.fusellm import fusellm_loss
from rayfuse.stages.infifpo import infifpo_loss
from rayfuse.stages.infifusion import infifusion_loss
from rayfuse.stages.infigfusion import infigfusion_loss
from rayfuse.stages.kl import kl_loss
from rayfuse.stages.minilogit import minilogit_loss
from rayfuse.stages.multilevelot import multilevelot_loss
from rayfuse.stages.sft import sft_loss
from rayfuse.stages.sinkhorn import sinkhorn_loss
from rayfuse.stages.trust import trust_loss
from rayfuse.stages.uld import uld_original_loss
from rayfuse.stages.uld_hybrid import uld_hybrid_loss
from rayfuse.stages.wasserstein_kl import wasserstein_kl_loss
from rayfuse.stages.wrpo import wrpo_stage_loss

Parts = dict[str, torch.Tensor]
Loss = Callable[[Any, Any, FusionBatch, Counts], tuple[torch.Tensor, Parts]]


@dataclass(frozen=True)
class Method:
    """A stage's method.

    On preferences, the batch's samples are the stage's `sides` of one prompt after another (chosen, rejected, chosen,
    ...), the student's output is log-probabilities, and the last target is the stage's first model.

    Attributes:
        loss: its loss on one micro-batch.
        targets: kinds of targets that its prepare tasks make of the teachers' signals, see rayfuse/prepare/targets.py.
        lse_gradient: whether it compares probabilities among the whole vocabulary, and so needs the gradient of the
            log-sum-exp; that costs a third more in the head.
        partial: whether the loss renormalises where a teacher was dropped in a sample (serving.on_missing: drop).
    """

    loss: Loss
    targets: tuple[str, ...] = ("ranks",)
    lse_gradient: bool = False
    partial: bool = False


METHODS: dict[str, Method] = {
    "sft": Method(sft_loss),
    "infifusion": Method(infifusion_loss, partial=True),
    "infigfusion": Method(infigfusion_loss, targets=("ranks", "graphs"), partial=True),
    "bytekd": Method(bytekd_loss, targets=("ranks", "carried"), partial=True),
    "trust": Method(trust_loss, targets=("responses",)),
    "infifpo": Method(infifpo_loss, targets=("responses",), partial=True),
    "dpo": Method(dpo_loss, targets=("responses",)),
    "kl": Method(kl_loss, targets=("ranks", "tokens")),
    "minilogit": Method(minilogit_loss, targets=("ranks", "tokens")),
    "uld": Method(uld_original_loss, lse_gradient=True),
    "uld_hybrid": Method(uld_hybrid_loss, targets=("ranks", "tokens", "unmatched"), lse_gradient=True),
    "fusellm": Method(fusellm_loss, targets=("mined",), partial=True),
    "fusechat": Method(fusellm_loss, targets=("mined",), partial=True),
    "multilevelot": Method(multilevelot_loss, targets=("ranks", "teacher_ids")),
    "sinkhorn": Method(sinkhorn_loss),
    "wasserstein_kl": Method(wasserstein_kl_loss),
    "wrpo": Method(wrpo_stage_loss, targets=("responses",)),
}


def ranks(config: Config, stage: Stage) -> int | None:
    """K of a stage: how many ranks of each position its loss compares; None where it weighs whole responses."""
    if METHODS[stage.method].targets == ("responses",):
        return None
    return getattr(stage, "k", None) or config.signals.k
