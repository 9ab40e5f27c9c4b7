"""What a sample is: one conversation, or the compared responses to one prompt."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

ROLES = ("system", "user", "assistant", "tool")


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
    """JSON of a value whose text depends on nothing but the value: it is hashed and compared."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), sort_keys=True)


@dataclass(frozen=True)
class Sample:
    """One assistant turn.

    Attributes:
        messages: everything before the response; plain (role, content) pairs are taken too.
        response: the assistant's text, never empty.
        skill: an optional label that evaluation groups by.
        tools: the tools that the conversation offers, as canonical JSON of a list; empty where there are none.
    """

    messages: Turns
    response: str
    skill: str = ""
    tools: str = ""

    def __post_init__(self) -> None:
        messages = (item if isinstance(item, Message) else Message(*item) for item in self.messages)
        object.__setattr__(self, "messages", tuple(messages))

    @cached_property
    def key(self) -> str:
        """sha256 (hex) of the messages, the tools and the response: the sample's name in the signal store.

        How a model renders the messages is part of that model's fingerprint, so the two together name one answer.
        """
        named = [[message.identity() for message in self.messages], self.response]
        named += [self.tools] if self.tools else []
        return hashlib.sha256(json.dumps(named, ensure_ascii=False, separators=(",", ":")).encode()).hexdigest()

    @property
    def turns(self) -> list[dict[str, Any]]:
        """The messages as chat templates take them."""
        return [message.as_dict() for message in self.messages]

    @property
    def plain_text(self) -> str:
        """The messages' texts, as a model without a chat template reads them."""
        return "\n\n".join(message.text for message in self.messages)


Compared = tuple[Sample, ...]
"""Responses to one prompt, in the order of a stage's `sides`: the chosen and the rejected one."""


Parsed = TypeVar("Parsed")


@dataclass(frozen=True)
class DataCounts:
    """What became of the rows; shown in the report and the model card.

    Attributes:
        rows: rows read.
        bad_rows: malformed rows left out, and `first_bad` the first of them.
        samples: samples that the run uses.
        too_long: samples dropped for their length.
        unreadable: samples dropped because a model cannot read them exactly, and `first_unreadable` the first of them.
        cut: samples whose prompt is cut from the left.
    """

    rows: int = 0
    bad_rows: int = 0
    samples: int = 0
    too_long: int = 0
    unreadable: int = 0
    cut: int = 0
    first_bad: str = ""
    first_unreadable: str = ""
