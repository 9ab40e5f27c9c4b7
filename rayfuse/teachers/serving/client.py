"""Asking a teacher's replicas, and asking again where an answer was lost."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, RayServeException

from rayfuse.cluster.failures import own_errors
from rayfuse.data.sample import Sample
from rayfuse.errors import TeacherError, TeacherGoneError
from rayfuse.signals.codec import unpack
from rayfuse.signals.topk import TopKSignals
from rayfuse.teachers.identity import IdentifiedTeacher
from rayfuse.teachers.serving.applications import application_name

log = logging.getLogger(__name__)
T = TypeVar("T")

CALL_TIMEOUT_S = 30.0
"""How long one wait for an answer lasts before the teacher's state is looked at; the call itself continues."""
LOST_AT_MOST = 5
"""A unit that took so many copies with it is not waited for beyond patience_s, even while copies run."""
FIRST_PAUSE_S = 0.2
LONGEST_PAUSE_S = 5.0


class Target(Protocol):
    """Whom a call asks.

    Attributes:
        name: of the teacher, for messages.
        patience_s: seconds without an answer, and without a copy at work, after which it counts as gone.
    """

    @property
    def name(self) -> str: ...

    @property
    def patience_s(self) -> float: ...

    def send(self) -> Any:
        """Send the call; the response has `result(timeout_s)`."""

    def has_replicas(self) -> bool:
        """Whether a copy is running; raises TeacherGoneError where none can start."""


@dataclass(frozen=True)
class Answer:
    """The call is done."""

    value: Any


@dataclass(frozen=True)
class Waiting:
    """No answer yet; the call is still on its way, and a copy is at work on it or on what is queued before it."""

    at_work: bool


@dataclass(frozen=True)
class Lost:
    """The call will never be answered: its copy died or is being replaced, or refused it for now."""

    cause: Exception


class Call:
    """Asks until there is an answer, as long as the teacher lives. The calls are idempotent.

    Args:
        target: whom.
        clock, sleep: of the time module; a test has its own.
    """

    def __init__(
        self,
        target: Target,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.target = target
        self.clock, self.sleep = clock, sleep
        self.lost = 0
        self.response = target.send()

    def wait(self) -> Any:
        """The answer.

        Raises:
            RayfuseError: the teacher refuses this input; asking again would not help.
            TeacherError: it failed on this input.
            TeacherGoneError: it cannot start, or did not answer for `patience_s` seconds.
        """
        deadline = self.clock() + self.target.patience_s
        while not isinstance(state := self.poll(), Answer):
            if isinstance(state, Waiting) and state.at_work and self.lost < LOST_AT_MOST:
                deadline = self.clock() + self.target.patience_s
            if self.clock() > deadline:
                self._give_up(state)
            if isinstance(state, Lost):
                self._again(state.cause)
        return state.value

    def poll(self) -> Answer | Waiting | Lost:
        """Look at the answer once, for at most CALL_TIMEOUT_S; raises as `wait`."""
        try:
            with own_errors():
                return Answer(self.response.result(timeout_s=CALL_TIMEOUT_S))
        except TimeoutError:
            return Waiting(self.target.has_replicas())
        except RayTaskError as error:
            raise TeacherError(f"teacher {self.target.name} failed on a unit: {error}") from error
        except (RayServeException, RayError, ConnectionError) as error:
            if isinstance(error, RayServeException) and not isinstance(error, BackPressureError):
                self.target.has_replicas()  # raises where it cannot start
            return Lost(error)

    def _again(self, cause: Exception) -> None:
        if not isinstance(cause, BackPressureError):
            log.warning("teacher %s: asking again after %s", self.target.name, type(cause).__name__)
        self.sleep(pause_s(self.lost) * random.uniform(0.5, 1.0))
        self.lost += 1
        self.response = self.target.send()

    def _give_up(self, state: Waiting | Lost) -> None:
        patience = f"{self.target.patience_s:.0f} s"
        cause = state.cause if isinstance(state, Lost) else TimeoutError(f"no answer within {patience}")
        raise TeacherGoneError(
            f"teacher {self.target.name} did not answer for {patience} (patience_s); "
            f"last: {type(cause).__name__}: {cause}"
        ) from cause


def pause_s(lost: int) -> float:
    """Longest pause (seconds) before a call that was lost `lost` times is sent once more: doubled, up to a cap."""
    doublings = min(lost, 10)  # 2**1024 is no float any more, and an hour of patience has as many attempts
    return min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2**doublings)


class _Unsent:
    """Stands for the response to a call that could not be sent."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def result(self, timeout_s: float) -> Any:
        """Raise what went wrong."""
        raise self.error


@dataclass(frozen=True)
class _Target:
    """A Target: one call of one client."""

    client: TeacherClient
    method: str
    arguments: Sequence[Any]

    @property
    def name(self) -> str:
        return self.client.teacher.name

    @property
    def patience_s(self) -> float:
        return self.client.teacher.patience_s

    def send(self) -> Any:
        return self.client.send(self.method, self.arguments)

    def has_replicas(self) -> bool:
        return self.client.has_replicas()


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
        call = Call(_Target(self, method, arguments))
        return lambda: read(call.wait())

    def send(self, method: str, arguments: Sequence[Any]) -> Any:
        """Call the replicas' `method`; Serve's response."""
        try:
            self._handle = self._handle or serve.get_app_handle(self.name)
            return getattr(self._handle, method).remote(*arguments)
        except RayServeException as error:  # no such application: found out when it is waited for
            return _Unsent(error)

    def has_replicas(self) -> bool:
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
        return any(counted.get("RUNNING", 0) > 0 for counted in states)
