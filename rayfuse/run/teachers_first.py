"""`serving.mode: first`: the teachers fill the signal store, give their memory back, and only then the student trains.

For people with a single node: teachers and student never need room at the same time. The teachers work together where
the cluster has room for a copy of each, otherwise in waves. What a stage reads afterwards are the same signals that it
would have been given online.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace

import ray
from ray.exceptions import RayTaskError
from rich.console import Console

from rayfuse import cluster
from rayfuse.cluster.failures import own_errors
from rayfuse.errors import RayfuseError
from rayfuse.prepare.tasks import fill_unit
from rayfuse.prepare.units import unit_order
from rayfuse.student.job import BLOCK, StageJob
from rayfuse.teachers.identity import IdentifiedTeacher, live
from rayfuse.teachers.serving import applications


def fill(job: StageJob, console: Console) -> None:
    """Put the signals of every unit that the stage will read into the store, and retire the teachers.

    Raises:
        RayfuseError: a teacher cannot answer, or not this input.
    """
    # In the order in which the student will ask, each unit once.
    units = list(dict.fromkeys(unit_order(job.units, job.steps * job.units_per_step, job.config.seed)))
    room = ray.cluster_resources()
    for wave in waves(job.spec.teachers, room.get("CPU", 0.0), room.get("GPU", 0.0)):
        names = ", ".join(teacher.name for teacher in wave)
        with applications.borrowed(live(wave), job.config.signals.k, "fill"):
            stats = _fill(replace(job, spec=replace(job.spec, teachers=wave)), units)
        forwarded = sum(value for name, value in stats.items() if name.startswith("forwarded/"))
        stored = sum(value for name, value in stats.items() if name.startswith("stored/"))
        console.print(
            f"{job.name}: {names} filled the store ({forwarded:,.0f} texts scored, {stored:,.0f} found there)",
            highlight=False,
        )
        applications.retire(live(wave))


def waves(teachers: Sequence[IdentifiedTeacher], cpus: float, gpus: float) -> Iterator[tuple[IdentifiedTeacher, ...]]:
    """Teachers that fit side by side, one copy each, in order; one that fits nowhere is a wave of its own."""
    wave: list[IdentifiedTeacher] = []
    for candidate in teachers:
        together = [one.teacher for one in [*wave, candidate]]
        fits = sum(t.cpus for t in together) <= cpus and sum(t.gpus for t in together) <= gpus
        if wave and not fits:
            yield tuple(wave)
            wave = []
        wave.append(candidate)
    if wave:
        yield tuple(wave)


def _fill(job: StageJob, units: Sequence[int]) -> dict[str, float]:
    """Have all units scored, a bounded number of them at a time; what it took, summed."""
    task = fill_unit.options(**cluster.fill_task())
    at_once = 4 * sum(one.teacher.replicas.max for one in job.spec.teachers) + job.config.student.prefetch
    stats: dict[str, float] = {}
    pending: deque[ray.ObjectRef] = deque()
    todo = iter(units)
    while True:
        while len(pending) < at_once and (unit := next(todo, None)) is not None:
            block, index = divmod(unit, BLOCK)
            pending.append(task.remote(job.spec, job.blocks[block], index))
        if not pending:
            return stats
        try:
            with own_errors():
                unit_stats = ray.get(pending.popleft())
        except (RayfuseError, RayTaskError):
            for waiting in pending:
                ray.cancel(waiting)
            raise
        for name, value in unit_stats.items():
            stats[name] = stats.get(name, 0.0) + value
