"""Teachers: a file or folder per backend, all with the same contract, and the Ray Serve deployment that hosts them."""

from __future__ import annotations

from collections.abc import Callable

from rayfuse.config import Teacher
from rayfuse.teachers.backend import Backend

__all__ = ["BACKENDS", "Backend"]


def _transformers(teacher: Teacher, k: int) -> Backend:
    from rayfuse.teachers.transformers import TransformersTeacher

    return TransformersTeacher(teacher, k)


def _vllm(teacher: Teacher, k: int) -> Backend:
    from rayfuse.teachers.vllm.backend import VLLMTeacher

    return VLLMTeacher(teacher, k)


def _openai(teacher: Teacher, k: int) -> Backend:
    from rayfuse.teachers.openai.backend import OpenAITeacher

    return OpenAITeacher(teacher, k)


BACKENDS: dict[str, Callable[[Teacher, int], Backend]] = {
    "transformers": _transformers,
    "vllm": _vllm,
    "openai": _openai,
}
"""Backend by its name in the configuration; each is imported when it is used. `store` has none: nothing answers."""
