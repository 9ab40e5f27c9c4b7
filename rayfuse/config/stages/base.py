"""The stages of a run: what all have, and the methods of the papers; one class per method, with its knobs."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from rayfuse.config.section import Section


class Stage(Section):
    """What every stage has: how long, how fast, from which model."""

    uses_teachers: ClassVar[bool] = False
    """Whether the stage learns from the teachers' answers."""
    sides: ClassVar[tuple[str, ...]] = ()
    """Names of the responses to one prompt that the loss compares, which are the keys of a row of `preferences`; none
    where the stage learns from `data`."""

    shorthand: ClassVar[str] = "method"

    method: str
    start_from: Literal["previous", "pivot"] = Field(
        "previous", description="the model this stage starts from: the stage before it, or the untouched student"
    )
    responses: Literal["data", "consensus"] | None = Field(
        None,
        description="what the stage learns from: the rows as they are, or the answers that `consensus` chose; default: "
        "consensus where the run has that section",
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


class Merge(Section):
    """How the students of a pairwise stage, one per teacher, become one model."""

    shorthand: ClassVar[str] = "method"

    method: Literal["task_arithmetic", "ties", "sce"] = Field(description="formula of the merge")
    density: float | None = Field(
        None, gt=0, le=1, description="share of each tensor's elements kept by ties (default 0.2) and sce (0.1)"
    )
    scale: float = Field(1.0, gt=0, description="factor on the merged difference to the model the stage starts from")
    parallel: int | None = Field(
        None, ge=1, description="students trained at a time; default: as many as the cluster has room for"
    )


class TeacherStage(Stage):
    """What the stages share that learn from the teachers' answers to `data`.

    One student learns from all teachers; or (`merge` given: pairwise) a student from each teacher, and they are merged.
    """

    uses_teachers: ClassVar[bool] = True

    merge: Merge | None = Field(None, description="pairwise form: train one student per teacher, and merge them so")


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
