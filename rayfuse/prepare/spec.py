"""What a stage asks of its prepare tasks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from rayfuse.config import Model, Stage
from rayfuse.data.sample import Sample
from rayfuse.signals.topk import TopKSignals
from rayfuse.teachers.identity import IdentifiedTeacher


class Scorer(Protocol):
    """What a teacher looks like from here: send a unit, then wait for its signals."""

    def score(self, samples: Sequence[Sample]) -> Callable[[], list[TopKSignals]]:
        """Send; the returned function waits."""


@dataclass(frozen=True)
class PrepareSpec:
    """What a stage asks of its prepare tasks; small, hashable, the same for all units.

    Attributes:
        student: whose tokenizer and template the batch is in.
        teachers: those whose signals the stage uses; empty for SFT.
        store: URL of the signal store.
        k: ranks that the batch carries per teacher position.
        alignment: "bytes" or "position".
        max_length: student tokens; longer prompts are cut from the left.
        targets: kinds of targets that the batch carries, in the order in which they are made; see targets.TARGETS.
        stage: whose options the targets depend on, where they do.
        on_missing: "wait", "fail" or "drop", where a teacher is gone for longer than its patience.
    """

    student: Model
    teachers: tuple[IdentifiedTeacher, ...]
    store: str
    k: int | None
    alignment: str
    max_length: int
    targets: tuple[str, ...] = ("ranks",)
    stage: Stage | None = None
    on_missing: str = "fail"


INITIAL = "initial"
"""Name of the model that a stage on preferences starts from, among its teachers; it is never dropped."""
