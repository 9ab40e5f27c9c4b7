"""The group of student workers on Ray Train, and its restarts."""

from __future__ import annotations

import logging
import uuid
from pathlib import Path

from ray.exceptions import RayTaskError
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from rayfuse import cluster
from rayfuse.errors import RayfuseError, StudentError
from rayfuse.student.engines import ENGINES
from rayfuse.student.job import StageJob
from rayfuse.student.loop import train_in_group

log = logging.getLogger(__name__)


def train_group(job: StageJob) -> Path:
    """Train one stage with `student.workers` workers; returns the folder of its model.

    A group that lost a worker or node is started again under a new name, up to `student.max_failures` times, and goes
    on from its last checkpoint. Ray Train's own restarts are not used: they cannot tell a lost node from an error that
    would only come again, and can give up while a group starts, whatever they were told.

    Raises:
        RayfuseError: the workers failed on an input or a setting, or by a fault in the code; trying again would not
            help.
        StudentError: the group failed more than `max_failures` times.
    """
    student = job.config.student
    for attempt in range(student.max_failures + 1):
        trainer = TorchTrainer(
            train_in_group,
            train_loop_config={"job": job},
            scaling_config=ScalingConfig(**cluster.student_group(student)),
            torch_config=TorchConfig(backend=ENGINES[student.engine].backend(student)),
            run_config=RunConfig(
                name=f"{job.name.replace('/', '-')}-{uuid.uuid4().hex[:8]}",
                storage_path=str(Path(job.config.output).resolve() / "ray"),
                failure_config=FailureConfig(max_failures=0),
            ),
        )
        try:
            trainer.fit()
        except Exception as error:
            cause = _our_cause(error)
            if cause is not None:
                raise cause from error
            if attempt == student.max_failures:
                raise StudentError(
                    f"stage {job.name} failed {attempt + 1} times (student.max_failures); its checkpoints are "
                    f"in {job.folder}; last: {type(error).__name__}: {error}"
                ) from error
            log.warning("stage %s: the student group failed, starting again: %s", job.name, error)
            continue
        return job.folder / "model"
    raise AssertionError("unreachable")


def _our_cause(error: BaseException | None) -> RayfuseError | None:
    """The RayfuseError inside what Ray Train raised, if that is what ended the workers."""
    seen: set[int] = set()
    queue = [error]
    while queue:
        item = queue.pop()
        if item is None or id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, RayfuseError) and not isinstance(item, RayTaskError):
            return item
        if isinstance(item, RayTaskError):
            queue.append(item.cause)
        worker_failures = getattr(item, "worker_failures", None) or {}
        queue += [*worker_failures.values(), item.__cause__, item.__context__]
    return None
