"""Stages that learn from responses: SFT, the papers' distillation stages, and ours."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from rayfuse.config.stages.base import RankDistillation, Stage, TeacherStage


class SFT(Stage):
    """Supervised fine-tuning: cross-entropy on the responses."""

    method: Literal["sft"] = "sft"


class InfiFusion(RankDistillation):
    """InfiFusion (arXiv 2501.02795), unified or pairwise: the standardised top-K distance to the teachers."""

    method: Literal["infifusion"] = "infifusion"


class InfiGFusion(RankDistillation):
    """InfiGFusion (arXiv 2505.13893): InfiFusion plus a distance between graphs on the logits, in closed form."""

    method: Literal["infigfusion"] = "infigfusion"
    mode: Literal["closed", "exact"] = Field(
        "closed",
        description="graph distance: the sorted closed form, or Gromov-Wasserstein solved by POT (for small k)",
    )
    alpha: float = Field(1.0, ge=0, description="weight of the graph distance beside the rank distance")


class ByteKD(TeacherStage):
    """Byte-prefix distillation (ours): the teachers' probabilities carried onto the student's tokens, byte by byte."""

    method: Literal["bytekd"] = "bytekd"
    lam: float = Field(
        0.5, ge=0, le=1, description="share of the teachers in the target; 1 - lam is the written text's"
    )
    width: int = Field(16, ge=2, description="student tokens kept per position in the teachers' target")
    temper: float = Field(1.0, ge=0, description="how strongly a teacher's likelihood of the response weighs; 0: equal")


class Trust(Stage):
    """Trust-weighted fine-tuning (ours): a sample counts as much as its surest teacher believes its response."""

    uses_teachers: ClassVar[bool] = True

    method: Literal["trust"] = "trust"
    trust: float = Field(
        4.0,
        ge=0,
        description="how strongly belief counts: a sample's weight is the surest teacher's probability per token, to "
        "this power; 0 is sft",
    )
