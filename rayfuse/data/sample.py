"""What a sample is: one conversation, or the compared responses to one prompt."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeVar

ROLES = ("system", "developer", "user", "assistant", "tool")
"""Roles of a message. Where a model has no `developer`, it is shown as `system` (data.messages)."""

PAIR = ("chosen", "rejected")
"""Keys of the two responses of a preference row."""


@dataclass(frozen=True)
class Message:
    """One turn of a conversation, with everything that a chat template may read of it.

    Attributes:
        role: one of ROLES.
        content: its text; None where the turn only calls tools.
        fields: the other keys that templates read (tool_calls, tool_call_id, name, reasoning_content ...), as canonical
            JSON of an object; empty where there are none. Text, so that a message can be hashed and compared.
    """

    role: str
    content: str | None
    fields: str = ""

    @property
    def text(self) -> str:
        """The content; empty where there is none."""
        return self.content or ""

    def as_dict(self) -> dict[str, Any]:
        """The message as chat templates take it."""
        return {"role": self.role, "content": self.content, **(json.loads(self.fields) if self.fields else {})}

    def identity(self) -> list[str | None]:
        """What names the message: role and content, and the fields where there are any."""
        return [self.role, self.content, self.fields] if self.fields else [self.role, self.content]


Turns = tuple[Message, ...]
"""The messages before a response."""


def canonical(value: Any) -> str:
    """JSON of a value whose text depends on nothing but the value: it is hashed and compared.

    Keys keep their order: templates write tools and arguments in the order in which they are given.
    """
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


@dataclass(frozen=True)
class Weights:
    """What the consensus says of a prompt and a response to it.

    Attributes:
        sample: p(the response is right), from 0 to 1; None where the row does not say.
        teachers: (name, p(that teacher is right on the prompt)) in the order of the names; None likewise.
        only: the one teacher that counts, where the row names one.
    """

    sample: float | None = None
    teachers: tuple[tuple[str, float], ...] | None = None
    only: str = ""

    def teacher(self, name: str) -> float | None:
        """A teacher's weight; None where the row does not say."""
        if self.only:
            return float(name == self.only)
        return next((weight for teacher, weight in self.teachers or () if teacher == name), None)


@dataclass(frozen=True)
class Sample:
    """One assistant turn.

    Attributes:
        messages: everything before the response; plain (role, content) pairs are taken too.
        response: the assistant's text, never empty.
        skill: an optional label that evaluation groups by.
        tools: the tools that the conversation offers, as canonical JSON of a list; empty where there are none.
        thought: what the model has thought before the response, with its marks: read, and not learned (data.thoughts).
        weights: how much it counts, and each teacher on it; None where the data do not say.
    """

    messages: Turns
    response: str
    skill: str = ""
    tools: str = ""
    thought: str = ""
    weights: Weights | None = None

    def __post_init__(self) -> None:
        if type(self.messages) is not tuple or not set(map(type, self.messages)) <= {Message}:
            messages = (item if isinstance(item, Message) else Message(*item) for item in self.messages)
            object.__setattr__(self, "messages", tuple(messages))

    @cached_property
    def key(self) -> str:
        """sha256 (hex) of the messages, the tools, thought and response: the sample's name in the signal store.

        How a model renders the messages is part of that model's fingerprint, so the two together name one answer.
        """
        named = [[message.identity() for message in self.messages], self.response]
        named += [self.tools] if self.tools or self.thought else []
        named += [self.thought] if self.thought else []
        return hashlib.sha256(json.dumps(named, ensure_ascii=False, separators=(",", ":")).encode()).hexdigest()

    def weighted(self, weights: Weights) -> Sample:
        """The same sample, which counts so; its key stays."""
        made = replace(self, weights=weights)
        if "key" in vars(self):
            vars(made)["key"] = self.key
        return made

    @property
    def prompt_key(self) -> str:
        """The key of its prompt alone, as `Prompt.sample.key`."""
        return replace(self, response="", thought="").key

    @property
    def turns(self) -> list[dict[str, Any]]:
        """The messages as chat templates take them."""
        return [message.as_dict() for message in self.messages]

    @property
    def offered_tools(self) -> list[dict[str, Any]] | None:
        """The tools as chat templates take them; None where there are none."""
        return json.loads(self.tools) if self.tools else None

    @property
    def plain_text(self) -> str:
        """The messages' texts, as a model without a chat template reads them."""
        return "\n\n".join(message.text for message in self.messages)


def conversation_samples(
    messages: Turns, responses: Mapping[int, str], skill: str = "", tools: str = ""
) -> list[Sample]:
    """A sample per response, with the messages before it.

    The keys are those of `Sample.key`, made of one hash that runs along the conversation: hashing all earlier messages
    anew for every turn is quadratic (31 s for 3,500 responses of 90 characters, this way 0.3 s).

    Args:
        messages: of the whole conversation.
        responses: by the index of the message that they take the place of.
        skill, tools: of all samples.
    """
    samples = []
    hashed = hashlib.sha256(b"[[")
    rest = f",{canonical(tools)}]" if tools else "]"
    for index, message in enumerate(messages):
        if index in responses:
            sample = Sample(messages[:index], responses[index], skill, tools)
            whole = hashed.copy()
            whole.update(f"],{canonical(sample.response)}{rest}".encode())
            vars(sample)["key"] = whole.hexdigest()  # where cached_property keeps it
            samples.append(sample)
        hashed.update(f"{',' if index else ''}{canonical(message.identity())}".encode())
    return samples


Compared = tuple[Sample, ...]
"""Responses to one prompt, in the order of a stage's `sides`: the chosen and the rejected one."""


Parsed = TypeVar("Parsed")


@dataclass(frozen=True)
class DataCounts:
    """What became of the rows; shown in the report and the model card.

    Attributes:
        rows: rows read.
        bad_rows: malformed rows left out, and `first_bad` the first of them.
        samples: samples that the run uses, each counted once.
        drawn: samples of an epoch, where data sets have weights; else as `samples`.
        too_long: samples dropped for their length, and `too_long_for` how many for which model: the first that they are
            too long for, the student before the teachers.
        unreadable: samples dropped because a model cannot read them exactly, and `first_unreadable` the first of them.
        cut: samples whose prompt is cut from the left for some model.
        calling_turns: assistant turns that call tools: context of later turns, nothing to learn from.
        context_turns: assistant turns that the data mark as context only (`weight: 0`, `train: false` ...).
        forms: rows by the form in which they were read.
        unread: rows by the column (or key of a message) that holds something which is not read.
    """

    rows: int = 0
    bad_rows: int = 0
    samples: int = 0
    drawn: int = 0
    too_long: int = 0
    unreadable: int = 0
    cut: int = 0
    calling_turns: int = 0
    context_turns: int = 0
    first_bad: str = ""
    first_unreadable: str = ""
    too_long_for: Mapping[str, int] = field(default_factory=dict)
    forms: Mapping[str, int] = field(default_factory=dict)
    unread: Mapping[str, int] = field(default_factory=dict)

    @property
    def lost(self) -> str:
        """What is left out, in words that follow the numbers of rows and samples; empty where nothing is."""
        models = ", ".join(f"{count:,} for {model}" for model, count in self.too_long_for.items())
        parts = (
            (self.bad_rows, "malformed rows skipped"),
            (self.too_long, f"too long, dropped ({models})"),
            (self.unreadable, "unreadable for a model, dropped"),
            (self.cut, "prompts cut"),
            (self.calling_turns, "turns that call tools, read as context and not learned"),
            (self.context_turns, "turns marked as context only, not learned"),
        )
        return "".join(f"; {count:,} {text}" for count, text in parts if count)


def add_counts(parts: Sequence[DataCounts]) -> DataCounts:
    """The counts of rows from several data sets."""

    forms: Counter[str] = Counter()
    unread: Counter[str] = Counter()
    for part in parts:
        forms.update(part.forms)
        unread.update(part.unread)

    return DataCounts(
        rows=sum(part.rows for part in parts),
        bad_rows=sum(part.bad_rows for part in parts),
        samples=sum(part.samples for part in parts),
        drawn=sum(part.drawn for part in parts),
        calling_turns=sum(part.calling_turns for part in parts),
        context_turns=sum(part.context_turns for part in parts),
        first_bad=next((part.first_bad for part in parts if part.first_bad), ""),
        forms=dict(forms),
        unread=dict(unread),
    )
