"""docs/configuration.md: every key of a run's configuration, from the descriptions of the fields.

python -m rayfuse.config.reference > docs/configuration.md
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from enum import Enum
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from rayfuse.config import STAGES, Config, Stage

OPENING = """\
# Configuration

Every key of a run's YAML file. Written by `python -m rayfuse.config.reference` from the descriptions in
[`rayfuse/config/`](../rayfuse/config); a test compares the two. Keys that do not exist are refused. A value is valid,
or it is an error that names the key: nothing is adjusted silently. Any value can be changed on the command line:
`rayfuse fuse run.yaml stages.0.steps=100 data.limit=1000`.
"""


def configuration_page() -> str:
    """The page, as Markdown."""
    parts = [OPENING, *_section("", Config, set())]
    parts.append("## stages[]\n\nA stage is the name of its method, or a section with `method` and its keys.\n")
    parts.append(_table(Stage.model_fields.items(), intro="All stages have these keys.\n"))
    for name, stage in STAGES.items():
        own = [
            (key, field)
            for key, field in stage.model_fields.items()
            if key != "method" and not _same(field, Stage.model_fields.get(key))
        ]
        parts.append(f"### stages[]: {name}\n\n{_first_line(stage)}\n")
        parts.append(_table(own) if own else "No keys of its own.\n")
    return "\n".join(parts)


def _section(path: str, section: type[BaseModel], seen: set[type]) -> Iterator[str]:
    """The table of a section, then the sections in it that have not been shown yet."""
    yield f"## {path or 'The file'}\n\n{_first_line(section)}\n"
    yield _table(section.model_fields.items())
    for key, field in section.model_fields.items():
        for inner, many in _sections(field.annotation):
            if inner in seen or issubclass(inner, Stage):
                continue
            seen.add(inner)
            name = f"{path}.{key}" if path else key
            method = inner.model_fields.get("method")
            title = f"{name}{'[]' * many}" + (f": {method.default}" if method and _is_text(method.default) else "")
            yield from _section(title, inner, seen)


def _sections(kind: Any, many: bool = False) -> Iterator[tuple[type[BaseModel], bool]]:
    """The sections that a type holds, and whether it holds several of them."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        yield kind, many
        return
    for inner in get_args(kind):
        yield from _sections(inner, many or get_origin(kind) in (tuple, list))


def _table(fields: Any, intro: str = "") -> str:
    rows = [f"| `{key}` | {_kind(field)} | {_default(field)} | {_escaped(meaning(field))} |" for key, field in fields]
    return "\n".join(
        [*([intro] if intro else []), "| key | type | default | meaning |", "|---|---|---|---|", *rows, ""]
    )


def meaning(field: FieldInfo) -> str:
    """The field's description; without one, the opening of its section's."""
    if field.description:
        return field.description
    kinds = {inner for inner, _ in _sections(field.annotation)}
    common = next((kind for kind in kinds if all(issubclass(kind, other) or kind is other for other in kinds)), None)
    common = Stage if kinds and all(issubclass(kind, Stage) for kind in kinds) else common
    return _first_line(common).rstrip(".").replace("\n", " ") if common else ""


def _kind(field: FieldInfo) -> str:
    bounds = [
        f"{sign} {getattr(rule, name)}"
        for rule in field.metadata
        for name, sign in (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<="))
        if getattr(rule, name, None) is not None
    ]
    return _escaped(_name(field.annotation) + (f" ({', '.join(bounds)})" if bounds else ""))


def _name(kind: Any) -> str:
    """A type in a reader's words."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _name(inner[0])
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in inner)
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(_name(one) for one in inner if one is not NoneType))
    if origin in (tuple, list):
        return f"list of {_name(inner[0])}"
    if origin is dict:
        return f"{_name(inner[0])} -> {_name(inner[1])}"
    if isinstance(kind, type) and issubclass(kind, Enum):
        return ", ".join(f"`{one.value}`" for one in kind)
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return "stage" if issubclass(kind, Stage) else "section"
    names = {str: "text", int: "whole number", float: "number", bool: "true or false"}
    return names.get(kind, getattr(kind, "__name__", str(kind)))


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "needed"
    value = field.get_default(call_default_factory=True) if field.default_factory is None else field.default_factory()  # type: ignore[call-arg]
    if value is None or value is PydanticUndefined:
        return "none"
    if isinstance(value, BaseModel):
        return "see there"
    return f"`{json.dumps(value, default=str)}`" if not _is_text(value) else f"`{value}`"


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _same(field: FieldInfo, other: FieldInfo | None) -> bool:
    return other is not None and (field.default, field.description) == (other.default, other.description)


def _first_line(section: type[BaseModel]) -> str:
    return (section.__doc__ or "").strip().split("\n\n")[0].replace("\n    ", "\n")


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


if __name__ == "__main__":
    print(configuration_page(), end="")
