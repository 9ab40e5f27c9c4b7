"""Data: rows of a file or hub data set -> samples.

A sample is one assistant turn: the messages before it and the response text. Every model renders the messages with its
own chat template; what all models share is the response, as UTF-8 bytes. A conversation with several assistant turns
becomes several samples, each with exactly the prompt that the model would see when it is asked for that turn.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import fsspec

from rayfuse.config import Data
from rayfuse.data.sample import PAIR, ROLES, Compared, DataCounts, Message, Parsed, Sample, Turns
from rayfuse.errors import DataError

# --- rows -> samples ------------------------------


def read_samples(data: Data, *, first: int | None = None) -> tuple[list[Sample], DataCounts]:
    """Read and check a data set of conversations, or of prompts and responses.

    Args:
        data: where it is, and what to do with a malformed row.
        first: read at most this many rows (a quick check), besides `data.limit`.

    Raises:
        DataError: the data set cannot be read or holds no sample; or a row is malformed and `on_bad_row` is "error".
            The message names file, line (or row) and reason.
    """
    return read_parsed(data, first, samples_of_row)


def read_preferences(
    data: Data, sides: Sequence[str] = PAIR, *, first: int | None = None
) -> tuple[list[Compared], DataCounts]:
    """Read and check a data set of preferences: `prompt` and the responses named by `sides`; else as read_samples."""
    return read_parsed(data, first, lambda row: [compared_of_row(row, sides)])


def read_parsed(data: Data, first: int | None, parse: Callable[[Any], list[Parsed]]) -> tuple[list[Parsed], DataCounts]:
    """What `parse` makes of each row (it raises DataError on a malformed one), of the `first` rows where given."""
    limit = min(filter(None, (data.limit, first)), default=None)
    parsed: list[Parsed] = []
    rows = bad = 0
    first_bad = ""
    for place, row in read_rows(data, limit):
        rows += 1
        try:
            if isinstance(row, DataError):
                raise row
            parsed += parse(row)
        except DataError as error:
            fault = f"{place}: {error}"
            if data.on_bad_row == "error":
                raise DataError(
                    f"{fault}. Correct the row, or set data.on_bad_row: skip to leave such rows out"
                ) from None
            bad += 1
            first_bad = first_bad or fault
    if not parsed:
        reason = f"all {rows} rows are malformed, the first: {first_bad}" if bad else "it has no rows"
        raise DataError(f"the data set {data.path} gives no sample: {reason}")
    return parsed, DataCounts(rows=rows, bad_rows=bad, samples=len(parsed), first_bad=first_bad)


def read_rows(data: Data, limit: int | None = None) -> Iterator[tuple[str, Mapping[str, Any] | DataError]]:
    """Yield (place, row) pairs, where a place is what a person needs to find the row: `file:line` or `name, row n`.

    JSON lines are read one by one, so that a broken line is named and the rest can still be used (its row is then the
    error itself); every other format goes through the `datasets` library.
    """
    if data.path.endswith((".jsonl", ".ndjson")):
        yield from _read_json_lines(data.path, limit)
        return
    import datasets

    suffix = data.path.rsplit(".", 1)[-1]
    try:
        if suffix in ("json", "parquet"):
            table = datasets.load_dataset(suffix, data_files=data.path, split="train")
        elif Path(data.path).is_dir() and (Path(data.path) / "dataset_info.json").exists():
            table = datasets.load_from_disk(data.path)
        elif (Path(data.path) / "dataset_dict.json").exists():
            table = datasets.load_from_disk(data.path)[data.split]
        else:
            table = datasets.load_dataset(data.path, data.name, split=data.split, revision=data.revision)
    except Exception as error:
        raise DataError(f"cannot read the data set {data.path}: {type(error).__name__}: {error}") from error
    for number, row in enumerate(table):
        if limit is not None and number >= limit:
            return
        yield f"{data.path}, row {number}", row


def _read_json_lines(path: str, limit: int | None) -> Iterator[tuple[str, Mapping[str, Any] | DataError]]:
    try:
        with fsspec.open(path, "rb") as file:
            count = 0
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                if limit is not None and count >= limit:
                    return
                count += 1
                try:
                    yield f"{path}:{number}", json.loads(line)
                except (ValueError, RecursionError) as error:
                    yield f"{path}:{number}", DataError(f"not valid JSON in UTF-8 ({error})")
    except (OSError, ImportError, ValueError) as error:  # ValueError: a URL of an unknown kind
        raise DataError(f"cannot read the data set {path}: {error}") from error


def samples_of_row(row: Any) -> list[Sample]:
    """The samples of one row: one per assistant turn of `messages`, or the one of `prompt` and `response`.

    Raises:
        DataError: the row has neither form; a role, a content or the response is missing, empty or not text.
    """
    if not isinstance(row, Mapping):
        raise DataError(f"a row must be an object with keys, not {type(row).__name__}")
    skill = row.get("skill") or ""
    if not isinstance(skill, str):
        raise DataError(f"'skill' must be text, not {type(skill).__name__}")
    _encodable(skill, "'skill'")
    if row.get("messages") is not None:
        messages = messages_of(row["messages"], "messages")
        turns = [index for index, message in enumerate(messages) if message.role == "assistant"]
        if not turns:
            raise DataError("'messages' has no assistant turn to learn from")
        return [Sample(messages[:i], _response(messages[i].content, "an assistant turn"), skill) for i in turns]
    if "prompt" in row and "response" in row:
        return [Sample(prompt_of(row["prompt"]), _response(row["response"], "'response'"), skill)]
    raise DataError(f"a row needs 'messages', or 'prompt' and 'response'; it has {sorted(map(str, row))}")


def compared_of_row(row: Any, sides: Sequence[str] = PAIR) -> Compared:
    """The responses of one row: `prompt` (text or messages), and each side (text, or messages ending in it).

    Raises:
        DataError: a key is missing, something is not text, or the rejected response is also a chosen one.
    """
    if not isinstance(row, Mapping) or not {"prompt", *sides} <= set(row):
        has = sorted(map(str, row)) if isinstance(row, Mapping) else type(row).__name__
        needs = ", ".join(f"'{side}'" for side in ("prompt", *sides[:-1]))
        raise DataError(f"a preference row needs {needs} and '{sides[-1]}'; it has {has}")
    prompt = prompt_of(row["prompt"])
    responses = []
    for name in sides:
        value = row[name]
        if isinstance(value, (list, tuple)):
            last = messages_of(value, name)[-1]
            if last.role != "assistant":
                raise DataError(f"'{name}' must end with an assistant turn, not {last.role}")
            value = last.content
        responses.append(_response(value, f"'{name}'"))
    for name, response in zip(sides[:-1], responses, strict=False):
        if response == responses[-1]:
            raise DataError(f"'{name}' and '{sides[-1]}' are the same: {response!r:.60}")
    return tuple(Sample(prompt, response) for response in responses)


def prompt_of(value: Any) -> Turns:
    """A prompt's messages: those given, or one of the user."""
    return (Message("user", _encodable(value, "prompt")),) if isinstance(value, str) else messages_of(value, "prompt")


def messages_of(value: Any, name: str) -> Turns:
    """Checked messages; `name` is what an error calls them."""
    if not isinstance(value, (list, tuple)) or not value:
        raise DataError(f"'{name}' must be a non-empty list of messages, not {value!r:.60}")
    messages = []
    for index, message in enumerate(value):
        if not isinstance(message, Mapping):
            raise DataError(f"{name}[{index}] must be an object with 'role' and 'content', not {message!r:.60}")
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise DataError(f"{name}[{index}]: role {role!r} is none of {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise DataError(f"{name}[{index}]: content must be text, not {type(content).__name__}")
        _encodable(content, f"{name}[{index}]")
        messages.append(Message(role, content))
    return tuple(messages)


def _response(value: Any, name: str) -> str:
    text = text_of(value, name)
    if not text:
        raise DataError(f"{name} is empty; there is nothing to learn from it")
    return text


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
