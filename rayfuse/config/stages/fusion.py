"""Stages that learn from responses: SFT, the papers' distillation stages, and ours."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from rayfuse.config.stages.base import (
    LAM_TEXT,
    RankDistillation,
    ResponseStage,
    TeacherStage,
    TeacherWeights,
    distance_part,
)
from rayfuse.metrics.definitions import SFT_PART, Metric

ULD_PART = distance_part("loss_uld", "sum over the top-K ranks")
MIXTURE_PARTS = (
    SFT_PART,
    Metric("loss_kl", "distance to the teachers' mixture", "KL, nats per token"),
    Metric("label_mass", "teachers' share for the written token", "mean probability"),
)
"""What a cross-entropy against a mixture of the written text and the teachers' target measures."""


class SFT(ResponseStage):
    """Supervised fine-tuning: cross-entropy on the responses."""

    method: Literal["sft"] = "sft"

    def text(self, signals_k: int) -> str:
        """The method's sentence in the model card."""
        return f"`sft`: cross-entropy on the assistant's turns{self.weighs_text}."


class InfiFusion(RankDistillation):
    """InfiFusion (arXiv 2501.02795), unified or pairwise: the standardised top-K distance to the teachers."""

    partial: ClassVar[bool] = True
    parts: ClassVar[tuple[Metric, ...]] = (SFT_PART, ULD_PART)

    method: Literal["infifusion"] = "infifusion"
    lam: float = Field(0.03, ge=0, le=1, description=LAM_TEXT)

    def text(self, signals_k: int) -> str:
        """The method's sentence in the model card."""
        form = "pairwise" if self.merge else "unified"
        return (
            f"`infifusion` ({form} InfiFusion, [arXiv 2501.02795](https://arxiv.org/abs/2501.02795)): "
            f"{self.ranks_text(signals_k)}."
        )


class InfiGFusion(RankDistillation):
    """InfiGFusion (arXiv 2505.13893): InfiFusion plus a distance between graphs on the logits, in closed form."""

    targets: ClassVar[tuple[str, ...]] = ("ranks", "graphs")
    partial: ClassVar[bool] = True
    parts: ClassVar[tuple[Metric, ...]] = (
        SFT_PART,
        ULD_PART,
        Metric("loss_gld", "graph distance", "sum over the K nodes", per_teacher=True),
        Metric("gradient_ratio", "gradient of the graph distance", "times that of the rank distance", reduce="mean"),
        Metric("coupling_wait", "longest wait for couplings", "seconds per micro-step", reduce="max"),
    )

    method: Literal["infigfusion"] = "infigfusion"
    lam: float = Field(0.03, ge=0, le=1, description=LAM_TEXT)
    mode: Literal["closed", "exact"] = Field(
        "closed",
        description="graph distance: the sorted closed form, or Gromov-Wasserstein solved by POT (for small k)",
    )
    alpha: float = Field(1.0, ge=0, description="weight of the graph distance beside the rank distance")

    def text(self, signals_k: int) -> str:
        """The method's sentence in the model card."""
        distance = "closed-form" if self.mode == "closed" else "exact Gromov-Wasserstein"
        return (
            f"`infigfusion` (InfiGFusion, [arXiv 2505.13893](https://arxiv.org/abs/2505.13893)): "
            f"{self.ranks_text(signals_k)}, plus {self.alpha:g} x the {distance} distance between the graphs on "
            "their logits."
        )


class ByteKD(TeacherStage):
    """Byte-prefix distillation (ours): the teachers' probabilities carried onto the student's tokens, byte by byte."""

    targets: ClassVar[tuple[str, ...]] = ("ranks", "carried")
    partial: ClassVar[bool] = True
    parts: ClassVar[tuple[Metric, ...]] = MIXTURE_PARTS

    method: Literal["bytekd"] = "bytekd"
    lam: float = Field(
        0.5, ge=0, le=1, description="share of the teachers in the target; 1 - lam is the written text's"
    )
    width: int = Field(16, ge=2, description="student tokens kept per position in the teachers' target")
    temper: float = Field(1.0, ge=0, description="how strongly a teacher's likelihood of the response weighs; 0: equal")

    def text(self, signals_k: int) -> str:
        """The method's sentence in the model card."""
        sft, lam, chosen = self.weights_text
        return (
            f"`bytekd` (byte-prefix distillation): cross-entropy against {sft} x the written text + {lam} x the "
            f"teachers' top-{signals_k} probabilities, carried byte by byte onto the student's tokens{chosen}."
        )


class Trust(ResponseStage):
    """Trust-weighted fine-tuning (ours): a sample counts as much as its surest teacher believes its response."""

    uses_teachers: ClassVar[bool] = True
    targets: ClassVar[tuple[str, ...]] = ("responses",)
    parts: ClassVar[tuple[Metric, ...]] = (
        SFT_PART,
        Metric("trusted", "teachers' belief in the samples", "mean weight"),
    )

    method: Literal["trust"] = "trust"
    trust: float = Field(
        4.0,
        ge=0,
        description="how strongly belief counts: a sample's weight is the surest teacher's probability per token, to "
        "this power; 0 is sft",
    )
    teacher_weights: TeacherWeights = "uniform"

    @property
    def weighs(self) -> tuple[str, ...]:
        """What the consensus weighs in the loss: "teachers", "samples", both or nothing."""
        return (*(("teachers",) if self.teacher_weights == "consensus" else ()), *super().weighs)

    def text(self, signals_k: int) -> str:
        """The method's sentence in the model card."""
        return (
            "`trust` (trust-weighted fine-tuning): cross-entropy in which a sample counts by the probability per token "
            f"that its surest teacher gives to the response, to the power {self.trust:g}{self.weighs_text}."
        )
