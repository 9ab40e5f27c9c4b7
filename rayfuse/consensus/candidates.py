"""Candidates of a prompt: its labels, and what every teacher and the pivot answer by themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rayfuse.config import Data
from rayfuse.data.forms import open_row
from rayfuse.data.prompts import Prompt, prompts_of
from rayfuse.data.rows import Parse, read_parsed
from rayfuse.data.sample import DataCounts
from rayfuse.errors import DataError

LABEL = "label"
"""The source of an answer that stands in the data."""
PIVOT = "pivot"
"""The source of the pivot's own answer."""


@dataclass(frozen=True)
class Answer:
    """What one source says to one prompt.

    Attributes:
        source: name of a teacher, PIVOT, or LABEL.
        text: as written.
        certainty: mean log-probability (nats) per own token of the model that wrote it, its end of turn included; None
            of a label, and of a model that gives no log-probabilities.
        fingerprint: of the model; empty of a label.
        fault: why nobody can learn from the text ("empty", "unreadable", "too long"); empty where one can.
    """

    source: str
    text: str
    certainty: float | None = None
    fingerprint: str = ""
    fault: str = ""

    @property
    def by_model(self) -> bool:
        """Whether a model wrote it."""
        return self.source != LABEL


@dataclass(frozen=True)
class Candidates:
    """A prompt and its answers.

    Attributes:
        prompt: what is asked.
        answers: of all sources; a prompt without labels has none of LABEL, one with several different labels several.
            A source that says nothing to this prompt is not among them.
        trusted: whether the (first) label is known to be right.
    """

    prompt: Prompt
    answers: tuple[Answer, ...]
    trusted: bool = False

    @property
    def labels(self) -> tuple[Answer, ...]:
        """The answers that stand in the data."""
        return tuple(answer for answer in self.answers if answer.source == LABEL)

    def with_answers(self, answers: Sequence[Answer]) -> Candidates:
        """The same with these answers besides its own."""
        return replace(self, answers=(*self.answers, *answers))


def read_candidates(data: Data, *, first: int | None = None) -> tuple[list[Candidates], DataCounts]:
    """The prompts of a data set with their labels, in its order; rows of one prompt become one.

    The weights of several data sets do not count.

    Args:
        data: where it is, and what to do with a malformed row.
        first: read at most this many rows of each data set.

    Raises:
        DataError: it cannot be read; a row is malformed and `on_bad_row` is "error"; two trusted rows of one prompt
            differ.
    """
    rows, counts = read_parsed(data, first, parse_candidates)
    prompts = merged(rows)
    return prompts, replace(counts, samples=len(prompts))


def parse_candidates(row: Any, columns: Mapping[str, str]) -> Parse[Candidates]:
    """The prompts of one row of any form, each with its label where it has one.

    The label is the response, or else the reference `answer`. `trusted: true` says that it is known to be right.

    Raises:
        DataError: the row has no form that data have, or is trusted and has no label.
    """
    held = open_row(row, columns)
    trusted = held.take(["trusted"]) or False
    if not isinstance(trusted, bool):
        raise DataError(f"'trusted' must be true or false, not {trusted!r:.60}")
    prompts, conversation = prompts_of(held, "")
    labels = [prompt.response or prompt.answer for prompt in prompts]
    if trusted and not all(labels):
        raise DataError("a trusted row needs a label: a response, or an answer")
    found = [
        Candidates(prompt, (Answer(LABEL, label),) if label else (), trusted)
        for prompt, label in zip(prompts, labels, strict=True)
    ]
    return Parse(found, conversation.form, conversation.unread, conversation.calling_turns)


def merged(rows: Sequence[Candidates]) -> list[Candidates]:
    """Of the rows of one prompt one, in the place of the first: its labels are all different ones, trusted ones first.

    The same label twice is one: a copied row is no second opinion.

    Raises:
        DataError: two trusted labels of one prompt differ.
    """
    by_key: dict[str, Candidates] = {}
    for row in rows:
        there = by_key.get(row.prompt.sample.key)
        if there is None:
            by_key[row.prompt.sample.key] = row
            continue
        if row.trusted and there.trusted and row.labels[0].text != there.labels[0].text:
            raise DataError(
                f"the prompt {there.prompt.sample.plain_text!r:.60} has two trusted labels, "
                f"{there.labels[0].text!r:.60} and {row.labels[0].text!r:.60}: only one of them can be right"
            )
        both = (*row.answers, *there.answers) if row.trusted else (*there.answers, *row.answers)
        by_key[row.prompt.sample.key] = replace(
            there, answers=tuple(dict.fromkeys(both)), trusted=there.trusted or row.trusted
        )
    return list(by_key.values())
