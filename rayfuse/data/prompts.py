"""Prompts: what models are asked when they write data themselves, and what their answers are checked against."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rayfuse.config import Data
from rayfuse.data.forms import CONVERSATIONS, PAIRS, Conversation, Row, conversation_of_row, finish, open_row
from rayfuse.data.forms import prompt_turns as turns_of_prompt
from rayfuse.data.rows import Parse, read_parsed
from rayfuse.data.sample import DataCounts, Sample
from rayfuse.data.turns import from_json, text_of
from rayfuse.errors import DataError

ANSWERS = ("answer", "ground_truth")
"""Columns of the answer; also `reward_model: {ground_truth: ...}` (verl). Else `solution`, else the response."""
PROMPTS = (*PAIRS, "problem")


@dataclass(frozen=True)
class Prompt:
    """What is asked.

    Attributes:
        sample: the messages, with an empty response; its key names the prompt.
        answer: the reference answer, empty where the row has none.
        tests: pieces of Python that check a program.
        response: what the row responds to it, in its own words; empty where the row has no response.
    """

    sample: Sample
    answer: str = ""
    tests: tuple[str, ...] = ()
    response: str = ""

    def answered(self, response: str) -> Sample:
        """The prompt with a response."""
        return replace(self.sample, response=response)


def read_prompts(data: Data, needs: str = "", *, first: int | None = None) -> tuple[list[Prompt], DataCounts]:
    """The prompts of a data set, in its order; the weights of several data sets do not count.

    Args:
        data: where it is, and what to do with a malformed row.
        needs: "answer" or "tests", where every row must have it.
        first: read at most this many rows.

    Raises:
        DataError: it cannot be read; a row is malformed or lacks what is needed, and `on_bad_row` is "error".
    """

    def parse(row: Any, columns: Mapping[str, str]) -> Parse[Prompt]:
        held = open_row(row, columns)
        prompts, conversation = prompts_of(held, needs)
        return Parse(prompts, conversation.form, conversation.unread, conversation.calling_turns)

    return read_parsed(data, first, parse)


def prompts_of_row(row: Any, needs: str = "", columns: Mapping[str, str] | None = None) -> list[Prompt]:
    """The prompts of one row.

    A conversation, or a prompt with its response, is a prompt for each assistant turn, with that turn as the reference;
    a conversation that ends with the user, or a prompt alone, is one prompt. A reference answer beside it comes first:
    `answer`, `ground_truth`, `reward_model.ground_truth`, else `solution`. `tests` is text or a list of texts.

    Raises:
        DataError: the row is of no such form, or lacks what is needed.
    """
    return prompts_of(open_row(row, columns), needs)[0]


def prompts_of(row: Row, needs: str) -> tuple[list[Prompt], Conversation]:
    """The prompts of an opened row, see prompts_of_row, and the conversation that they are taken from."""
    answer = _answer(row)
    tests = row.take(["tests"]) or ()
    tests = tuple(text_of(test, "'tests'") for test in ([tests] if isinstance(tests, str) else _list(tests)))
    conversation = _conversation(row)
    if conversation.turns[-1].role == "assistant":
        # A row of one prompt is asked once; only of a conversation each assistant turn is a prompt.
        samples = conversation.samples()[-1:] if conversation.given else conversation.samples()
        prompts = [Prompt(replace(sample, response=""), response=sample.response) for sample in samples]
    else:
        prompts = [Prompt(Sample(conversation.messages, "", conversation.skill, conversation.tools))]
    prompts = [replace(prompt, answer=answer or prompt.response, tests=tests) for prompt in prompts]
    if needs == "answer" and not all(prompt.answer for prompt in prompts):
        raise DataError(f"the judge compares with a row's 'answer' or 'response'; it has {row.names}")
    if needs == "tests" and not tests:
        raise DataError(f"the judge runs a row's 'tests'; it has {row.names}")
    return prompts, conversation


def _conversation(row: Row) -> Conversation:
    """The conversation of a row, or its prompt alone.

    Raises:
        DataError: the row has neither, or several.
    """
    held = {name for name, value in row.columns.items() if value is not None}
    if row.chosen:
        held &= row.chosen
    conversations = [name for name in CONVERSATIONS if name in held]
    alone = [name for name in PROMPTS if name in held]
    if "input" in alone and {"instruction", "question", "query"} & held:
        alone.remove("input")
    if len(conversations) + len(alone) != 1 and not (conversations == ["messages"] and alone == ["prompt"]):
        several = ", ".join([*conversations, *alone])
        raise DataError(
            f"the row has several prompts: {several}; say which to read, for example columns: "
            f"{{prompt: {[*alone, *conversations][0]}}}; it has {row.names}"
            if several
            else f"a row needs 'prompt' or 'messages'; it has {row.names}"
        )
    responses = set(PAIRS.get(next(iter(alone), ""), ())) - {"answer"}
    if conversations or any(row.columns.get(name) not in (None, "") for name in responses):
        return conversation_of_row(row)
    turns = turns_of_prompt(row, alone[0])
    return finish(row, turns, len(turns), f"prompts in '{alone[0]}'")


def _answer(row: Row) -> str:
    """The reference answer that stands beside a prompt; empty where there is none."""
    scored = row.columns.get("reward_model")
    scored = from_json(scored, "'reward_model'") if isinstance(scored, str) and scored[:1] == "{" else scored
    if isinstance(scored, Mapping) and scored.get("ground_truth") not in (None, ""):
        row.columns = {**row.columns, "reward_model": scored["ground_truth"]}
        answer = row.take([*ANSWERS, "reward_model"], "answer")
    else:
        answer = row.take(ANSWERS, "answer")
    answer = row.take(["solution"]) if answer is None else answer
    return text_of(answer, "'answer'") if answer is not None else ""


def _list(value: Any) -> Sequence[Any]:
    if not isinstance(value, (list, tuple)):
        raise DataError(f"'tests' must be text or a list of texts, not {type(value).__name__}")
    return value
