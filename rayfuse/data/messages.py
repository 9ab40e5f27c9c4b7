"""Messages in the form that one chat template reads.

Data come in one form and templates want several: the arguments of a tool call as an object or as JSON text, a turn
that only calls tools with no content, a null or an empty one, contents as texts or as lists of parts. Which form a
template renders right is found by giving it a marked conversation and looking at what it writes. What it renders right
as given is left as given, so its text is that of `apply_chat_template`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from rayfuse.errors import DataError

MARK = "rayfuse-marks-this"
_CALL = "rayfuse01"
_REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names of a message's thought; templates read the first or the second."""

_WITH_THOUGHT = re.compile(r"\s*<think>\n*(.*?)\n*</think>\n*(.*)", re.DOTALL)

Null = Literal["absent", "null", "empty"]
NULLS: tuple[Null, ...] = ("absent", "null", "empty")
"""How a turn without content is given: without the key (as transformers >= 5.22 does), with null, or with no text."""


@dataclass(frozen=True)
class CallForms:
    """How a template reads turns that call tools.

    Attributes:
        objects, texts: whether it writes arguments right that are objects, or JSON text; neither where it shows none.
        null: the form of a content that is null.
        empty: whether it shows the calls of a turn whose content is an empty text.
        short_ids: whether it insists on ids of nine letters and digits.
    """

    objects: bool
    texts: bool
    null: Null
    empty: bool
    short_ids: bool


class Forms:
    """The forms that one template reads, each found when it is first needed.

    Args:
        text: the template's source.
        write: the template's text of a conversation, with the assistant's turn opened; it may raise anything.
    """

    def __init__(self, text: str, write: Callable[[Sequence[Mapping[str, Any]]], str]) -> None:
        self._write = write
        self.knows_developer = "developer" in text

    def fit(self, turns: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The conversation in the template's form; the turns given are not changed.

        Raises:
            DataError: the arguments of a tool call are text that is not JSON, and the template reads objects.
        """
        fitted = [self._turn(turn) for turn in turns]
        if any("tool_calls" in turn or turn["role"] == "tool" for turn in fitted) and self.calls.short_ids:
            return _with_short_ids(fitted)
        return fitted

    def _turn(self, turn: Mapping[str, Any]) -> dict[str, Any]:
        fitted = {key: value for key, value in turn.items() if value is not None and (key, value) != ("tool_calls", [])}
        if fitted["role"] == "developer" and not self.knows_developer:
            fitted["role"] = "system"
        thought = next((fitted[key] for key in _REASONING if key in fitted), None)
        if thought is not None:
            fitted = {"thinking": thought, **fitted, "reasoning_content": thought}
        elif fitted["role"] == "assistant":
            fitted = self._thought(fitted)
        calls = fitted.get("tool_calls")
        if calls:
            fitted["tool_calls"] = [self._call(call) for call in calls]
        content = fitted.get("content")
        if content is None or (content == "" and calls and not self.calls.empty):
            fitted = _with_null(fitted, self.calls.null)
        if self.parts and isinstance(fitted.get("content"), str):
            fitted["content"] = [{"type": "text", "text": fitted["content"]}]
        return fitted

    def _thought(self, turn: dict[str, Any]) -> dict[str, Any]:
        """A turn whose thought is in a field of its own, where the template would open a second one before it."""
        found = _WITH_THOUGHT.fullmatch(turn.get("content") or "")
        if found is None or not self.thought_apart:
            return turn
        return {**turn, "thinking": found[1], "content": found[2], "reasoning_content": found[1]}

    def _call(self, call: Mapping[str, Any]) -> dict[str, Any]:
        """A call in the nested form that all templates read, its arguments as an object or as text."""
        if "function" not in call:
            inner = {key: call[key] for key in ("name", "arguments") if key in call}
            call = {"type": "function", **{key: call[key] for key in call if key not in inner}, "function": inner}
        function = dict(call["function"])
        arguments = function.get("arguments")
        if isinstance(arguments, str) and self.calls.objects and not self.calls.texts:
            try:
                function["arguments"] = json.loads(arguments)
            except ValueError as error:
                raise DataError(f"the arguments of a tool call are not JSON ({error}): {arguments!r:.60}") from None
        elif isinstance(arguments, Mapping) and self.calls.texts and not self.calls.objects:
            function["arguments"] = json.dumps(arguments, ensure_ascii=False)
        return {**call, "function": function}

    @cached_property
    def parts(self) -> bool:
        """Whether the template shows a content only where it is a list of parts, as templates with images do."""
        as_parts: Any = [{"type": "text", "text": MARK}]
        shown = (MARK in self._try([{"role": "user", "content": content}]) for content in (MARK, as_parts))
        return not next(shown) and next(shown)

    @cached_property
    def thought_apart(self) -> bool:
        """Whether the template opens a thought of its own before an earlier turn's text that begins with one."""
        asked = self._content("Hello")
        turns = [asked, {**self._content(f"<think>\n{MARK}\n</think>\n\nHi."), "role": "assistant"}, asked]
        before, found, _ = self._try(turns).partition(MARK)
        return bool(found) and before.count("<think>") > 1

    def _content(self, text: str) -> dict[str, Any]:
        """A message of the user, for trying."""
        return {"role": "user", "content": [{"type": "text", "text": text}] if self.parts else text}

    @cached_property
    def calls(self) -> CallForms:
        """How the template reads turns that call tools."""
        for null in NULLS:
            objects, texts = self._right(null, as_text=False), self._right(null, as_text=True)
            if objects or texts:
                as_text = not objects
                empty = self._right("empty", as_text=as_text)
                short = not self._called(null, as_text=as_text, call_id=f"call_{_CALL}_of_another_length")
                return CallForms(objects, texts, null, empty, short)
        accepted = (null for null in NULLS if "None" not in (self._called(null, as_text=False) or "None"))
        return CallForms(False, False, next(accepted, "absent"), True, False)

    def _right(self, null: Null, *, as_text: bool) -> bool:
        """Whether a call is shown: text as it is, an object not as Python writes dictionaries."""
        written = self._called(null, as_text=as_text)
        if "None" in written:
            return False
        if as_text:
            return f'{{"city": "{MARK}"}}' in written
        return MARK in written and "{'city'" not in written

    def _called(self, null: Null, *, as_text: bool, call_id: str = _CALL) -> str:
        arguments: Any = {"city": MARK}
        function = {"name": "weather", "arguments": json.dumps(arguments) if as_text else arguments}
        call = {"id": call_id, "type": "function", "function": function}
        asked = self._content("Hello")
        return self._try(
            [
                asked,
                _with_null({"role": "assistant", "tool_calls": [call]}, null),
                {"role": "tool", "tool_call_id": call_id, "name": "weather", "content": asked["content"]},
            ]
        )

    def _try(self, turns: Sequence[Mapping[str, Any]]) -> str:
        """What the template writes; empty where it refuses."""
        try:
            return self._write(turns)
        except Exception:  # templates are programs: they raise anything
            return ""


def _with_null(turn: Mapping[str, Any], null: Null) -> dict[str, Any]:
    turn = {key: value for key, value in turn.items() if key != "content"}
    return turn if null == "absent" else {**turn, "content": None if null == "null" else ""}


def _with_short_ids(turns: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Ids of nine letters and digits, made from the ids given; results without one take those of the calls in order."""
    waiting: list[str] = []
    fitted = []
    for index, turn in enumerate(turns):
        if "tool_calls" in turn:
            ids = [_short(call.get("id") or f"{index}.{n}") for n, call in enumerate(turn["tool_calls"])]
            calls = [{**call, "id": short} for call, short in zip(turn["tool_calls"], ids, strict=True)]
            waiting, turn = ids, {**turn, "tool_calls": calls}
        elif turn["role"] == "tool":
            given = turn.get("tool_call_id")
            short = _short(given) if given else next(iter(waiting), _short(str(index)))
            waiting = [other for other in waiting if other != short]
            turn = {**turn, "tool_call_id": short}
        fitted.append(turn)
    return fitted


def _short(call_id: Any) -> str:
    name = str(call_id)
    return name if re.fullmatch("[a-zA-Z0-9]{9}", name) else hashlib.sha256(name.encode()).hexdigest()[:9]
