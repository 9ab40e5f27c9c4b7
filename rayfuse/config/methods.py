"""Every method that a stage can have, by its name, and a stage as it stands in a configuration."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Union

from pydantic import BeforeValidator, Discriminator, Tag

from rayfuse.config.baselines import KL, ULD, FuseChat, FuseLLM, MiniLogit, ULDHybrid
from rayfuse.config.section import named
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


def _stage_tag(value: Any) -> str:
    method = value.get("method") if isinstance(value, dict) else getattr(value, "method", None)
    return method if isinstance(method, str) else ""


def _as_stage(value: Any) -> Any:
    value = named(value, "method")
    if isinstance(value, dict) and "method" not in value:
        raise ValueError(f"method is missing; there are: {', '.join(STAGES)}")
    if _stage_tag(value) not in STAGES:
        method = value["method"] if isinstance(value, dict) else value
        raise ValueError(f"unknown method {method!r}; there are: {', '.join(STAGES)}")
    return value


if TYPE_CHECKING:
    AnyStage = Stage
else:
    AnyStage = Annotated[
        Union[tuple(Annotated[stage, Tag(name)] for name, stage in STAGES.items())],  # noqa: UP007 (a tuple of types)
        Discriminator(_stage_tag),
        BeforeValidator(_as_stage),
    ]
    """A stage in a configuration: a method's name, or a section with `method` and its knobs."""
