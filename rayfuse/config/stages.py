"""The stages of a run: what all have, and the methods of the papers; one class per method, with its knobs."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from rayfuse.config.section import Section, named


class Stage(Section):
    """What every stage has: how long, how fast, from which model."""

    uses_teachers: ClassVar[bool] = False
    """Whether the stage learns from the teachers' answers."""
    sides: ClassVar[tuple[str, ...]] = ()
    """Names of the responses to one prompt that the loss compares, which are the keys of a row of `preferences`; none
    where the stage learns from `data`."""

    method: str
    start_from: Literal["previous", "pivot"] = Field(
        "previous", description="the model this stage starts from: the stage before it, or the untouched student"
    )
    steps: int | None = Field(None, ge=1, description="optimiser steps; give this or epochs")
    epochs: float | None = Field(None, gt=0, description="passes over the data; default 1 when steps is not given")
    batch_size: int = Field(64, ge=1, description="samples per optimiser step over all workers (whole units)")
    learning_rate: float = Field(1e-5, gt=0, description="peak of the cosine schedule")
    warmup: float = Field(0.1, ge=0, lt=1, description="share of the steps with linear warm-up")
    weight_decay: float = Field(0.0, ge=0, description="AdamW weight decay (matrices only)")
    grad_clip: float = Field(1.0, gt=0, description="largest gradient norm")
    save_every: int = Field(200, ge=1, description="steps between checkpoints")
    keep: int = Field(2, ge=1, description="checkpoints kept per stage")

    @model_validator(mode="after")
    def _one_length(self) -> Stage:
        if self.steps is not None and self.epochs is not None:
            raise ValueError(f"give steps or epochs, not both (steps={self.steps}, epochs={self.epochs})")
        return self

    @property
    def uses_preferences(self) -> bool:
        """Whether it learns from `preferences` instead of `data`; batch_size then counts prompts, not responses."""
        return bool(self.sides)


class SFT(Stage):
    """Supervised fine-tuning: cross-entropy on the responses."""

    method: Literal["sft"] = "sft"


class Merge(Section):
    """How the students of a pairwise stage, one per teacher, become one model."""

    method: Literal["task_arithmetic", "ties", "sce"] = Field(description="formula of the merge")
    density: float | None = Field(
        None, gt=0, le=1, description="share of each tensor's elements kept by ties (default 0.2) and sce (0.1)"
    )
    scale: float = Field(1.0, gt=0, description="factor on the merged difference to the model the stage starts from")
    parallel: int | None = Field(
        None, ge=1, description="students trained at a time; default: as many as the cluster has room for"
    )


PairwiseMerge = Annotated[Merge, BeforeValidator(lambda value: named(value, "method"))]
"""A merge in a configuration: a formula's name, or a section."""


class TeacherStage(Stage):
    """What the stages share that learn from the teachers' answers to `data`.

    One student learns from all teachers; or (`merge` given: pairwise) a student from each teacher, and they are merged.
    """

    uses_teachers: ClassVar[bool] = True

    merge: PairwiseMerge | None = Field(
        None, description="pairwise form: train one student per teacher, and merge them so"
    )


class Distillation(TeacherStage):
    """What the stages that compare top-K logits share."""

    lam: float = Field(0.5, ge=0, le=1, description="weight of the distillation term; 1 - lam is that of the SFT term")
    k: int | None = Field(None, ge=2, description="ranks compared; default and upper limit: signals.k")
    alignment: Literal["bytes", "position"] = Field(
        "bytes", description="pair positions that have read equally many bytes, or simply t with t (ablation)"
    )
    over_teachers: Literal["sum", "mean"] = Field("sum", description="how the teachers' distances are added up")


class RankDistillation(Distillation):
    """What the stages of the papers share: rank i of the student is compared with rank i of the teacher."""

    standardized: bool = Field(True, description="z-score the K logits of each position (no temperature needed)")
    space: Literal["logits", "probs"] = Field("logits", description="compare logits, or their softmax over the kept K")


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


class Preference(Stage):
    """What the stages on preference pairs share. They read `preferences`, and batch_size counts pairs."""

    sides: ClassVar[tuple[str, ...]] = ("chosen", "rejected")

    learning_rate: float = Field(1e-7, gt=0, description="peak of the cosine schedule")
    beta: float = Field(2.5, gt=0, description="strength of the preference: 2.5 with length_norm, 0.1 without")
    length_norm: bool = Field(True, description="divide a response's log-probability by the model's own token count")


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

    @model_validator(mode="after")
    def _pairs_are_chosen_for(self) -> FusedPreference:
        if self.fuse_per == "pair" and self.rule != "max_margin":
            raise ValueError(f"fuse_per: pair chooses a teacher, which rule {self.rule!r} does not; use max_margin")
        return self


class InfiFPO(FusedPreference):
    """InfiFPO (arXiv 2505.13878): preference optimisation against the teachers' fused sequence probabilities."""

    uses_teachers: ClassVar[bool] = True

    method: Literal["infifpo"] = "infifpo"
    variant: Literal["fpo", "ipo"] = Field("fpo", description="log-sigmoid loss, or IPO's squared one")


class DPO(Preference):
    """DPO (arXiv 2305.18290), length-normalised unless told otherwise: the reference is the stage's first model."""

    method: Literal["dpo"] = "dpo"
    variant: Literal["fpo", "ipo"] = Field("fpo", description="DPO's log-sigmoid loss, or IPO's squared one")


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
