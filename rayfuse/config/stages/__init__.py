"""Every method that a stage can have, by its name, and a stage as it stands in a configuration."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rayfuse.config.section import by_method
from rayfuse.config.stages.base import Stage
from rayfuse.config.stages.baselines import (
    KL,
    ULD,
    FuseChat,
    FuseLLM,
    MiniLogit,
    MultiLevelOT,
    Sinkhorn,
    ULDHybrid,
    WassersteinKL,
)
from rayfuse.config.stages.fusion import SFT, ByteKD, InfiFusion, InfiGFusion, Trust
from rayfuse.config.stages.on_policy import OnPolicy
from rayfuse.config.stages.preferences import DPO, WRPO, InfiFPO

STAGES: dict[str, type[Stage]] = {
    "sft": SFT,
    "infifusion": InfiFusion,
    "infigfusion": InfiGFusion,
    "bytekd": ByteKD,
    "trust": Trust,
    "onpolicy": OnPolicy,
    "infifpo": InfiFPO,
    "dpo": DPO,
    "wrpo": WRPO,
    "kl": KL,
    "minilogit": MiniLogit,
    "uld": ULD,
    "uld_hybrid": ULDHybrid,
    "fusellm": FuseLLM,
    "fusechat": FuseChat,
    "multilevelot": MultiLevelOT,
    "sinkhorn": Sinkhorn,
    "wasserstein_kl": WassersteinKL,
}


if TYPE_CHECKING:
    AnyStage = Stage
else:
    AnyStage = by_method(STAGES)
    """A stage in a configuration: a method's name, or a section with `method` and its knobs."""
