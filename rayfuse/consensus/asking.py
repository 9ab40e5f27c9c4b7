"""Asking: every model's own answer to every prompt, how sure it is of it, and what it makes of the others' answers.

Answers are kept in the answer store and what scores them in the signal store: whatever is asked again is found there.
Units go through Ray tasks, a bounded number at a time; what comes out depends neither on timing nor on what was
interrupted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import ray

from rayfuse import cluster
from rayfuse.cluster.failures import own_errors
from rayfuse.config import Data, Model, Teacher
from rayfuse.consensus.candidates import Answer, Candidates
from rayfuse.consensus.scored import Scores
from rayfuse.data.sample import Sample
from rayfuse.prepare.measure import measure
from rayfuse.prepare.spec import PrepareSpec
from rayfuse.prepare.tasks import preparer
from rayfuse.teachers.answers import Author, answers_of
from rayfuse.teachers.identity import IdentifiedTeacher

T = TypeVar("T")


@dataclass(frozen=True)
class Panel:
    """The models that are asked, and what their answers must be good for; small, and sent to every task.

    Attributes:
        authors: who answers, greedily and once.
        student, teachers: models of the run; a response to learn from is one that all of them can read.
        data: longest prompt and response together, and what to do with longer ones.
        signals: URL of the signal store.
        on_missing: "wait" or "fail", where a model is gone for longer than its patience.
    """

    authors: tuple[Author, ...]
    student: Model
    teachers: tuple[Teacher, ...]
    data: Data
    signals: str
    on_missing: str

    def scorers(self, models: tuple[IdentifiedTeacher, ...]) -> PrepareSpec:
        """What has texts scored by these models: the log-probabilities of the texts' own tokens are read."""
        return PrepareSpec(
            student=self.student,
            teachers=models,
            store=self.signals,
            k=None,
            alignment="bytes",
            max_length=self.data.max_length,
            targets=("responses",),
            on_missing=self.on_missing,
        )


def answered(panel: Panel, unit: Sequence[Candidates]) -> list[Candidates]:
    """The prompts of a unit with every author's answer, its certainty, and the faults of all answers; a Ray task.

    An author that writes nothing but white space says nothing to that prompt.
    """
    texts = answers_of(panel.authors, [one.prompt.sample for one in unit])
    complete = []
    for number, one in enumerate(unit):
        own = [
            Answer(author.model.name, of_author[number][0], fingerprint=author.model.fingerprint)
            for author, of_author in zip(panel.authors, texts, strict=True)
        ]
        complete.append(one.with_answers([answer for answer in own if answer.text.strip()]))
    return _with_certainties(panel, _with_faults(panel, complete))


def _with_faults(panel: Panel, unit: Sequence[Candidates]) -> list[Candidates]:
    samples = {
        (number, answer.text): one.prompt.answered(answer.text)
        for number, one in enumerate(unit)
        for answer in one.answers
    }
    sizes = measure(panel.student, panel.teachers, list(samples.values())) if samples else []
    faults = {
        place: "too long" if size.is_cut(panel.data) else "unreadable" if size.fault else ""
        for place, size in zip(samples, sizes, strict=True)
    }
    return [
        replace(one, answers=tuple(replace(answer, fault=faults[number, answer.text]) for answer in one.answers))
        for number, one in enumerate(unit)
    ]


def _with_certainties(panel: Panel, unit: Sequence[Candidates]) -> list[Candidates]:
    """Each author scores its own answers that can be read; the others keep no certainty."""
    certainties: dict[tuple[int, str], float] = {}
    for author in panel.authors:
        own = [
            (number, answer.text)
            for number, one in enumerate(unit)
            for answer in one.answers
            if answer.source == author.model.name and not answer.fault
        ]
        samples = [unit[number].prompt.answered(text) for number, text in own]
        if samples:
            (signals,) = preparer(panel.scorers((author.model,))).signals(samples, {})
            for (number, _), answer in zip(own, signals, strict=True):
                assert answer is not None  # on_missing is not "drop"
                certainties[number, author.model.name] = float(answer.token_logps.mean(dtype="float64"))
    return [
        replace(
            one,
            answers=tuple(
                replace(answer, certainty=certainties.get((number, answer.source))) if answer.by_model else answer
                for answer in one.answers
            ),
        )
        for number, one in enumerate(unit)
    ]


def scored(panel: Panel, unit: Sequence[Candidates]) -> list[Scores]:
    """What every author makes of every answer to each prompt of a unit, labels included; a Ray task.

    An answer that some model cannot read is scored by none: an author that lacks one says nothing to its prompt.
    """
    places: list[tuple[int, str]] = []
    samples: list[Sample] = []
    for number, one in enumerate(unit):
        for text in dict.fromkeys(answer.text for answer in one.answers if not answer.fault):
            places.append((number, text))
            samples.append(one.prompt.answered(text))
    scores: list[dict[tuple[str, str], float]] = [{} for _ in unit]
    if samples:
        models = tuple(author.model for author in panel.authors)
        by_model = preparer(panel.scorers(models)).signals(samples, {})
        for model, signals in zip(models, by_model, strict=True):
            for (number, text), answer in zip(places, signals, strict=True):
                assert answer is not None
                scores[number][model.name, text] = float(answer.token_logps.sum(dtype="float64"))
    return list(scores)


def in_tasks(
    work: Callable[[Panel, Sequence[Candidates]], list[T]],
    panel: Panel,
    units: Sequence[Sequence[Candidates]],
    in_flight: int,
) -> Iterator[tuple[int, list[T]]]:
    """(unit, what `work` makes of it) as they are done; at most `in_flight` units at a time.

    Raises:
        RayfuseError: a model cannot answer; what was answered is kept.
    """
    task: Any = ray.remote(work).options(**cluster.prepare_task())
    shared: Any = ray.put(panel)
    waiting = iter(range(len(units)))
    running: dict[Any, int] = {}

    def begin() -> None:
        index = next(waiting, None)
        if index is not None:
            running[task.remote(shared, units[index])] = index

    for _ in range(in_flight):
        begin()
    while running:
        (ready,), _ = ray.wait(list(running), num_returns=1)
        index = running.pop(ready)
        with own_errors():
            made = ray.get(ready)
        begin()
        yield index, made
