"""Teachers: one file per backend, all with the same contract, and the Ray Serve deployment that hosts them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from rayfuse.config import Teacher
from rayfuse.data import Sample
from rayfuse.signals import TopKSignals


class Backend(Protocol):
    """What a backend is: a loaded teacher that scores whole units."""

    vocab_size: int
    """Ids in its signals are below this."""

    def score(self, samples: Sequence[Sample]) -> list[TopKSignals]:
        """The teacher's signals for each sample, in order. The same samples give the same bits."""


def _transformers(teacher: Teacher, k: int) -> Backend:
    from rayfuse.teachers.transformers import TransformersTeacher

    return TransformersTeacher(teacher, k)


BACKENDS: dict[str, Callable[[Teacher, int], Backend]] = {"transformers": _transformers}
"""Backend by its name in the configuration; each is imported when it is used."""
