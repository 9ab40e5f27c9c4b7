"""Teachers on Ray Serve: replicas that score and answer whole units, and the client that asks them.

The application of a teacher is named by its fingerprint: two runs on one cluster share it, and what a killed run leaves
behind scales to zero by itself. Scaling, health checks, draining and routing are Serve's; how many copies there may be
follows from what all its users wish (see scaling).
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import multiprocessing
import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any, NoReturn, TypeVar

import numpy as np
from ray import serve
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, RayServeException

from rayfuse import resources
from rayfuse.config import Teacher
from rayfuse.data import Sample
from rayfuse.errors import DeadEngineError, RayfuseError, TeacherError, TeacherGoneError
from rayfuse.signals import TopKSignals, pack, unpack
from rayfuse.teachers import BACKENDS, scaling

log = logging.getLogger(__name__)
T = TypeVar("T")
CALL_TIMEOUT_S = 30.0
"""How long one wait for an answer lasts before the teacher's state is looked at; the call itself goes on."""


LOST_AT_MOST = 5
"""A unit that took so many copies with it is not waited for beyond patience_s, even while copies run."""


class TeacherReplica:
    """One copy of a teacher. The model runs in one thread, so that health checks are answered meanwhile."""

    def __init__(self, teacher: Teacher, k: int) -> None:
        self.name = teacher.name
        self.broken = ""
        self.limit_s = teacher.unit_timeout_s
        self.since: dict[int, float] = {}
        self.application = serve.get_replica_context().app_name
        self.resizing: threading.Thread | None = None
        # A server elsewhere is waited for, not computed with: then several units are in flight at once.
        self.thread = ThreadPoolExecutor(4 if teacher.backend == "openai" else 1, thread_name_prefix="teacher")
        # Everything touches torch in the same thread: its number of threads is set per thread pool.
        self.backend = self.thread.submit(BACKENDS[teacher.backend], teacher, k).result()

    async def score(self, samples: Sequence[Sample]) -> dict[str, np.ndarray]:
        """The packed signals of a unit. Idempotent."""
        return await self._compute(lambda: pack(self.backend.score(samples)))

    async def generate(self, samples: Sequence[Sample], options: Mapping[str, Any]) -> list[str]:
        """An answer to each sample's prompt; `options` are the keyword arguments of Backend.generate. Idempotent."""
        return await self._compute(lambda: self.backend.generate(samples, **options))

    async def _compute(self, work: Callable[[], T]) -> T:
        """Run `work` in the model's thread, and tell faults of the device from others."""
        return await asyncio.get_running_loop().run_in_executor(self.thread, self._guarded, work)

    def _guarded(self, work: Callable[[], T]) -> T:
        import torch

        self.since[threading.get_ident()] = time.monotonic()
        try:
            return work()
        except torch.OutOfMemoryError as error:
            raise TeacherError(
                f"teacher {self.name} is out of memory: lower its batch_tokens, or data.unit_size. {error}"
            ) from error
        except DeadEngineError as error:
            self._leave(error)
        except torch.AcceleratorError as error:
            # After a fault of the device every later call of this process fails too: let Serve replace it.
            self.broken = str(error)
            raise
        finally:
            self.since.pop(threading.get_ident(), None)

    def check_health(self) -> None:
        """Called by Serve every few seconds; raises where this copy can answer no more, and is then replaced.

        Also the moment at which a copy finds out that the run that wanted it to stay has ended.
        """
        if self.broken:
            raise TeacherError(f"teacher {self.name}: the device failed: {self.broken}")
        if hasattr(self.backend, "check_health"):
            try:
                self.backend.check_health()
            except DeadEngineError as error:
                self._leave(error)
        longest = max((time.monotonic() - since for since in list(self.since.values())), default=0.0)
        if longest > self.limit_s:
            raise TeacherError(
                f"teacher {self.name}: a unit has been computing for more than {self.limit_s:.0f} s (unit_timeout_s)"
            )
        if self.resizing is None or not self.resizing.is_alive():
            self.resizing = threading.Thread(target=scaling.outlive, args=(self.application,), daemon=True)
            self.resizing.start()

    def __del__(self) -> None:
        """Called by Serve when it takes this copy away: an engine in processes of its own ends with it."""
        if hasattr(self, "backend") and hasattr(self.backend, "close"):
            self.backend.close()

    def _leave(self, error: DeadEngineError) -> NoReturn:
        """End this process at once, with what its engine left behind: Serve starts another, and callers ask again.

        Raising would keep a copy that can answer nothing until Serve has noticed, and sys.exit only ends the thread.
        """
        log.error("%s", error)
        for child in multiprocessing.active_children():
            child.kill()
        os._exit(1)


def application_name(teacher: Teacher, fingerprint: str) -> str:
    """The Serve application of a teacher: runs that ask for the same answers by the same means share it."""
    means = teacher.model_dump_json(include={"cpus", "gpus", "batch_tokens", "runtime_env", "vllm"})
    return f"rayfuse-teacher-{fingerprint}-{hashlib.sha256(means.encode()).hexdigest()[:8]}"


def live(teachers: Sequence[tuple[Teacher, str]]) -> list[tuple[Teacher, str]]:
    """Those that are more than their stored signals: the ones that are deployed."""
    return [(teacher, fingerprint) for teacher, fingerprint in teachers if teacher.stored is None]


def start_serve() -> None:
    """Serve without HTTP, quietly; nothing happens where it runs already."""
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    serve.start(proxy_location="Disabled", logging_config={"log_level": "WARNING", "enable_access_log": False})


def deploy(teachers: Sequence[tuple[Teacher, str]], k: int, *, holder: str | None = None) -> None:
    """Make sure that each (teacher, fingerprint) has its Serve application, with room for the copies it asks for.

    An application that is there is used as it is, only its bounds are widened if need be. Teachers that are only their
    stored signals need none, and no Serve where there are no others.

    Args:
        teachers: (teacher, fingerprint).
        k: kept logits.
        holder: who wishes for `teacher.replicas`; default: this run, for as long as it lives.
    """
    teachers = live(teachers)
    if not teachers:
        return
    start_serve()
    running = serve.status().applications
    for teacher, fingerprint in teachers:
        name = application_name(teacher, fingerprint)
        scaling.wish(name, holder or scaling.this_run(), teacher.replicas.min, teacher.replicas.max)
        if name in running and running[name].status in ("RUNNING", "DEPLOYING"):
            scaling.resize(name)
            continue
        options = resources.teacher_deployment(teacher, scaling.bounds(scaling.wishes(name)))
        deployment: Any = serve.deployment(TeacherReplica, name=teacher.name, **options)  # type: ignore[call-overload]
        try:
            serve.run(deployment.bind(teacher, k), name=name, route_prefix=None)
        except RuntimeError as error:  # with replicas.min >= 1 Serve waits for the first replica
            raise TeacherError(f"teacher {teacher.name} ({teacher.model}) cannot start: {error}") from error


@contextmanager
def borrowed(teachers: Sequence[tuple[Teacher, str]], k: int, purpose: str = "train") -> Iterator[None]:
    """The teachers for as long as the block runs; what only it wished for then scales to zero when idle."""
    teachers = live(teachers)
    if not teachers:
        yield
        return
    holder = scaling.this_run(purpose)
    deploy(teachers, k, holder=holder)
    try:
        yield
    finally:
        # Where the cluster is gone too, what ended the block is the error to be seen.
        with suppress(Exception):
            for teacher, fingerprint in teachers:
                name = application_name(teacher, fingerprint)
                scaling.withdraw(name, holder)
                scaling.resize(name)


def retire(teachers: Sequence[tuple[Teacher, str]]) -> None:
    """Remove, and wait until their memory is free, those of the teachers that nobody wishes for."""
    teachers = live(teachers)
    if not teachers:
        return
    running = serve.status().applications
    for teacher, fingerprint in teachers:
        name = application_name(teacher, fingerprint)
        if name in running and not scaling.wishes(name):
            with suppress(TimeoutError):  # it goes on ending, and who needs its room waits for that
                serve.delete(name)


def delete(teachers: Sequence[tuple[Teacher, str]]) -> None:
    """Remove the applications of (teacher, fingerprint) at once; otherwise they scale to zero by themselves."""
    teachers = live(teachers)
    if not teachers:
        return
    running = serve.status().applications
    for teacher, fingerprint in teachers:
        name = application_name(teacher, fingerprint)
        scaling.forget(name)
        if name in running:
            serve.delete(name, _blocking=False)


class _Unsent:
    """Stands for the response to a call that could not be sent."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def result(self, timeout_s: float) -> Any:
        """Raise what went wrong."""
        raise self.error


class TeacherClient:
    """Asks one teacher, and asks again when a replica dies; usable from any task or actor of the cluster."""

    def __init__(self, teacher: Teacher, fingerprint: str) -> None:
        self.teacher = teacher
        self.name = application_name(teacher, fingerprint)
        self._handle: Any = None

    def score(self, samples: Sequence[Sample]) -> Callable[[], list[TopKSignals]]:
        """Send a unit; the returned function waits for its signals.

        Raises (when waiting):
            RayfuseError: the teacher refuses this input; asking again would not help.
            TeacherGoneError: the teacher cannot start, or did not answer for `patience_s` seconds.
            TeacherError: it failed on this unit.
        """
        return self._ask(unpack, "score", list(samples))

    def generate(
        self,
        samples: Sequence[Sample],
        *,
        max_new_tokens: int,
        batch_size: int,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> Callable[[], list[str]]:
        """Send a unit of prompts; the returned function waits for the answers. See Backend.generate; raises as score.

        The call's arguments fix the answers, whichever replica gives them.
        """
        options = {
            "max_new_tokens": max_new_tokens,
            "batch_size": batch_size,
            "temperature": temperature,
            "seed": seed,
        }
        return self._ask(list, "generate", list(samples), options)

    def _ask(self, read: Callable[[Any], T], method: str, *arguments: Any) -> Callable[[], T]:
        """Call the replicas' `method`; the returned function waits for what it gives, sends again, and reads it."""
        response = self._send(method, arguments)

        def wait() -> T:
            nonlocal response
            deadline = time.monotonic() + self.teacher.patience_s
            attempt = 0
            while True:
                try:
                    return read(response.result(timeout_s=CALL_TIMEOUT_S))
                except TimeoutError:
                    if (
                        self._has_replicas() and attempt < LOST_AT_MOST
                    ):  # it works: this unit is only queued behind others
                        deadline = time.monotonic() + self.teacher.patience_s
                    cause: Exception = TimeoutError(f"no answer within {self.teacher.patience_s:.0f} s")
                    lost = False
                except RayTaskError as error:
                    if isinstance(error.cause, RayfuseError):
                        raise error.cause from error
                    raise TeacherError(f"teacher {self.teacher.name} failed on a unit: {error}") from error
                except RayfuseError:
                    raise
                except (RayActorError, RayServeException, RayError, ConnectionError) as error:
                    # A replica died or is being replaced; the call is idempotent.
                    if isinstance(error, RayServeException) and not isinstance(error, BackPressureError):
                        self._has_replicas()
                    cause, lost = error, True
                if time.monotonic() > deadline:
                    raise TeacherGoneError(
                        f"teacher {self.teacher.name} did not answer for {self.teacher.patience_s:.0f} s "
                        f"(patience_s); last: {type(cause).__name__}: {cause}"
                    ) from cause
                if lost:
                    attempt += 1
                    if not isinstance(cause, BackPressureError):
                        log.warning("teacher %s: asking again after %s", self.teacher.name, type(cause).__name__)
                    time.sleep(min(5.0, 0.1 * 2**attempt) * random.uniform(0.5, 1.0))
                    response = self._send(method, arguments)

        return wait

    def _send(self, method: str, arguments: Sequence[Any]) -> Any:
        try:
            self._handle = self._handle or serve.get_app_handle(self.name)
            return getattr(self._handle, method).remote(*arguments)
        except RayServeException as error:  # no such application: found out when it is waited for
            return _Unsent(error)

    def _has_replicas(self) -> bool:
        """Whether a replica is running.

        Raises:
            TeacherGoneError: the deployment cannot start, with the reason, instead of waiting for it; or it is gone.
        """
        application = serve.status().applications.get(self.name)
        if application is None:
            raise TeacherGoneError(f"teacher {self.teacher.name} was removed from the cluster ({self.name})")
        for deployment in application.deployments.values():
            # A copy that died is replaced, however long the new one's engine takes to start.
            dead = deployment.status == "UNHEALTHY" and "health check failed" in deployment.message
            if deployment.status in ("DEPLOY_FAILED", "UNHEALTHY") and not dead:
                raise TeacherGoneError(
                    f"teacher {self.teacher.name} ({self.teacher.model}) cannot start: {deployment.message[-2000:]}"
                )
        states: list[Any] = [deployment.replica_states for deployment in application.deployments.values()]
        return any(of_deployment.get("RUNNING", 0) > 0 for of_deployment in states)
