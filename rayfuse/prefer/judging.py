"""Judging: responses in, the same responses with scores out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import ray

from rayfuse import cluster
from rayfuse.cluster.failures import own_errors
from rayfuse.config import Config, Data, HostedJudge, Model, Prefer, Teacher
from rayfuse.data.prompts import Prompt
from rayfuse.data.sample import Sample
from rayfuse.evaluation.judges import JudgeActor
from rayfuse.prefer.selection import Response
from rayfuse.prepare.measure import measure
from rayfuse.teachers.answers import Author, answers_of


def judged(
    config: Config, settings: Prefer, data: Data, sources: Sequence[Author], units: Sequence[list[Prompt]]
) -> Iterator[tuple[int, list[list[Response]]]]:
    """(unit, its responses with faults and scores) as they are done; at most `in_flight` units at a time."""
    task: Any = ray.remote(respond).options(**cluster.prepare_task())
    judges = _Judges(settings)
    stages: dict[Any, tuple[int, str]] = {}
    parts: dict[int, list[list[Response]]] = {}
    waiting = iter(range(len(units)))
    models: Any = ray.put((config.student, config.teachers, data, list(sources)))

    def begin() -> None:
        index = next(waiting, None)
        if index is not None:
            stages[task.remote(models, units[index])] = (index, "answered")

    for _ in range(settings.in_flight):
        begin()
    while stages:
        (ready,), _ = ray.wait(list(stages), num_returns=1)
        index, stage = stages.pop(ready)
        with own_errors():
            result = ray.get(ready)
        if stage == "answered":
            parts[index] = result
            pairs = _to_judge(units[index], parts[index])
            if judges.actors and pairs:
                stages[judges.score(pairs, index)] = (index, "judged")
                continue
        elif stage == "judged":
            judges.finished(index)
            _give_scores(units[index], parts[index], result)
        yield index, parts.pop(index)
        begin()


class _Judges:
    """The judge's actors; a unit goes to the one with the least to do."""

    def __init__(self, settings: Prefer) -> None:
        judge = settings.judge
        self.actors: list[Any] = []
        if isinstance(judge, HostedJudge):
            actor: Any = JudgeActor
            options = cluster.judge_actor(judge)
            self.actors = [actor.options(**options).remote(judge) for _ in range(judge.workers)]
        self.busy = [0] * len(self.actors)
        self.actor_of_unit: dict[int, int] = {}

    def score(self, pairs: list[tuple[Prompt, str]], unit: int) -> Any:
        """A reference to the scores of the pairs."""
        least = min(range(len(self.actors)), key=self.busy.__getitem__)
        self.busy[least] += 1
        self.actor_of_unit[unit] = least
        return self.actors[least].score.remote(pairs)

    def finished(self, unit: int) -> None:
        """A unit's scores are there."""
        self.busy[self.actor_of_unit.pop(unit)] -= 1


def _to_judge(unit: Sequence[Prompt], responses: Sequence[Sequence[Response]]) -> list[tuple[Prompt, str]]:
    """Every different usable text of every prompt once, in order."""
    return [
        (prompt, text)
        for prompt, prompt_responses in zip(unit, responses, strict=True)
        for text in dict.fromkeys(response.text for response in prompt_responses if not response.fault)
    ]


def _give_scores(unit: Sequence[Prompt], responses: list[list[Response]], scores: Sequence[float]) -> None:
    left = iter(scores)
    for index, prompt_responses in enumerate(responses):
        score_of_text: dict[str, float] = {}
        for response in prompt_responses:
            if not response.fault and response.text not in score_of_text:
                score_of_text[response.text] = next(left)
        responses[index] = [replace(r, score=score_of_text[r.text]) if not r.fault else r for r in prompt_responses]


def respond(models: tuple[Model, tuple[Teacher, ...], Data, list[Author]], unit: list[Prompt]) -> list[list[Response]]:
    """All sources' responses to each prompt of a unit, with what makes one unfit to learn from; a Ray task.

    A response is checked as a run will: student and teachers (the first two of `models`) must read it exactly, and it
    must fit the longest length (of the third) and every teacher's context with its prompt.
    """
    student, teachers, data, sources = models
    answers = answers_of(sources, [prompt.sample for prompt in unit])
    responses = [
        [
            Response(text, source.model.name, source.model.fingerprint, index)
            for source, source_answers in zip(sources, answers, strict=True)
            for index, text in enumerate(source_answers[number])
        ]
        for number in range(len(unit))
    ]
    samples: list[Sample] = []
    for prompt, prompt_responses in zip(unit, responses, strict=True):
        samples += [prompt.answered(text) for text in dict.fromkeys(r.text for r in prompt_responses if r.text.strip())]
    faults = {}
    for sample, size in zip(samples, measure(student, teachers, samples), strict=True):
        faults[sample.key] = "too long" if size.is_cut(data) else "unreadable" if size.fault else ""
    return [
        [replace(r, fault=faults[prompt.answered(r.text).key] if r.text.strip() else "empty") for r in prompt_responses]
        for prompt, prompt_responses in zip(unit, responses, strict=True)
    ]
