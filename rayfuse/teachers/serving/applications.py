"""Teachers on Ray Serve: replicas that score and answer whole units, and the client that asks them.

The application of a teacher is named by its fingerprint: two runs on one cluster share it, and what a killed run leaves
behind scales to zero by itself. Scaling, health checks, draining and routing are Serve's; how many copies there may be
follows from what all its users wish (see scaling).
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from ray import serve

from rayfuse import cluster
from rayfuse.errors import TeacherError
from rayfuse.teachers.identity import IdentifiedTeacher
from rayfuse.teachers.serving import wishes
from rayfuse.teachers.serving.replica import TeacherReplica


def application_name(teacher: IdentifiedTeacher) -> str:
    """The Serve application of a teacher: runs that ask for the same answers by the same means share it."""
    means = teacher.teacher.model_dump_json(include={"cpus", "gpus", "batch_tokens", "runtime_env", "vllm"})
    return f"rayfuse-teacher-{teacher.fingerprint}-{hashlib.sha256(means.encode()).hexdigest()[:8]}"


def start_serve() -> None:
    """Serve without HTTP, quietly; nothing happens where it runs already."""
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    serve.start(proxy_location="Disabled", logging_config={"log_level": "WARNING", "enable_access_log": False})


def deploy(teachers: Sequence[IdentifiedTeacher], k: int, *, holder: str | None = None) -> None:
    """Make sure that each teacher has its Serve application, with room for the copies it asks for.

    An application that is there is used as it is, only its bounds are widened if need be.

    Args:
        teachers: live ones; without any, Serve is not started.
        k: kept logits.
        holder: who wishes for `teacher.replicas`; default: this run, for as long as it lives.
    """
    if not teachers:
        return
    start_serve()
    running = serve.status().applications
    for identified in teachers:
        teacher, name = identified.teacher, application_name(identified)
        wishes.wish(name, holder or wishes.this_run(), teacher.replicas.min, teacher.replicas.max)
        if name in running and running[name].status in ("RUNNING", "DEPLOYING"):
            wishes.resize(name)
            continue
        options = cluster.teacher_deployment(teacher, wishes.bounds(wishes.wishes(name)))
        deployment: Any = serve.deployment(TeacherReplica, name=teacher.name, **options)  # type: ignore[call-overload]
        try:
            serve.run(deployment.bind(teacher, k), name=name, route_prefix=None)
        except RuntimeError as error:  # with replicas.min >= 1 Serve waits for the first replica
            raise TeacherError(f"teacher {teacher.name} ({teacher.model}) cannot start: {error}") from error


@contextmanager
def borrowed(teachers: Sequence[IdentifiedTeacher], k: int, purpose: str = "train") -> Iterator[None]:
    """The teachers for as long as the block runs; what only it wished for then scales to zero when idle."""
    if not teachers:
        yield
        return
    holder = wishes.this_run(purpose)
    deploy(teachers, k, holder=holder)
    try:
        yield
    finally:
        # Where the cluster is gone too, what ended the block is the error to be seen.
        with suppress(Exception):
            for name in map(application_name, teachers):
                wishes.withdraw(name, holder)
                wishes.resize(name)


def retire(teachers: Sequence[IdentifiedTeacher]) -> None:
    """Remove, and wait until their memory is free, those of the teachers that nobody wishes for."""
    if not teachers:
        return
    running = serve.status().applications
    for name in map(application_name, teachers):
        if name in running and not wishes.wishes(name):
            with suppress(TimeoutError):  # it goes on ending, and who needs its room waits for that
                serve.delete(name)


def delete(teachers: Sequence[IdentifiedTeacher]) -> None:
    """Remove the teachers' applications at once; otherwise they scale to zero by themselves."""
    if not teachers:
        return
    running = serve.status().applications
    for name in map(application_name, teachers):
        wishes.forget(name)
        if name in running:
            serve.delete(name, _blocking=False)
