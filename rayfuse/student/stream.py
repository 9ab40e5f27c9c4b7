"""The stream of prepared batches that one worker consumes, in order."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import ray

from rayfuse import cluster
from rayfuse.batch import FusionBatch
from rayfuse.prepare.tasks import prepare_unit
from rayfuse.prepare.units import share_out, unit_order
from rayfuse.student.job import BLOCK, StageJob


class UnitStream:
    """The batches of one worker, in order, a bounded number of them in preparation.

    Attributes:
        waited: seconds spent waiting for a batch, since it was last read.
    """

    def __init__(self, job: StageJob, units: Iterable[int]) -> None:
        self.job = job
        self.todo = iter(units)
        self.task = prepare_unit.options(**cluster.prepare_task())
        self.pending: deque[tuple[int, Any]] = deque()
        self.waited = 0.0
        for _ in range(job.config.student.prefetch):
            self._submit()

    def _submit(self) -> None:
        unit = next(self.todo, None)
        if unit is not None:
            block, index = divmod(unit, BLOCK)
            before = next((ref for other, ref in self.pending if other == unit), None)
            self.pending.append((unit, self.task.remote(self.job.spec, self.job.blocks[block], index, before)))

    def take(self, count: int) -> list[FusionBatch]:
        """The next `count` batches."""
        batches = []
        for _ in range(count):
            begun = time.perf_counter()
            batches.append(ray.get(self.pending.popleft()[1]))
            self.waited += time.perf_counter() - begun
            self._submit()
        return batches


def units_of(job: StageJob, rank: int, world: int, done: int) -> Iterator[int]:
    """The units of a worker after `done` steps, in order."""
    count = job.units_per_step
    order = unit_order(job.units, job.steps * count, job.config.seed)
    for start in range(done * count, len(order), count):
        yield from share_out(order[start : start + count], job.sizes, world)[rank]
