"""How long samples are for the student, and whether every model can read them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import ray

from rayfuse import cluster
from rayfuse.config import Config, Model, Teacher
from rayfuse.data.render import Renderer
from rayfuse.data.sample import Sample
from rayfuse.errors import AlignmentError, DataError
from rayfuse.models.loading import load_tokenizer
from rayfuse.teachers.identity import teacher_context

MEASURE_CHUNK = 2000
"""Samples measured by one task."""


def measure_all(config: Config, groups: Sequence[tuple[Sample, ...]]) -> list[list[Size]]:
    """The sizes of every group's samples, measured in chunks by parallel tasks (the first chunk here)."""
    samples = [sample for group in groups for sample in group]
    chunks = [samples[i : i + MEASURE_CHUNK] for i in range(0, len(samples), MEASURE_CHUNK)]
    task = ray.remote(measure).options(**cluster.measure_task())
    waiting = [task.remote(config.student, config.teachers, chunk) for chunk in chunks[1:]]
    first = measure(config.student, config.teachers, chunks[0])
    sizes = iter([size for chunk in [first, *ray.get(waiting)] for size in chunk])
    return [[next(sizes) for _ in group] for group in groups]


class Size(NamedTuple):
    """A sample as the models read it.

    Attributes:
        total: student tokens of prompt, response and end-of-turn.
        response: student tokens of response and end-of-turn.
        fault: why a model cannot read it exactly; empty where all can.
    """

    total: int
    response: int
    fault: str = ""


def measure(student: Model, teachers: Sequence[Teacher], samples: Sequence[Sample]) -> list[Size]:
    """The size of each sample under the student, and whether every teacher can read it.

    A teacher whose signals are stored has read what it has read: without a tokenizer of its own it is not asked.
    """
    renderer, readers = _readers(student, tuple(teachers))
    return [_size(renderer, readers, sample) for sample in samples]


@lru_cache(maxsize=4)
def _readers(student: Model, teachers: tuple[Teacher, ...]) -> tuple[Renderer, list[tuple[Renderer, int | None]]]:
    """One set of tokenizers per process: Ray reuses the processes of tasks."""
    readers = [
        (Renderer(load_tokenizer(teacher)), teacher_context(teacher))
        for teacher in teachers
        if teacher.stored is None or teacher.tokenizer is not None
    ]
    return Renderer(load_tokenizer(student)), readers


def _size(student: Renderer, teachers: Sequence[tuple[Renderer, int | None]], sample: Sample) -> Size:
    try:
        rendered = student.render(sample)
        for teacher, context in teachers:
            teacher.render(sample, context)
    except (DataError, AlignmentError) as error:
        return Size(0, 0, str(error))
    return Size(rendered.length, len(rendered.response_ids))
