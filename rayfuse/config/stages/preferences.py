"""Stages that learn from preference pairs."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from rayfuse.config.stages.base import Stage
from rayfuse.metrics.definitions import Metric


class Preference(Stage):
    """What the stages on preference pairs share. They read `preferences`, and batch_size counts pairs."""

    sides: ClassVar[tuple[str, ...]] = ("chosen", "rejected")
    targets: ClassVar[tuple[str, ...]] = ("responses",)
    parts: ClassVar[tuple[Metric, ...]] = (
        Metric("margin", "margin", "beta x (chosen - rejected)"),
        Metric("preferred", "chosen more likely than rejected", "share of pairs"),
    )

    learning_rate: float = Field(1e-7, gt=0, description="peak of the cosine schedule")
    beta: float = Field(2.5, gt=0, description="strength of the preference: 2.5 with length_norm, 0.1 without")
    length_norm: bool = Field(True, description="divide a response's log-probability by the model's own token count")

    def loss_text(self, loss: str) -> str:
        """The loss on pairs, in words; `loss` is its name."""
        norm = "length-normalised" if self.length_norm else "summed"
        return f"{loss} loss with beta {self.beta:g} on {norm} log-probabilities of preference pairs"


class FusedPreference(Preference):
    """How the stages against fused teachers fuse them."""

    rule: Literal["max_margin", "mean", "confidence"] = Field("max_margin", description="how teachers are fused")
    clip: bool = Field(True, description="bound each teacher by the initial model: above on rejected, below on chosen")
    margin_from: Literal["policy", "initial"] = Field(
        "policy", description="max_margin measures from the current policy, or from the model the stage starts from"
    )
    fuse_per: Literal["response", "pair"] = Field(
        "response",
        description="max_margin chooses a teacher for each response, or one for all responses to a prompt: that whose "
        "margins add up to most",
    )

    @property
    def weighs_teachers(self) -> bool:  # type: ignore[override]
        """Whether the fusion has a place for the teachers' weights: where the winner takes all it has none."""
        return self.rule != "max_margin"

    def fused_text(self) -> str:
        """How the teachers are fused, in words."""
        clip = ", clipped by the model that the stage starts from" if self.clip else ""
        return f"the teachers fused by {self.rule} per {self.fuse_per}{clip}"

    @model_validator(mode="after")
    def _pairs_are_chosen_for(self) -> FusedPreference:
        if self.fuse_per == "pair" and self.rule != "max_margin":
            raise ValueError(f"fuse_per: pair chooses a teacher, which rule {self.rule!r} does not; use max_margin")
        return self


class InfiFPO(FusedPreference):
    """InfiFPO (arXiv 2505.13878): preference optimisation against the teachers' fused sequence probabilities."""

    uses_teachers: ClassVar[bool] = True
    partial: ClassVar[bool] = True

    method: Literal["infifpo"] = "infifpo"
    variant: Literal["fpo", "ipo"] = Field("fpo", description="log-sigmoid loss, or IPO's squared one")

    def text(self, signals_k: int) -> str:
        """The method's sentence in the model card."""
        return (
            f"`infifpo` (InfiFPO, [arXiv 2505.13878](https://arxiv.org/abs/2505.13878)): "
            f"{self.loss_text(self.variant)}, against {self.fused_text()}."
        )


class DPO(Preference):
    """DPO (arXiv 2305.18290), length-normalised unless told otherwise: the reference is the stage's first model."""

    method: Literal["dpo"] = "dpo"
    variant: Literal["fpo", "ipo"] = Field("fpo", description="DPO's log-sigmoid loss, or IPO's squared one")

    def text(self, signals_k: int) -> str:
        """The method's sentence in the model card."""
        return (
            f"`dpo` (DPO, [arXiv 2305.18290](https://arxiv.org/abs/2305.18290)): {self.loss_text(self.variant)}, "
            "against the model that the stage starts from."
        )


class WRPO(FusedPreference):
    """WRPO (arXiv 2412.03187): the best response of a teacher and the best of the pivot, each above the rejected one.

    Rows of `preferences` have `chosen_pivot` besides `chosen` and `rejected`; `rayfuse prefer` writes them.
    """

    sides: ClassVar[tuple[str, ...]] = ("chosen", "chosen_pivot", "rejected")

    method: Literal["wrpo"] = "wrpo"
    alpha: float = Field(
        0.5, ge=0, le=1, description="how much the teacher's response counts; 1 - alpha is the share of the pivot's own"
    )
    reference: Literal["initial", "fused"] = Field(
        "initial", description="compare with the model the stage starts from, or with the teachers fused as in infifpo"
    )

    @property
    def uses_teachers(self) -> bool:  # type: ignore[override]
        """Whether the stage learns from the teachers' answers: only where they are the reference."""
        return self.reference == "fused"

    def text(self, signals_k: int) -> str:
        """The method's sentence in the model card."""
        reference = self.fused_text() if self.reference == "fused" else "the model that the stage starts from"
        return (
            f"`wrpo` (WRPO, [arXiv 2412.03187](https://arxiv.org/abs/2412.03187)): {self.loss_text('log-sigmoid')}"
            f", {self.alpha:g} x a teacher's response + {1 - self.alpha:g} x the pivot's own, against {reference}."
        )
