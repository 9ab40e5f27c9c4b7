"""Turns: one message of a row, whatever its keys are called, checked and brought into one form.

Nothing of a message is lost without a word: a key is read, or is known to say nothing to a model and is counted as not
read, or the message is refused by its name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rayfuse.data.sample import ROLES, Message, canonical
from rayfuse.errors import DataError

ROLE_KEYS = ("role", "from", "speaker")
CONTENT_KEYS = ("content", "value", "text")
THOUGHT_KEYS = ("reasoning_content", "reasoning", "thinking", "thought")
"""Names of a message's thought; it is kept under the first."""
MARK_KEYS = ("weight", "train", "trainable", "training", "loss_mask", "loss", "learn")
"""Names of the mark that says whether an assistant turn is learned (1, true) or only context (0, false)."""
FIELD_KEYS = ("tool_calls", "tool_call_id", "name")
"""Keys that chat templates read besides role, content and thought."""
_METADATA_KEYS = """
id message_id uuid guid hash index idx turn turn_id turn_index parent parent_id children created created_at date time
timestamp updated_at source url model model_name model_id lang language country tokens token_count num_tokens length
usage finish_reason stop_reason logprobs score scores rating ratings reward rank labels emotion review_count metadata
meta annotations cache_control status toxic toxicity redacted markdown
"""
METADATA_KEYS = frozenset(_METADATA_KEYS.split())
"""Keys of a message that say nothing to a model: they are counted as not read."""

OTHER_ROLES = {
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "function": "tool",
    "observation": "tool",
    "tool_response": "tool",
    "tool_result": "tool",
    "function_response": "tool",
    "ipython": "tool",
}
"""Other names of the roles (ShareGPT, OpenAssistant, Gemini, Llama, functions of old data)."""
_CALLING_ROLES = ("function_call", "tool_call")
"""Roles of a turn whose content is a call, as JSON of name and arguments."""

_TEXT_PARTS = ("text", "input_text", "output_text")
_THOUGHT_PARTS = ("thinking", "reasoning")


@dataclass(frozen=True)
class Turn:
    """One message, and what the data say about learning it.

    Attributes:
        message: the message.
        learn: False for an assistant turn that is marked as context only.
        calls: whether it calls tools. Such a turn is context: each model writes calls in a form of its own, and a model
            that learned the text beside a call, and then to end its turn, would learn not to call.
        unread: keys that hold something which is not read.
    """

    message: Message
    learn: bool = True
    calls: bool = False
    unread: frozenset[str] = frozenset()

    @property
    def role(self) -> str:
        """The message's role."""
        return self.message.role

    @property
    def response(self) -> str:
        """The text that a model writes for this turn: a thought, where there is one, and the content."""
        thought = json.loads(self.message.fields).get(THOUGHT_KEYS[0]) if self.message.fields else None
        return f"<think>\n{thought.strip()}\n</think>\n\n{self.message.text}" if thought else self.message.text


def turns_of(value: Any, name: str) -> tuple[Turn, ...]:
    """Checked turns of a list of messages (or its JSON text, as in .csv files); `name` is what an error calls it.

    Raises:
        DataError: it is no such list, or a message is malformed; the message is named by its place.
    """
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = from_json(value, f"'{name}'")
    if not isinstance(value, (list, tuple)) or not value:
        raise DataError(f"'{name}' must be a non-empty list of messages, not {value!r:.60}")
    return tuple(turn_of(message, f"{name}[{index}]") for index, message in enumerate(value))


def turn_of(value: Any, name: str) -> Turn:
    """One checked turn; `name` is what an error calls it.

    Raises:
        DataError: a role, content or key is missing, unknown, or not of its kind.
    """
    if not isinstance(value, Mapping):
        raise DataError(f"{name} must be an object with 'role' and 'content', not {value!r:.60}")
    keys = {key: item for key, item in value.items() if item is not None}
    said_role = _pop(keys, ROLE_KEYS, name)
    role = OTHER_ROLES.get(said_role, said_role) if isinstance(said_role, str) else said_role
    if role not in ROLES:
        raise DataError(f"{name}: role {said_role!r} is none of {', '.join(ROLES)} (or {', '.join(OTHER_ROLES)})")
    content, part_thought = content_of(_pop(keys, CONTENT_KEYS, name), name)
    thought = _thought(_pop(keys, THOUGHT_KEYS, name), part_thought, name)
    mark = _pop(keys, MARK_KEYS, name)
    learn = mark is None or is_learned(mark, name)
    if mark is not None and learn and role != "assistant":
        raise DataError(f"{name} is a {role} turn marked to be learned; only assistant turns are: leave the mark out")
    calls = _calls(keys, name)
    if said_role in _CALLING_ROLES:
        calls, content = _normal_calls(from_json(content or "", f"{name}: a call"), name), None
    if calls and role != "assistant":
        raise DataError(f"{name} is a {role} turn with tool_calls; only assistant turns call tools")
    if thought and role != "assistant":
        raise DataError(f"{name} is a {role} turn with a thought; only assistant turns think")
    if content is None and not calls:
        raise DataError(f"{name}: content must be text, not NoneType")
    fields: dict[str, Any] = {"tool_calls": calls} if calls else {}
    for key in ("tool_call_id", "name"):
        if keys.get(key) not in (None, ""):
            fields[key] = text_of(keys[key], f"{name}: {key}")
        keys.pop(key, None)
    if thought:
        fields[THOUGHT_KEYS[0]] = thought
    unread = _refuse_unknown(keys, name)
    written = canonical(fields) if fields else ""
    _encodable(written, f"{name}")
    return Turn(Message(str(role), content, written), learn, bool(calls), unread)


def is_learned(mark: Any, name: str) -> bool:
    """Whether a mark says that something is learned.

    Raises:
        DataError: it is neither 0 nor 1, false nor true.
    """
    if not isinstance(mark, (bool, int, float)) or mark not in (0, 1):
        marks = ", ".join(MARK_KEYS)
        raise DataError(f"{name}: the mark ({marks}) must be 1 or true (learned), 0 or false (context), not {mark!r}")
    return bool(mark)


def content_of(value: Any, name: str) -> tuple[str | None, str]:
    """The text of a content, and the thought among its parts; None where there is no content.

    Args:
        value: text, null, or a list of parts, of which text parts are joined.
        name: what an error calls the message.

    Raises:
        DataError: it is neither, or holds a part that is not text (an image, audio, a file).
    """
    if value is None:
        return None, ""
    if not isinstance(value, (list, tuple)):
        return text_of(value, f"{name}: content"), ""
    texts, thoughts = [], []
    for number, part in enumerate(value):
        where = f"{name}: part {number} of the content"
        if isinstance(part, str):
            texts.append(text_of(part, where))
            continue
        if not isinstance(part, Mapping):
            raise DataError(f"{where} must be text or an object with 'type', not {type(part).__name__}")
        held = {key: item for key, item in part.items() if item is not None and key not in METADATA_KEYS}
        kind = held.pop("type", "text")
        if kind in _TEXT_PARTS and set(held) == {"text"}:
            texts.append(text_of(held["text"], where))
        elif kind in _THOUGHT_PARTS and len(set(held) - {"signature"}) == 1:
            held.pop("signature", None)
            thoughts.append(text_of(next(iter(held.values())), where))
        else:
            raise DataError(
                f"{where} is of type {kind!r} with {sorted(map(str, held))}; rayfuse reads text only: take such parts "
                "out (tool calls belong in `tool_calls`), or leave the row out"
            )
    return "".join(texts), "".join(thoughts)


def _pop(keys: dict[str, Any], names: Sequence[str], place: str) -> Any:
    """Take what stands under one of several names; the same under two of them is once, different values are refused."""
    found = {name: keys.pop(name) for name in names if name in keys}
    values = list(found.values())
    if any(value != values[0] for value in values[1:]):
        # "thinking": "" beside "reasoning_content": "...": what is empty says nothing.
        values = [value for value in values if value != ""]
        if len(values) > 1:
            raise DataError(f"{place}: {' and '.join(map(repr, found))} say different things; keep one")
    return values[0] if values else None


def _thought(value: Any, from_parts: str, name: str) -> str:
    thought = text_of(value, f"{name}: {THOUGHT_KEYS[0]}") if value is not None else ""
    if thought and from_parts and thought != from_parts:
        raise DataError(f"{name} has a thought as a key and another among the parts of its content; keep one")
    return thought or from_parts


def _calls(keys: dict[str, Any], name: str) -> list[Any]:
    """The tool calls of a message (or the one function call of old data), in the nested form; empty where none."""
    calls, old = keys.pop("tool_calls", None), keys.pop("function_call", None)
    if calls and old:
        raise DataError(f"{name} has tool_calls and function_call; keep the first")
    if isinstance(calls, str) and calls:
        calls = from_json(calls, f"{name}: tool_calls")
    return _normal_calls(calls or old, name) if calls or old else []


def _normal_calls(value: Any, name: str) -> list[Any]:
    calls = value if isinstance(value, (list, tuple)) else [value]
    return [_normal_call(call, f"{name}: tool call {number}") for number, call in enumerate(calls)]


def _normal_call(call: Any, name: str) -> dict[str, Any]:
    """{id, type, function: {name, arguments: an object}}: the form that transformers describes for templates."""
    if not isinstance(call, Mapping):
        raise DataError(f"{name} must be an object with 'function', not {call!r:.60}")
    outer = {key: value for key, value in call.items() if value is not None and key not in METADATA_KEYS - {"id"}}
    inner = outer.pop("function", None)
    if inner is None or isinstance(inner, str):  # {"name": ..., "arguments": ...} without the level `function`
        inner = {"name": inner} if inner else {}
        inner |= {key: outer.pop(key) for key in ("name", "arguments", "parameters") if key in outer}
    if not isinstance(inner, Mapping):
        raise DataError(f"{name}: 'function' must be an object, not {type(inner).__name__}")
    inner = {key: value for key, value in inner.items() if value is not None}
    called = text_of(inner.pop("name", None), f"{name}: the function's name")
    arguments = inner.pop("arguments", inner.pop("parameters", {}))
    if isinstance(arguments, str):
        arguments = from_json(arguments, f"{name}: its arguments") if arguments.strip() else {}
    if not isinstance(arguments, Mapping):
        raise DataError(f"{name}: arguments must be an object or its JSON text, not {arguments!r:.60}")
    call_id, kind = outer.pop("id", None), outer.pop("type", "function")
    unknown = sorted(map(str, [*outer, *inner]))
    if unknown or kind != "function":
        raise DataError(f"{name}: only calls of functions with name, arguments and id are read, not {kind} {unknown}")
    named = {"id": text_of(call_id, f"{name}: id")} if call_id not in (None, "") else {}
    return {**named, "type": "function", "function": {"name": called, "arguments": dict(arguments)}}


def _refuse_unknown(keys: Mapping[str, Any], name: str) -> frozenset[str]:
    """The keys that are known to say nothing to a model; any other that holds something is refused."""
    held = {str(key) for key, value in keys.items() if value not in ("", [], {})}
    unknown = sorted(held - METADATA_KEYS)
    if unknown:
        raise DataError(
            f"{name} has the key {unknown[0]!r}, which is not read: take it out of the data if it says nothing to a "
            f"model; read are {', '.join((*ROLE_KEYS[:1], *CONTENT_KEYS[:1], *FIELD_KEYS, *THOUGHT_KEYS, *MARK_KEYS))}"
        )
    return frozenset(held)


def from_json(text: str, name: str) -> Any:
    """The value of a JSON text.

    Raises:
        DataError: it is not JSON.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{name} must be JSON, not {text!r:.60} ({error})") from None


def text_of(value: Any, name: str) -> str:
    """Checked text; `name` is what an error calls it."""
    if not isinstance(value, str):
        raise DataError(f"{name} must be text, not {type(value).__name__}")
    return _encodable(value, name)


def _encodable(text: str, name: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{name} is not valid Unicode (half a surrogate pair at character {error.start})") from None
    return text
