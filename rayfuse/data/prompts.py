"""Prompts: what models are asked when they write data themselves, and what their answers are checked against."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rayfuse.config import Data
from rayfuse.data.rows import messages_of, prompt_of, read_parsed, samples_of_row, text_of
from rayfuse.data.sample import DataCounts, Sample
from rayfuse.errors import DataError


@dataclass(frozen=True)
class Prompt:
    """What is asked.

    Attributes:
        sample: the messages, with an empty response; its key names the prompt.
        answer: the reference answer, empty where the row has none.
        tests: pieces of Python that check a program.
    """

    sample: Sample
    answer: str = ""
    tests: tuple[str, ...] = ()

    def answered(self, response: str) -> Sample:
        """The prompt with a response."""
        return replace(self.sample, response=response)


def read_prompts(data: Data, needs: str = "", *, first: int | None = None) -> tuple[list[Prompt], DataCounts]:
    """The prompts of a data set, in its order.

    Args:
        data: where it is, and what to do with a malformed row.
        needs: "answer" or "tests", where every row must have it.
        first: read at most this many rows.

    Raises:
        DataError: it cannot be read; a row is malformed or lacks what is needed, and `on_bad_row` is "error".
    """
    return read_parsed(data, first, lambda row: prompts_of_row(row, needs))


def prompts_of_row(row: Any, needs: str = "") -> list[Prompt]:
    """The prompts of one row.

    `prompt` (text or messages) or `messages` up to a user turn is one prompt; `messages` with assistant turns are a
    prompt for each of them, with that turn as the reference. `answer`, or else `response`, is the reference; `tests` is
    text or a list of texts.

    Raises:
        DataError: the row is of no such form, or lacks what is needed.
    """
    if not isinstance(row, Mapping):
        raise DataError(f"a row must be an object with keys, not {type(row).__name__}")
    skill = text_of(row.get("skill") or "", "'skill'")
    if row.get("messages") is not None:
        messages = messages_of(row["messages"], "messages")
        if messages[-1].role == "assistant":
            prompts = [Prompt(replace(s, response=""), s.response) for s in samples_of_row(row)]
        else:
            prompts = [Prompt(Sample(messages, "", skill))]
    elif "prompt" in row:
        prompts = [Prompt(Sample(prompt_of(row["prompt"]), "", skill))]
    else:
        raise DataError(f"a row needs 'prompt' or 'messages'; it has {sorted(map(str, row))}")
    answer = next((text_of(row[name], f"'{name}'") for name in ("answer", "response") if row.get(name)), "")
    tests = row.get("tests") or ()
    tests = tuple(text_of(test, "'tests'") for test in ([tests] if isinstance(tests, str) else _list(tests)))
    prompts = [Prompt(prompt.sample, answer or prompt.answer, tests) for prompt in prompts]
    if needs == "answer" and not all(prompt.answer for prompt in prompts):
        raise DataError(f"the judge compares with a row's 'answer' or 'response'; it has {sorted(map(str, row))}")
    if needs == "tests" and not tests:
        raise DataError(f"the judge runs a row's 'tests'; it has {sorted(map(str, row))}")
    return prompts


def _list(value: Any) -> Sequence[Any]:
    if not isinstance(value, (list, tuple)):
        raise DataError(f"'tests' must be text or a list of texts, not {type(value).__name__}")
    return value
