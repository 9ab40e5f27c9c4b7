"""How long samples are for the student, and whether every model can read them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import ray

from rayfuse import cluster
from rayfuse.config import Config, Data, Model, Teacher
from rayfuse.data.render import Renderer
from rayfuse.data.sample import Sample
from rayfuse.errors import AlignmentError, DataError
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
        total: student tokens of prompt, response and end-of-turn; 0 where the student cannot read it.
        response: student tokens of response and end-of-turn.
        fault: why a model cannot read it exactly; empty where all can.
        over: the first teacher whose context is shorter than prompt and response, empty where there is none.
        never: the first teacher whose context is shorter than the response beside one token of prompt.
    """

    total: int
    response: int
    fault: str = ""
    over: str = ""
    never: str = ""

    def too_long_for(self, data: Data) -> str:
        """The model that the sample is too long for, as `data` says; empty where it fits.

        The student reads at most `max_length` tokens, a teacher its context. With `too_long: cut` a prompt is cut to
        fit, so only a response that leaves no room for a prompt is too long.
        """
        cut = data.too_long == "cut"
        if self.response >= data.max_length or (self.total > data.max_length and not cut):
            return STUDENT
        return self.never if cut else self.over

    def is_cut(self, data: Data) -> bool:
        """Whether some model reads the sample with its prompt cut."""
        return self.total > data.max_length or bool(self.over)


STUDENT = "the student"


def measure(student: Model, teachers: Sequence[Teacher], samples: Sequence[Sample]) -> list[Size]:
    """The size of each sample under the student, and whether every teacher can read it.

    A teacher whose signals are stored has read what it has read: without a tokenizer of its own it is not asked.
    """
    renderer, readers = _readers(student, tuple(teachers))
    return [_size(renderer, readers, sample) for sample in samples]


def renderers(student: Model, teachers: Sequence[Teacher]) -> dict[str, Renderer]:
    """What renders for each model that reads samples itself, by its name; the student is first, as "student"."""
    renderer, readers = _readers(student, tuple(teachers))
    return {"student": renderer, **{reader.name: reader.renderer for reader in readers}}


class _Reader(NamedTuple):
    """A teacher's rendering, and how many tokens it reads; None where nobody tells."""

    name: str
    renderer: Renderer
    context: int | None


@lru_cache(maxsize=4)
def _readers(student: Model, teachers: tuple[Teacher, ...]) -> tuple[Renderer, list[_Reader]]:
    """One set of tokenizers per process: Ray reuses the processes of tasks."""
    readers = [
        _Reader(str(teacher.name), Renderer.of(teacher), teacher_context(teacher))
        for teacher in teachers
        if teacher.stored is None or teacher.tokenizer is not None
    ]
    return Renderer.of(student), readers


def _size(student: Renderer, teachers: Sequence[_Reader], sample: Sample) -> Size:
    """The size of one sample. All models are asked: what is too long for one is left out, whatever another says."""
    total = response = 0
    faults: list[str] = []
    over: list[str] = []
    never: list[str] = []
    try:
        rendered = student.render(sample)
        total, response = rendered.length, len(rendered.response_ids)
        student.refuse_missing(sample)
    except (DataError, AlignmentError) as error:
        faults.append(str(error))
    for name, renderer, context in teachers:
        try:
            rendered = renderer.render(sample)
            renderer.refuse_missing(sample)
        except (DataError, AlignmentError) as error:
            faults.append(str(error))
            continue
        if context is not None and rendered.length > context:
            over.append(name)
            if len(rendered.response_ids) >= context:
                never.append(name)
    return Size(total, response, *(next(iter(names), "") for names in (faults, over, never)))
