"""Forms: which columns of a row hold the conversation, found by their names.

A conversation in any form becomes the same turns:

    {"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]}
    {"conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]}
    {"prompt": "2 + 2?", "completion": "4"}
    {"instruction": "Add.", "input": "2 + 2", "output": "4"}

A row must have exactly one form. Columns with other names are mapped by `data.columns`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rayfuse.data.sample import Message, Sample, canonical, conversation_samples
from rayfuse.data.turns import (
    MARK_KEYS,
    Turn,
    from_json,
    is_learned,
    text_of,
    turn_of,
    turns_of,
)
from rayfuse.errors import DataError

CONVERSATIONS = ("messages", "conversations", "conversation", "dialog", "dialogue", "chat", "turns")
PAIRS = {
    "prompt": ("response", "completion"),
    "instruction": ("output", "response"),
    "question": ("answer", "response"),
    "query": ("response", "answer"),
    "input": ("output",),
}
"""Columns of the prompt, and the columns in which its response may be."""
INPUTS = ("input", "context")
"""What an instruction (question, query) is about: it follows in the same message, on a line of its own, as in
LLaMA-Factory's reading of Alpaca."""
SYSTEMS = ("system", "system_prompt")
TOOLS = ("tools", "functions")
HISTORY = "history"
SKILL = "skill"

MAIN = ("messages", "prompt", "response", "chosen", "rejected")
"""Columns that every row must have where `columns` names them; the others may be missing in some rows."""

NOT_READ = {
    "image": "an image",
    "images": "images",
    "audio": "audio",
    "audios": "audio",
    "video": "a video",
    "videos": "videos",
    "input_ids": "token ids of one tokenizer; every model here has its own: give the text",
    "chat_template_kwargs": "arguments of a chat template, which are set for each model, not by row",
    "documents": "documents for the template: put them into a message",
}
"""Columns that say something to a model which is not read: a row in which they hold something is refused."""


@dataclass
class Row:
    """A row whose columns are taken one by one; what is left was not read.

    Attributes:
        columns: those that hold something, by name.
        names: of all columns, as the row has them.
        chosen: the columns of the form that `data.columns` chooses; empty where the form is found by the names alone.
        used: columns that were taken.
    """

    columns: dict[str, Any]
    names: list[str]
    chosen: frozenset[str]
    used: set[str] = field(default_factory=set)

    def take(self, names: Sequence[str], what: str = "") -> Any:
        """The value of the one of `names` that holds something; None where none does.

        Raises:
            DataError: two hold different things.
        """
        found = {name: self.columns[name] for name in names if self.columns.get(name) not in (None, "", [])}
        self.used |= found.keys()
        values = list(found.values())
        if any(value != values[0] for value in values[1:]):
            raise DataError(f"the columns {' and '.join(map(repr, found))} both hold the {what or names[0]}; keep one")
        return values[0] if values else None

    @property
    def unread(self) -> frozenset[str]:
        """Columns that hold something and were not taken."""
        return frozenset(name for name, value in self.columns.items() if value not in (None, "", [], {})) - self.used


@dataclass(frozen=True)
class Conversation:
    """A conversation as a row has it, in one form.

    Attributes:
        turns: all of them.
        given: how many of them, from the left, are only asked with: no response is among them.
        tools: as canonical JSON of a list, or empty.
        skill: the row's label, or empty.
        form: the form that was recognised, in words.
        unread: columns and keys that hold something which is not read.
    """

    turns: tuple[Turn, ...]
    given: int = 0
    tools: str = ""
    skill: str = ""
    form: str = ""
    unread: frozenset[str] = frozenset()

    @property
    def messages(self) -> tuple[Message, ...]:
        """The turns' messages."""
        return tuple(turn.message for turn in self.turns)

    @property
    def answers(self) -> list[Turn]:
        """The assistant's turns after what is given, whether they are learned or not."""
        return [turn for turn in self.turns[self.given :] if turn.role == "assistant"]

    @property
    def calling_turns(self) -> int:
        """How many of them are not learned because they call tools."""
        return sum(turn.calls and turn.learn for turn in self.answers)

    @property
    def context_turns(self) -> int:
        """How many of them are marked as context only."""
        return sum(not turn.learn for turn in self.answers)

    def samples(self) -> list[Sample]:
        """A sample per assistant turn that is learned.

        Raises:
            DataError: a response is empty, or says its thought twice.
        """
        responses = {
            index: response_of(turn, "an assistant turn")
            for index, turn in enumerate(self.turns)
            if index >= self.given and turn.role == "assistant" and turn.learn and not turn.calls
        }
        return conversation_samples(self.messages, responses, self.skill, self.tools)


def response_of(turn: Turn, name: str) -> str:
    """A turn's text to learn from; `name` is what an error calls it."""
    if not turn.message.text:
        raise DataError(f"{name} is empty; there is nothing to learn from it")
    if turn.response != turn.message.text and turn.message.text.lstrip().startswith("<think>"):
        raise DataError(f"{name} has its thought twice, as a key and in its content; keep one")
    return turn.response


# --- rows ------------------------------


def open_row(row: Any, columns: Mapping[str, str] | None = None) -> Row:
    """The row under our names.

    Args:
        row: as read.
        columns: our name -> the row's name, of `data.columns`.

    Raises:
        DataError: it is no object, lacks a column that `columns` names, or holds what is not read.
    """
    if not isinstance(row, Mapping):
        raise DataError(f"a row must be an object with keys, not {type(row).__name__}")
    held = {str(name): value for name, value in row.items()}
    names = sorted(held)
    columns = columns or {}
    for ours in MAIN:
        if ours in columns and columns[ours] not in held:
            raise DataError(f"columns.{ours} is {columns[ours]!r}, which the row does not have; it has {names}")
    renamed = {ours: held[theirs] for ours, theirs in columns.items() if theirs in held}
    taken = {*columns.values(), *columns}
    held = renamed | {name: value for name, value in held.items() if name not in taken}
    for name, what in NOT_READ.items():
        if held.get(name) not in (None, "", [], {}):
            raise DataError(f"the column {name!r} holds {what}; take it out, or leave the row out")
    form = {"messages"} & columns.keys() or (
        {"prompt", "response"} if {"prompt", "response"} & columns.keys() else set()
    )
    return Row(held, names, frozenset(form))


def known_forms() -> str:
    """The forms of a conversation, in words."""
    pairs = "; ".join(f"{prompt} and {' or '.join(responses)}" for prompt, responses in PAIRS.items())
    return f"a conversation in {', '.join(CONVERSATIONS)}; {pairs}"


def form_of(row: Row) -> tuple[str, str]:
    """The columns of a row's form: (conversation, "") or (prompt, response).

    Raises:
        DataError: the row has no form, or several.
    """
    if row.chosen:
        return ("messages", "") if "messages" in row.chosen else ("prompt", "response")
    pairs = [(prompt, response) for prompt, responses in PAIRS.items() for response in responses]
    everything = [*((name, "") for name in CONVERSATIONS), *pairs]

    def forms(held: set[str]) -> list[tuple[str, str]]:
        found = [form for form in everything if set(form) - {""} <= held]
        # The input of an instruction is a part of it.
        return [form for form in found if form[0] != "input" or not {"instruction", "question", "query"} & held]

    # A column that is null in this row is no form of it; where nothing else is, say that it is null.
    found = forms({name for name, value in row.columns.items() if value is not None}) or forms(set(row.columns))
    if len(found) == 1:
        return found[0]
    if found:
        texts = " and ".join(" + ".join(filter(None, form)) for form in found)
        raise DataError(
            f"the row has {len(found)} forms at once: {texts}; say which to read, for example "
            f"columns: {{{_example(found[0])}}}; it has {row.names}"
        )
    raise DataError(f"a row needs 'messages', or 'prompt' and 'response'; it has {row.names}. {_advice(row)}")


def _example(form: tuple[str, str]) -> str:
    return f"prompt: {form[0]}, response: {form[1]}" if form[1] else f"messages: {form[0]}"


def _advice(row: Row) -> str:
    if {"chosen", "rejected"} <= row.columns.keys():
        return "This is a row of `preferences`, for the stages that compare responses"
    if "text" in row.columns:
        return "A plain text does not say which part a model wrote: part it into a prompt and a response"
    return f"Forms that are read: {known_forms()}. Map other names with columns: {{prompt: ..., response: ...}}"


# --- conversations ------------------------------


def conversation_of_row(row: Row) -> Conversation:
    """The conversation of a row, in whichever form it is.

    Raises:
        DataError: the row has no form or several, or something in it is malformed.
    """
    asked, answered = form_of(row)
    if not answered:
        row.used.add(asked)
        turns: tuple[Turn, ...] = turns_of(row.columns[asked], asked)
        style = "ShareGPT (from, value)" if _is_sharegpt(row.columns[asked]) else "messages (role, content)"
        return finish(row, turns, 0, f"{style} in '{asked}'")
    given = prompt_turns(row, asked)
    row.used.add(answered)
    label = row.columns.get("label")
    if isinstance(label, bool):
        raise DataError("'label' marks the response as good or bad (KTO); rayfuse learns from responses, or from pairs")
    turns = (*given, *response_turns(row.columns.get(answered), answered))
    inputs = [name for name in INPUTS if name in row.used and name != asked]
    form = " + ".join([f"'{asked}'", *(f"'{name}'" for name in inputs), f"'{answered}'"])
    return finish(row, turns, len(given), form)


def finish(row: Row, turns: tuple[Turn, ...], given: int, form: str) -> Conversation:
    """The conversation with what the row says beside it: system message, history, tools, skill, the row's weight."""
    if (history := row.take([HISTORY])) is not None:
        earlier = history_turns(history)
        turns = (*earlier, *turns)
        # A prompt with a history is asked after it; the answers in the history are learned too.
        asked = range(len(earlier), len(earlier) + given)
        turns = tuple(_context(turn) if index in asked else turn for index, turn in enumerate(turns))
        given = 0
    if (system := row.take(SYSTEMS, "system message")) is not None:
        before = len(turns)
        turns = with_system(turns, text_of(system, "'system'"))
        given += (len(turns) - before) if given else 0
    mark = row.take(MARK_KEYS[:1])
    if mark is not None and not is_learned(mark, "the row"):
        turns = tuple(_context(turn) for turn in turns)
    skill = text_of(row.take([SKILL]) or "", "'skill'")
    tools = tools_of(row.take(TOOLS, "tools"))
    keys = frozenset().union(*(turn.unread for turn in turns))
    unread = row.unread | frozenset(f"{key} (of messages)" for key in keys)
    return Conversation(turns, given, tools, skill, form, unread)


def prompt_turns(row: Row, name: str) -> tuple[Turn, ...]:
    """The turns of a prompt: messages, or one of the user with what it is about."""
    value = row.columns[name]
    row.used.add(name)
    if isinstance(value, (list, tuple)):
        return turns_of(value, name)
    if not isinstance(value, str):
        raise DataError(f"'{name}' must be a non-empty list of messages, not {value!r:.60}")
    text = text_of(value, f"'{name}'")
    about = row.take([other for other in INPUTS if other != name], "input") if name != "prompt" else None
    if about is not None:
        about = text_of(about, "'input'")
        text = f"{text}\n{about}" if text else about
    return (Turn(Message("user", text)),)


def response_turns(value: Any, name: str) -> tuple[Turn, ...]:
    """The turns of a response: text, one message, or messages that end in an assistant turn."""
    if isinstance(value, Mapping):
        turns: tuple[Turn, ...] = (turn_of(value, f"'{name}'"),)
    elif isinstance(value, (list, tuple)):
        turns = turns_of(value, name)
    else:
        text = text_of(value, f"'{name}'")
        if not text:
            raise DataError(f"'{name}' is empty; there is nothing to learn from it")
        turns = (Turn(Message("assistant", text)),)
    if turns[-1].role != "assistant":
        raise DataError(f"'{name}' must end with an assistant turn, not {turns[-1].role}")
    return turns


def history_turns(value: Any) -> tuple[Turn, ...]:
    """Earlier turns: messages, or pairs of question and answer (LLaMA-Factory, ms-swift)."""
    if isinstance(value, str):
        value = from_json(value, "'history'")
    if not isinstance(value, (list, tuple)):
        raise DataError(f"'history' must be a list of [question, answer] pairs or of messages, not {value!r:.60}")
    if value and all(isinstance(item, Mapping) for item in value):
        return turns_of(value, "history")
    turns = []
    for number, pair in enumerate(value):
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise DataError(f"history[{number}] must be [question, answer] or a message, not {pair!r:.60}")
        for role, text in zip(("user", "assistant"), pair, strict=True):
            turns.append(Turn(Message(role, text_of(text, f"history[{number}]"))))
    return tuple(turns)


def with_system(turns: tuple[Turn, ...], system: str) -> tuple[Turn, ...]:
    """The turns with a system message before them.

    Raises:
        DataError: they begin with another one.
    """
    if turns and turns[0].role in ("system", "developer"):
        if turns[0].message.content != system:
            raise DataError(
                f"the column 'system' says {system!r:.40} and the conversation begins with "
                f"{turns[0].message.content!r:.40}; keep one"
            )
        return turns
    return (Turn(Message("system", system)), *turns)


def tools_of(value: Any) -> str:
    """The tools that a conversation offers, as canonical JSON of a list; empty where there are none.

    Args:
        value: a list of tools, or its JSON text. A tool given flat (name, description, parameters) is brought into the
            form that templates read, {type: function, function: ...}.
    """
    if isinstance(value, str):
        value = from_json(value, "'tools'")
    if not value:
        return ""
    if not isinstance(value, (list, tuple)):
        raise DataError(f"'tools' must be a list of tools, not {value!r:.60}")
    tools = []
    for number, tool in enumerate(value):
        tool = from_json(tool, f"tools[{number}]") if isinstance(tool, str) else tool
        if not isinstance(tool, Mapping):
            raise DataError(f"tools[{number}] must be an object with 'function', not {tool!r:.60}")
        if "function" not in tool and "name" in tool:
            tool = {"type": "function", "function": {key: tool[key] for key in tool if key != "type"}}
        if not isinstance(tool.get("function"), Mapping) or not isinstance(tool["function"].get("name"), str):
            raise DataError(f"tools[{number}] must be a function with a name, not {tool!r:.60}")
        tools.append(tool)
    text = canonical(tools)
    return text_of(text, "'tools'")


def _context(turn: Turn) -> Turn:
    return Turn(turn.message, False, turn.calls, turn.unread)


def _is_sharegpt(value: Any) -> bool:
    value = from_json(value, "") if isinstance(value, str) else value
    return "role" not in value[0]
