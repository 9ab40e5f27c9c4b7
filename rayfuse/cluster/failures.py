"""What a task or actor raised, as it was raised there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ray.exceptions import RayTaskError

from rayfuse.errors import RayfuseError


@contextmanager
def own_errors() -> Iterator[None]:
    """Around ray.get: a RayfuseError of a task is raised itself; Ray's wrapper around it, with the trace, is its cause.

    Raises:
        RayTaskError: what the task raised is not ours.
    """
    try:
        yield
    except RayTaskError as error:
        if isinstance(error.cause, RayfuseError):
            raise error.cause from error
        raise
