"""Every method that a stage can have, by its name, and a stage as it stands in a configuration."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rayfuse.config.baselines import KL, ULD, FuseChat, FuseLLM, MiniLogit, ULDHybrid
from rayfuse.config.section import by_method
from rayfuse.config.stages import DPO, SFT, WRPO, ByteKD, InfiFPO, InfiFusion, InfiGFusion, Stage, Trust
from rayfuse.config.transport import MultiLevelOT, Sinkhorn, WassersteinKL

STAGES: dict[str, type[Stage]] = {
    "sft": SFT,
    "infifusion": InfiFusion,
    "infigfusion": InfiGFusion,
    "bytekd": ByteKD,
    "trust": Trust,
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
