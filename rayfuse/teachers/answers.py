"""Answers: what teachers and pivot write to prompts, each written once and kept.

A unit of prompts -> answers, from the store where they are there, from the model's replicas where one is missing, and
then into the store. Idempotent; the same unit and sampling give the same bits.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

from rayfuse.data.sample import Sample
from rayfuse.errors import MissingSignalsError, SignalError
from rayfuse.signals.objects import ObjectStore
from rayfuse.teachers.identity import IdentifiedTeacher

FORMAT = "rayfuse-answers-1"


@dataclass(frozen=True)
class Sampling:
    """How often and how a model is asked; its answers depend on this and on the prompt.

    Attributes:
        count: answers to each prompt.
        temperature, max_new_tokens, seed: see Backend.generate.
    """

    count: int
    temperature: float
    max_new_tokens: int
    seed: int

    def call_seed(self, index: int) -> int:
        """The seed of the call that brings answer `index` of every prompt, below 2^31."""
        return int.from_bytes(hashlib.sha256(f"{self.seed}/{index}".encode()).digest()[:4], "little") >> 1


class AnswerStore(ObjectStore):
    """A prompt's answers by (fingerprint of the model, sampling, key of the prompt): one JSON object each."""

    what = "answer store"

    def path(self, fingerprint: str, sampling: Sampling, key: str) -> str:
        """Where the answers of one model to one prompt are."""
        settings = hashlib.sha256(json.dumps(vars(sampling), sort_keys=True).encode()).hexdigest()[:16]
        return f"{self.root}/{fingerprint}/{settings}/{key[:2]}/{key}.json"

    def get(self, fingerprint: str, sampling: Sampling, key: str) -> list[str] | None:
        """The answers, or None where there are none (or only a damaged object, which is set aside)."""
        about = _about(fingerprint, sampling, key)
        path = self.path(fingerprint, sampling, key)
        return self.read(path, lambda: _decode(self.fs.cat_file(path), about, sampling.count))

    def put(self, fingerprint: str, sampling: Sampling, key: str, answers: Sequence[str]) -> bool:
        """Write the answers, unless they are there; True where this call wrote them."""
        about = _about(fingerprint, sampling, key)
        content = {"about": about, "answers": list(answers), "hash": _hash(answers)}
        blob = json.dumps(content, ensure_ascii=False).encode("utf-8", "surrogatepass")
        return self.write(self.path(fingerprint, sampling, key), blob)


def _about(fingerprint: str, sampling: Sampling, key: str) -> dict[str, Any]:
    return {"format": FORMAT, "fingerprint": fingerprint, "key": key, **vars(sampling)}


def _hash(answers: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps(list(answers)).encode()).hexdigest()


def _decode(blob: bytes, about: Mapping[str, Any], count: int) -> list[str]:
    try:
        content = json.loads(blob.decode("utf-8", "surrogatepass"))
        answers = content["answers"]
        whole = content["about"] == about and content["hash"] == _hash(answers) and len(answers) == count
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise SignalError(f"not a readable object of answers: {type(error).__name__}: {error}") from error
    if not whole:
        raise SignalError(f"the object is of another model, prompt or sampling, or damaged: {content['about']}")
    return answers


@dataclass(frozen=True)
class Author:
    """A model that answers.

    Attributes:
        model: the teacher, or the pivot as one.
        sampling: how it is asked.
        store: URL of the answer store.
    """

    model: IdentifiedTeacher
    sampling: Sampling
    store: str


class Writer(Protocol):
    """What a model looks like from here: send a unit, then wait for its answers."""

    def generate(
        self, samples: Sequence[Sample], *, max_new_tokens: int, batch_size: int, temperature: float, seed: int
    ) -> Callable[[], list[str]]:
        """Send; the returned function waits. See TeacherClient.generate."""


def ask(source: Author, writer: Writer, store: AnswerStore, prompts: Sequence[Sample]) -> Callable[[], list[list[str]]]:
    """Send a unit of prompts; the returned function waits for `count` answers to each, in order.

    A model always answers the whole unit, so that what is written again has the same bits; what the store already holds
    is used as it is, and nothing is sent where it holds all. All calls are sent before the first is waited for.
    """
    fingerprint, sampling = source.model.fingerprint, source.sampling
    found = [store.get(fingerprint, sampling, prompt.key) for prompt in prompts]
    missing = [index for index, item in enumerate(found) if item is None]
    calls = [
        writer.generate(
            prompts,
            max_new_tokens=sampling.max_new_tokens,
            batch_size=len(prompts),
            temperature=sampling.temperature,
            seed=sampling.call_seed(index),
        )
        for index in range(sampling.count if missing else 0)
    ]

    def wait() -> list[list[str]]:
        written_by_call = [call() for call in calls]
        for answers in written_by_call:
            if len(answers) != len(prompts):
                name = source.model.name
                raise MissingSignalsError(f"{name} answered {len(answers)} of {len(prompts)} prompts of a unit")
        for index in missing:
            written = [answers[index] for answers in written_by_call]
            store.put(fingerprint, sampling, prompts[index].key, written)
            found[index] = written
        return [item for item in found if item is not None]

    return wait


@lru_cache(maxsize=16)
def _opened(source: Author) -> tuple[Writer, AnswerStore]:
    """One client and store per process and source: Ray reuses the processes of tasks."""
    from rayfuse.teachers.serving.client import TeacherClient

    return TeacherClient(source.model), AnswerStore(source.store)


def answers_of(sources: Sequence[Author], prompts: Sequence[Sample]) -> list[list[list[str]]]:
    """By source, each prompt's answers through its replicas; all sources are asked before the first is waited for."""
    waits = [ask(source, *_opened(source), prompts) for source in sources]
    return [wait() for wait in waits]
