"""Asking a teacher's replicas, and asking again where an answer was lost."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from ray import serve
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, RayServeException

from rayfuse.data.sample import Sample
from rayfuse.errors import RayfuseError, TeacherError, TeacherGoneError
from rayfuse.signals.codec import unpack
from rayfuse.signals.topk import TopKSignals
from rayfuse.teachers.identity import IdentifiedTeacher
from rayfuse.teachers.serving.applications import application_name

log = logging.getLogger(__name__)
T = TypeVar("T")

CALL_TIMEOUT_S = 30.0
"""How long one wait for an answer lasts before the teacher's state is looked at; the call itself goes on."""


LOST_AT_MOST = 5
"""A unit that took so many copies with it is not waited for beyond patience_s, even while copies run."""


class _Unsent:
    """Stands for the response to a call that could not be sent."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def result(self, timeout_s: float) -> Any:
        """Raise what went wrong."""
        raise self.error


class TeacherClient:
    """Asks one teacher, and asks again when a replica dies; usable from any task or actor of the cluster."""

    def __init__(self, teacher: IdentifiedTeacher) -> None:
        self.teacher = teacher.teacher
        self.name = application_name(teacher)
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
