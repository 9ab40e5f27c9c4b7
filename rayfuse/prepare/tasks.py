"""The Ray tasks of a unit: prepared for a student's micro-step, or its signals put into the store.

They are idempotent: whatever is lost is done again and gives the same bits.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import ray

from rayfuse.data.sample import Sample
from rayfuse.prepare.preparer import Preparer
from rayfuse.prepare.spec import PrepareSpec, Scorer
from rayfuse.teachers.identity import IdentifiedTeacher


@lru_cache(maxsize=8)
def preparer(spec: PrepareSpec) -> Preparer:
    """One preparer per process and stage: Ray reuses the processes of tasks, so tokenizers load once."""
    if not spec.teachers:
        return Preparer(spec, _no_teacher)
    from rayfuse.teachers.serving.client import TeacherClient
    from rayfuse.teachers.stored import StoreTeacher

    def ask(teacher: IdentifiedTeacher) -> Scorer:
        return TeacherClient(teacher) if teacher.live else StoreTeacher(teacher, spec.store)

    return Preparer(spec, ask)


def _no_teacher(teacher: IdentifiedTeacher) -> Scorer:
    raise AssertionError(f"a stage without teachers asked {teacher.name} ({teacher.fingerprint})")


@ray.remote
def prepare_unit(spec: PrepareSpec, units: list[list[Sample]], index: int, after: Any = None) -> Any:
    """The FusionBatch of unit `index` of a block of units.

    `after` is the batch of the same unit from the epoch before, where that is still in preparation: Ray waits for it,
    so that this task finds the teachers' answers in the store instead of asking again.
    """
    return preparer(spec)(units[index])


@ray.remote
def fill_unit(spec: PrepareSpec, units: list[list[Sample]], index: int) -> dict[str, float]:
    """The teachers' signals of unit `index` of a block, put into the store; what it took."""
    stats: dict[str, float] = {}
    preparer(spec).signals(units[index], stats)
    return stats
