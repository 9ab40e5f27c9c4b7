"""Teachers on Ray Serve: replicas that score whole units, and the client that asks them.

The application of a teacher is named by its fingerprint: two runs on one cluster share it, and what a killed run leaves
behind scales to zero by itself. Scaling, health checks, draining and routing are Serve's.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from ray import serve
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException

from rayfuse import resources
from rayfuse.config import Teacher
from rayfuse.data import Sample
from rayfuse.errors import RayfuseError, TeacherError
from rayfuse.signals import TopKSignals, pack, unpack
from rayfuse.teachers import BACKENDS

log = logging.getLogger(__name__)
CALL_TIMEOUT_S = 30.0
"""How long one wait for an answer lasts before the teacher's state is looked at; the call itself goes on."""


class TeacherReplica:
    """One copy of a teacher. The model runs in one thread, so that health checks are answered meanwhile."""

    def __init__(self, teacher: Teacher, k: int) -> None:
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="teacher")
        # Everything touches torch in the same thread: its number of threads is set per thread pool.
        self.backend = self.thread.submit(BACKENDS[teacher.backend], teacher, k).result()

    async def score(self, samples: Sequence[Sample]) -> dict[str, np.ndarray]:
        """The packed signals of a unit. Idempotent."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self.thread, lambda: pack(self.backend.score(samples)))


def application_name(fingerprint: str) -> str:
    """The Serve application of a teacher."""
    return f"rayfuse-teacher-{fingerprint}"


def deploy(teachers: Sequence[tuple[Teacher, str]], k: int) -> None:
    """Make sure that each (teacher, fingerprint) has its Serve application; existing ones are left as they are."""
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    serve.start(proxy_location="Disabled", logging_config={"log_level": "WARNING", "enable_access_log": False})
    running = serve.status().applications
    for teacher, fingerprint in teachers:
        name = application_name(fingerprint)
        if name in running and running[name].status in ("RUNNING", "DEPLOYING"):
            continue
        options = resources.teacher_deployment(teacher)
        deployment: Any = serve.deployment(TeacherReplica, name=teacher.name, **options)  # type: ignore[call-overload]
        serve.run(deployment.bind(teacher, k), name=name, route_prefix=None)


def delete(fingerprints: Sequence[str]) -> None:
    """Remove teachers' applications at once (otherwise they scale to zero by themselves)."""
    for fingerprint in fingerprints:
        serve.delete(application_name(fingerprint), _blocking=False)


class TeacherClient:
    """Asks one teacher, and asks again when a replica dies; usable from any task or actor of the cluster."""

    def __init__(self, teacher: Teacher, fingerprint: str) -> None:
        self.teacher = teacher
        self.name = application_name(fingerprint)
        self.handle = serve.get_app_handle(self.name)

    def score(self, samples: Sequence[Sample]) -> Callable[[], list[TopKSignals]]:
        """Send a unit; the returned function waits for its signals.

        Raises (when waiting):
            RayfuseError: the teacher refuses this input; asking again would not help.
            TeacherError: the teacher cannot start, or did not answer for `patience_s` seconds.
        """
        response = self._send(samples)

        def wait() -> list[TopKSignals]:
            nonlocal response
            deadline = time.monotonic() + self.teacher.patience_s
            attempt = 0
            while True:
                try:
                    return unpack(response.result(timeout_s=CALL_TIMEOUT_S))
                except TimeoutError:
                    self._raise_if_failed()
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
                    if isinstance(error, DeploymentUnavailableError):
                        self._raise_if_failed()
                    cause, lost = error, True
                if time.monotonic() > deadline:
                    raise TeacherError(
                        f"teacher {self.teacher.name} did not answer for {self.teacher.patience_s:.0f} s "
                        f"(patience_s); last: {type(cause).__name__}: {cause}"
                    ) from cause
                if lost:
                    attempt += 1
                    if not isinstance(cause, BackPressureError):
                        log.warning("teacher %s: asking again after %s", self.teacher.name, type(cause).__name__)
                    time.sleep(min(5.0, 0.1 * 2**attempt) * random.uniform(0.5, 1.0))
                    response = self._send(samples)

        return wait

    def _send(self, samples: Sequence[Sample]) -> Any:
        return self.handle.score.remote(list(samples))

    def _raise_if_failed(self) -> None:
        """Turn a deployment that cannot start into an error that says why, instead of waiting for it."""
        application = serve.status().applications.get(self.name)
        if application is None:
            raise TeacherError(f"teacher {self.teacher.name} was removed from the cluster ({self.name})")
        for deployment in application.deployments.values():
            if deployment.status in ("DEPLOY_FAILED", "UNHEALTHY"):
                raise TeacherError(
                    f"teacher {self.teacher.name} ({self.teacher.model}) cannot start: {deployment.message[-2000:]}"
                )
