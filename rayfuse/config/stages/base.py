"""The stages of a run: what all have, and the methods of the papers; one class per method, with its knobs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from rayfuse.config.section import Section
from rayfuse.config.teachers import Teacher
from rayfuse.metrics.definitions import SFT_PART, Metric

LAM_TEXT = "weight of the distillation term; 1 - lam is that of the SFT term"
"""What lam is. By its default the term pulls about a fifth as strongly as SFT where a stage starts, unless a
measurement or the method's authors say better (docs/methods.md)."""
Weighting = Literal["uniform", "consensus"]
TeacherWeights = Annotated[
    Weighting,
    Field(
        description="how much a teacher counts in a sample: uniform: as its `weight` says, in all alike; consensus: "
        "times the probability that it is right on this prompt"
    ),
]
SampleWeights = Annotated[
    Weighting,
    Field(
        description="how much a sample counts: uniform: all alike; consensus: by the probability that its response is "
        "right"
    ),
]
"""By the consensus: the one that the run makes or, without the section `consensus`, the columns `teacher_weights` and
`sample_weight` of the rows, as an earlier run's consensus/choices.jsonl has them."""
BetaOfAdam = Annotated[float, Field(ge=0, lt=1)]


class Stage(Section):
    """What every stage has: how long, how fast, from which model.

    A method is a subclass with its knobs and the facts below, and a loss of the same name in rayfuse/stages. Whoever
    prepares, trains, reports or describes a stage reads them here.
    """

    uses_teachers: ClassVar[bool] = False
    """Whether the stage learns from the teachers' answers."""
    sides: ClassVar[tuple[str, ...]] = ()
    """Names of the responses to one prompt that the loss compares, which are the keys of a row of `preferences`; none
    where the stage learns from `data`."""
    targets: ClassVar[tuple[str, ...]] = ()
    """Kinds of targets that prepare tasks make of the teachers' signals, in this order; see prepare/targets.py."""
    lse_gradient: ClassVar[bool] = False
    """Whether the loss compares probabilities among the whole vocabulary, and so needs the gradient of the log-sum-exp;
    that costs a third more in the head."""
    weighs_teachers: ClassVar[bool] = True
    """Whether the loss has a place for the teachers' weights (teachers[].weight)."""
    partial: ClassVar[bool] = False
    """Whether the loss renormalises where a teacher was dropped in a sample (serving.on_missing: drop)."""
    writes: ClassVar[bool] = False
    """Whether the student writes texts that it learns from: the teachers must be there to read them while it trains."""
    parts: ClassVar[tuple[Metric, ...]] = (SFT_PART,)
    """What the loss and the targets measure besides the loss itself, in the order of the report's panels."""

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
    betas: tuple[BetaOfAdam, BetaOfAdam] = Field(
        (0.9, 0.999), description="AdamW's decay of the mean gradient, and of its mean square"
    )
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

    @property
    def pairwise(self) -> Merge | None:
        """How the students become one model, where the stage trains one per teacher; None: it trains one student."""
        return None

    @property
    def meets_by(self) -> Literal["bytes", "position"]:
        """How the positions of teacher and student are paired."""
        return "bytes"

    @property
    def weighs(self) -> tuple[str, ...]:
        """What the consensus weighs in the loss: "teachers", "samples", both or nothing."""
        return ()

    @property
    def weighs_text(self) -> str:
        """The same in words, to follow a sentence on the loss; empty where it weighs nothing."""
        said = {
            "teachers": "a teacher counts by the probability that it is right on the prompt",
            "samples": "a sample counts by the probability that its response is right",
        }
        return "".join(f"; {said[kind]}" for kind in self.weighs)

    def kept(self, signals_k: int) -> int | None:
        """How many ranks of each position the loss compares; None where it weighs whole responses.

        Args:
            signals_k: how many the teachers give (signals.k).
        """
        return None if "responses" in self.targets else signals_k

    def ranks_fault(self, signals_k: int) -> str:
        """What is wrong with how many ranks the loss compares, and what to do; empty where nothing is."""
        return ""

    def writing_fault(self, max_length: int) -> str:
        """What is wrong with the texts that the student writes, and what to do; empty where it writes none.

        Args:
            max_length: of prompt and response together (data.max_length).
        """
        return ""

    def weights_fault(self, teachers: Sequence[Teacher]) -> str:
        """What is wrong with the teachers' weights, and what to do; empty where they are used, or all equal."""
        if not self.uses_teachers or self.weighs_teachers or len({teacher.weight for teacher in teachers}) < 2:
            return ""
        weights = ", ".join(f"{teacher.name} {teacher.weight:g}" for teacher in teachers)
        return f"the teachers' weights ({weights}) have no place in its loss; give all the same weight"

    def text(self, signals_k: int) -> str:
        """What the stage does, in Markdown: the method's sentence in the model card. See `kept` for the argument."""
        raise NotImplementedError


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


class ResponseStage(Stage):
    """What the stages share that learn responses of `data`."""

    sample_weights: SampleWeights = "uniform"

    @property
    def weighs(self) -> tuple[str, ...]:
        """What the consensus weighs in the loss: "teachers", "samples", both or nothing."""
        return ("samples",) if self.sample_weights == "consensus" else ()


class TeacherStage(ResponseStage):
    """What the stages share that learn from the teachers' answers to `data`: (1 - lam) SFT + lam a distance to them.

    One student learns from all teachers; or (`merge` given: pairwise) a student from each teacher, and they are merged.
    """

    uses_teachers: ClassVar[bool] = True

    lam: float = Field(0.5, ge=0, le=1, description=LAM_TEXT)
    balance: float | None = Field(
        None,
        gt=0,
        description="in place of lam: the norm of the distillation term's gradient over that of SFT's, both with their "
        "weights; lam is chosen so at the stage's start, on its first batch, and stays",
    )
    merge: Merge | None = Field(None, description="pairwise form: train one student per teacher, and merge them so")
    teacher_weights: TeacherWeights = "uniform"

    @model_validator(mode="after")
    def _lam_or_balance(self) -> TeacherStage:
        default = type(self).model_fields["lam"].default
        if self.balance is not None and self.lam != default:
            raise ValueError(f"give lam or balance, not both (lam={self.lam:g}, balance={self.balance:g})")
        return self

    @property
    def weighs(self) -> tuple[str, ...]:
        """What the consensus weighs in the loss: "teachers", "samples", both or nothing."""
        return (*(("teachers",) if self.teacher_weights == "consensus" else ()), *super().weighs)

    @property
    def pairwise(self) -> Merge | None:
        """How the students become one model, where the stage trains one per teacher; None: it trains one student."""
        return self.merge

    @property
    def weights_text(self) -> tuple[str, str, str]:
        """The weights of SFT and of the distance, in words, and how they are chosen."""
        if self.balance is None:
            return f"{1 - self.lam:g}", f"{self.lam:g}", self.weighs_text
        return (
            "(1 - lam)",
            "lam",
            f" (lam such that the second gradient is {self.balance:g} times the first at the start){self.weighs_text}",
        )


class Distillation(TeacherStage):
    """What the stages that compare top-K logits share."""

    targets: ClassVar[tuple[str, ...]] = ("ranks",)
    few: ClassVar[str] = ""
    """Why the loss says nothing with fewer ranks than `least_k`."""

    k: int | None = Field(None, ge=2, description="ranks compared; default and upper limit: signals.k")
    alignment: Literal["bytes", "position"] = Field(
        "bytes", description="pair positions that have read equally many bytes, or simply t with t (ablation)"
    )
    over_teachers: Literal["sum", "mean"] = Field("sum", description="how the teachers' distances are added up")

    @property
    def meets_by(self) -> Literal["bytes", "position"]:
        """How the positions of teacher and student are paired."""
        return self.alignment

    def kept(self, signals_k: int) -> int:
        """How many ranks of each position the loss compares."""
        return self.k or signals_k

    @property
    def least_k(self) -> int:
        """The fewest ranks with which the loss depends on what the models say."""
        return 2

    def ranks_fault(self, signals_k: int) -> str:
        """What is wrong with how many ranks the loss compares, and what to do; empty where nothing is."""
        kept = self.kept(signals_k)
        key = "k" if self.k is not None else "signals.k"
        if kept > signals_k:
            return f"k {kept} is more than signals.k {signals_k}"
        if kept < self.least_k:
            return f"{key} {kept} is too few: {self.few}, so that the distance is zero; use {self.least_k} or more"
        return ""

    @model_validator(mode="after")
    def _enough_ranks(self) -> Distillation:
        fault = self.ranks_fault(self.k) if self.k is not None else ""
        if fault:
            raise ValueError(fault)
        return self

    def mixture_text(self, distance: str) -> str:
        """The mixture of SFT and a distance to the teachers, in words."""
        meet = (
            "both tokenizers have read equally many bytes" if self.alignment == "bytes" else "the position is the same"
        )
        sft, lam, chosen = self.weights_text
        return (
            f"{sft} x cross-entropy + {lam} x the {self.over_teachers} over the teachers of the {distance}, wherever "
            f"{meet}{chosen}"
        )


class RankDistillation(Distillation):
    """What the stages of the papers share: rank i of the student is compared with rank i of the teacher."""

    few: ClassVar[str] = "two z-scored values are always +0.71 and -0.71, and a softmax of one is 1"

    standardized: bool = Field(True, description="z-score the K logits of each position (no temperature needed)")
    space: Literal["logits", "probs"] = Field("logits", description="compare logits, or their softmax over the kept K")

    @property
    def least_k(self) -> int:
        """The fewest ranks with which the loss depends on what the models say."""
        return 3 if self.standardized else 2

    @property
    def needs_one_gauge(self) -> bool:
        """Whether the compared values change where a constant is added to all logits of a position."""
        return not self.standardized and self.space == "logits"

    @property
    def lse_gradient(self) -> bool:  # type: ignore[override]
        """Whether the loss needs the gradient of the log-sum-exp: where log-probabilities are compared."""
        return self.needs_one_gauge

    def ranks_text(self, signals_k: int) -> str:
        """The mixture of SFT and the distance between ranks, in words."""
        kind = "z-scored " if self.standardized else ""
        return self.mixture_text(
            f"distance between the {kind}top-{self.kept(signals_k)} {self.space} of teacher and student, rank by rank"
        )


def distance_part(name: str, unit: str) -> Metric:
    """A distance to each teacher, as the report shows it; the loss returns it as `name/TEACHER`."""
    return Metric(name, "distance to each teacher", unit, per_teacher=True)
