"""What of a conversation a model's prompt shows: marks are put into everything, and looked for in the prompt.

Templates leave out what they do not know, most of them without a word: tools, the results of tools, a system message,
the text beside a call. Two models then answer different questions.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

from rayfuse.data.sample import Message, Sample, canonical
from rayfuse.errors import DataError

_NAMES = {
    "system": "the system message",
    "developer": "the developer's message",
    "user": "a message of the user",
    "assistant": "an earlier answer",
    "tool": "the result of a tool",
}


def shape(sample: Sample) -> Hashable:
    """What decides whether a template can show a conversation: the order of its messages, and what each has."""
    turns = tuple((turn["role"], _kind(turn.get("content")), len(_calls(turn))) for turn in sample.turns)
    return turns, bool(sample.tools)


def missing(sample: Sample, prompt_text: Callable[[Sample], str]) -> tuple[str, ...]:
    """The parts of a conversation of this shape that its prompt does not show, in words, each once."""
    marks = _Marks()
    turns = tuple(marks.turn(turn) for turn in sample.turns)
    tools = canonical([_tool(marks.new("the tools"))]) if sample.tools else ""
    try:
        text = prompt_text(Sample(turns, "Yes.", tools=tools))
    except DataError:  # rendering the sample itself says so
        return ()
    return tuple(dict.fromkeys(name for mark, name in marks.names.items() if mark not in text))


@dataclass
class _Marks:
    """The marks given out so far, by what holds them, and the ids of the calls that wait for a result."""

    names: dict[str, str] = field(default_factory=dict)
    waiting: list[str] = field(default_factory=list)

    def new(self, name: str) -> str:
        mark = f"rayfuse{len(self.names):03}mark"
        self.names[mark] = name
        return mark

    def turn(self, turn: dict[str, Any]) -> Message:
        """The turn with marks in place of its words."""
        content, calls = turn.get("content"), _calls(turn)
        fields: dict[str, Any] = {}
        if content:
            content = self.new("the text beside a tool call" if calls else _NAMES[turn["role"]])
        if calls:
            values = [self.new("a tool call") for _ in calls]
            self.waiting = [f"call{len(self.names):02}{n:03}" for n in range(len(calls))]
            fields["tool_calls"] = [_call(*pair) for pair in zip(self.waiting, values, strict=True)]
        if turn["role"] == "tool":
            fields["tool_call_id"] = self.waiting.pop(0) if self.waiting else "call00000"
            fields["name"] = "weather"
        return Message(turn["role"], content, canonical(fields) if fields else "")


def _call(call_id: str, value: str) -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": "weather", "arguments": {"city": value}}}


def _tool(name: str) -> dict[str, Any]:
    city = {"type": "string", "description": "its name"}
    parameters = {"type": "object", "properties": {"city": city}, "required": ["city"]}
    return {"type": "function", "function": {"name": name, "description": "tells", "parameters": parameters}}


def _calls(turn: dict[str, Any]) -> list[Any]:
    return turn.get("tool_calls") or []


def _kind(content: Any) -> str:
    return "null" if content is None else "text" if content else "empty"
