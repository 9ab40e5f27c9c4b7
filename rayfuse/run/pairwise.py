"""Pairwise stages (InfiFusion_p, FuseChat): a student per teacher, trained side by side, then merged into one model.

Each student is a run of its own in `stages/NN-METHOD/TEACHER/`: its group of workers, its checkpoints, its model.
None waits for another, so one that fails takes nothing from the others, and a resumed run trains only what is missing.
"""

from __future__ import annotations

import logging
import shutil
import threading
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

from rayfuse import cluster
from rayfuse.config import Merge
from rayfuse.errors import RayfuseError, StudentError
from rayfuse.models.loading import model_folder
from rayfuse.models.merge import merge
from rayfuse.run.stage_job import with_one_teacher
from rayfuse.student.group import train_group
from rayfuse.student.job import StageJob
from rayfuse.student.result import commit_model, half_model, is_finished

log = logging.getLogger(__name__)


def train_pairwise(
    job: StageJob, how: Merge, train: Callable[[StageJob], Path] = train_group, at_once: int | None = None
) -> Path:
    """Train the students that are not there yet, as many at a time as there is room for, and merge all.

    Args:
        job: the stage, with all its teachers.
        how: the merge.
        train: trains one student and returns the folder of its model.
        at_once: how many at a time; default: what `how` says, otherwise what the cluster has room for.

    Returns:
        The folder of the stage's model.

    Raises:
        RayfuseError: a student cannot be trained, or the students cannot be merged; what was trained is kept.
    """
    jobs = [with_one_teacher(job, teacher) for teacher in job.spec.teachers]
    done = {alone.part: alone.folder / "model" for alone in jobs if is_finished(alone)}
    missing = [alone for alone in jobs if alone.part not in done]
    done |= side_by_side(missing, at_once or how.parallel or cluster.students_at_once(job.config), train)
    shutil.rmtree(half_model(job), ignore_errors=True)
    merge(
        model_folder(job.config.student, job.start),
        [done[alone.part] for alone in jobs],
        half_model(job),
        method=how.method,
        density=how.density,
        scale=how.scale,
        dtype="float32",
    )
    return commit_model(job)


def side_by_side(jobs: Sequence[StageJob], at_once: int, train: Callable[[StageJob], Path]) -> dict[str, Path]:
    """Train the jobs in order, `at_once` of them at a time. After a failure those in training end, and none begins.

    The threads only wait for Ray; they are daemons, so that Ctrl-C ends the run at once as it does with one student.

    Returns:
        The folder of each model, by the job's part.

    Raises:
        RayfuseError: the first failure, of its own type.
    """
    waiting, models, failed = deque(jobs), dict[str, Path](), list[tuple[StageJob, Exception]]()

    def lane() -> None:
        while waiting and not failed:
            try:
                job = waiting.popleft()
            except IndexError:  # another lane took the last one
                return
            try:
                models[job.part] = train(job)
            except Exception as error:  # told below, when the others are done
                failed.append((job, error))
                log.warning("student %s failed; what else is in training goes on: %s", job.name, error)

    lanes = min(at_once, len(jobs))
    if lanes == 1:
        lane()
    else:
        threads = [threading.Thread(target=lane, daemon=True) for _ in range(lanes)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if failed:
        job, error = failed[0]
        kept = f" ({', '.join(sorted(models))} trained and kept: --resume goes on from there)" if models else ""
        kind = type(error) if isinstance(error, RayfuseError) else StudentError
        raise kind(f"student {job.name} of the pairwise stage failed{kept}: {error}") from error
    return models
