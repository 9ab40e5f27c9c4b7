"""Preferences: rows that hold several responses to one prompt.

The prompt may be a column, or what all sides begin with; a side may be a text, a message, the messages of the response
or the whole conversation. Only the last turn may differ: an earlier difference is refused, and the turn is named.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rayfuse.data.forms import (
    CONVERSATIONS,
    HISTORY,
    PAIRS,
    SYSTEMS,
    Row,
    finish,
    open_row,
    prompt_turns,
    response_of,
    response_turns,
)
from rayfuse.data.sample import PAIR, Compared, Message, Sample
from rayfuse.data.turns import Turn, turns_of
from rayfuse.errors import DataError


@dataclass(frozen=True)
class ComparedRow:
    """The responses of one row, and how it was read.

    Attributes:
        samples: one for each side, in their order.
        form: in words.
        unread: columns and keys that hold something which is not read.
    """

    samples: Compared
    form: str
    unread: frozenset[str]


def compared(row: Any, sides: Sequence[str] = PAIR, columns: Mapping[str, str] | None = None) -> ComparedRow:
    """The responses of one row.

    Args:
        row: as read.
        sides: columns of the responses; the last is the rejected one.
        columns: our name -> the row's name.

    Raises:
        DataError: a column is missing; the sides, or a side and the prompt, differ before the last turn; a last turn is
            not a text of the assistant's; the rejected response is also a chosen one.
    """
    held = open_row(row, columns)
    needs = ", ".join(f"'{side}'" for side in sides[:-1])
    if not set(sides) <= held.columns.keys():
        raise DataError(f"a preference row needs {needs} and '{sides[-1]}', and 'prompt'; it has {held.names}")
    prompt, form = _prompt_of(held)
    responses = {side: response_turns(held.columns[side], side) for side in sides}
    held.used |= set(sides)
    whole = {side: _whole(held, side, turns, prompt) for side, turns in responses.items()}
    shared = _shared(whole)
    conversation = finish(held, shared, len(shared), f"{form}{needs} and '{sides[-1]}'")
    texts = {side: response_of(_last(conversations[-1], side), f"'{side}'") for side, conversations in whole.items()}
    for side in sides[:-1]:
        if texts[side] == texts[sides[-1]]:
            raise DataError(f"'{side}' and '{sides[-1]}' are the same: {texts[side]!r:.60}")
    samples = (Sample(conversation.messages, text, conversation.skill, conversation.tools) for text in texts.values())
    return ComparedRow(tuple(samples), conversation.form, conversation.unread)


def _prompt_of(row: Row) -> tuple[tuple[Turn, ...], str]:
    """The turns of the prompt that a row has as a column (none where it has none), and the column in words.

    Raises:
        DataError: it has several.
    """
    names = row.chosen - {"response"} if row.chosen else {*CONVERSATIONS, *PAIRS}
    held = [name for name in (*PAIRS, *CONVERSATIONS) if name in names and row.columns.get(name) is not None]
    if "prompt" in held:  # UltraFeedback: `messages` beside it is the chosen side again
        held = ["prompt"]
    elif "input" in held and {"instruction", "question", "query"} & set(held):
        held.remove("input")
    if len(held) > 1:
        raise DataError(
            f"the row has several prompts: {', '.join(held)}; say which to read, for example "
            f"columns: {{prompt: {held[0]}}}; it has {row.names}"
        )
    if not held:
        return (), ""
    (name,) = held
    row.used.add(name)
    turns = turns_of(row.columns[name], name) if name in CONVERSATIONS else prompt_turns(row, name)
    return turns, f"'{name}', "


def _whole(row: Row, side: str, turns: tuple[Turn, ...], prompt: tuple[Turn, ...]) -> tuple[Turn, ...]:
    """The whole conversation of a side, and its prompt checked against it."""
    if turns[0].role == "assistant":  # the response alone
        has_context = any(row.columns.get(name) not in (None, "", []) for name in (*SYSTEMS, HISTORY))
        if not prompt and not has_context:
            raise DataError(
                f"'{side}' is a response alone, and the row has no prompt: a preference row needs 'prompt', or sides "
                f"that begin with it as messages; it has {row.names}"
            )
        return (*prompt, *turns)
    messages, expected = [turn.message for turn in turns], [turn.message for turn in prompt]
    skipped = 0
    if expected and expected[0].role not in ("system", "developer"):
        skipped = sum(message.role in ("system", "developer") for message in messages[:1])
    for index, message in enumerate(expected):
        said = messages[index + skipped] if index + skipped < len(messages) else None
        if said != message:
            raise DataError(
                f"turn {index + skipped} of '{side}' is not what the prompt says: {_short(said)}, and the prompt "
                f"{_short(message)}"
            )
    return turns


def _shared(whole: Mapping[str, tuple[Turn, ...]]) -> tuple[Turn, ...]:
    """What all sides begin with: everything but their last turns.

    Raises:
        DataError: they differ earlier.
    """
    (first, turns), *others = whole.items()
    for name, other in others:
        for index in range(max(len(turns), len(other)) - 1):
            one, two = (side[index].message if index < len(side) - 1 else None for side in (turns, other))
            if one != two:
                raise DataError(
                    f"'{first}' and '{name}' differ at turn {index}, and only their last turns may: "
                    f"{_short(one)}, and {_short(two)}"
                )
    return turns[:-1]


def _last(turn: Turn, side: str) -> Turn:
    if turn.calls:
        raise DataError(f"'{side}' ends in a turn that calls tools; only texts can be compared")
    if not turn.learn:
        raise DataError(f"the last turn of '{side}' is marked as context only; there is nothing to compare")
    return turn


def _short(message: Message | None) -> str:
    return f"{message.role} {message.text!r:.40}" if message is not None else "no such turn before the last"
