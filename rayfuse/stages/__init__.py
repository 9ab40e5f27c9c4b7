"""The stages of a run: one file per method, each reading like the method section of its paper.

A method is a loss on one micro-batch: `loss(stage, head, batch, totals) -> (loss, parts)`. The denominators in `totals`
are those of the GLOBAL batch (all workers, all micro-steps), so that the losses of the micro-batches simply add up and
the result does not depend on how the batch was cut.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from rayfuse.batch import Counts, FusionBatch
from rayfuse.config import Config, Stage
from rayfuse.losses import HeadOutput
from rayfuse.stages.infifusion import infifusion_loss
from rayfuse.stages.infigfusion import infigfusion_loss
from rayfuse.stages.sft import sft_loss

Parts = dict[str, torch.Tensor]
Loss = Callable[[Any, HeadOutput, FusionBatch, Counts], tuple[torch.Tensor, Parts]]


@dataclass(frozen=True)
class Method:
    """A stage's method.

    Attributes:
        loss: its loss on one micro-batch.
        uses_teachers: whether prepare tasks must bring the teachers' signals.
        uses_graphs: whether they must bring the features of the teachers' logit graphs too.
    """

    loss: Loss
    uses_teachers: bool
    uses_graphs: bool = False


METHODS: dict[str, Method] = {
    "sft": Method(sft_loss, uses_teachers=False),
    "infifusion": Method(infifusion_loss, uses_teachers=True),
    "infigfusion": Method(infigfusion_loss, uses_teachers=True, uses_graphs=True),
}


def ranks(config: Config, stage: Stage) -> int:
    """K of a stage: how many ranks of each position its loss compares."""
    return getattr(stage, "k", None) or config.signals.k
