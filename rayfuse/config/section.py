"""What every section of a configuration is, and the kinds of values that several of them hold."""

from __future__ import annotations

import glob
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, Union, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Tag,
    ValidationInfo,
    field_validator,
    model_validator,
)

Dtype = Literal["float32", "bfloat16", "float16"]


def _without_secrets(value: str) -> str:
    """Refuse user names and passwords in a URL: the configuration is written into the run folder and the card."""
    if re.match(r"[a-z0-9+.-]+://[^/]*@", value):
        raise ValueError("has a user name or password in its URL; give credentials by the environment instead")
    return value


@dataclass(frozen=True)
class LocalPath:
    """Marks a key whose value may be a path of this machine.

    Attributes:
        new: the run makes it, or other nodes have it: it need not exist here.
        resolve: follow links; False for an interpreter, which a virtual environment knows by its link.
        inside: it is a name inside another path, and stays as it is.
    """

    new: bool = False
    resolve: bool = True
    inside: bool = False

    def absolute(self, path: str) -> str:
        """The path (`~/` and patterns too) made absolute; hub ids, URLs and, unless new, what does not exist stay."""
        if "://" in path or self.inside:
            return path
        local = Path(path).expanduser() if path.startswith("~/") else Path(path)
        exists = self.new or local.exists() or (glob.has_magic(path) and any(glob.iglob(str(local))))
        if not exists:
            return str(local) if path.startswith("~/") else path
        return str(local.resolve() if self.resolve and not glob.has_magic(path) else local.absolute())


Place = Annotated[str, AfterValidator(_without_secrets), LocalPath()]
"""A path, hub id or URL."""
NewPlace = Annotated[str, AfterValidator(_without_secrets), LocalPath(new=True)]
"""A path or URL of something that need not exist yet."""


class Section(BaseModel):
    """Base of every section: frozen; unknown keys and numbers that are not finite are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    shorthand: ClassVar[str] = ""
    """The key that a bare text in place of the section gives: `student: some/model` is `student: {model: ...}`."""

    @model_validator(mode="before")
    @classmethod
    def _opened(cls, value: Any) -> Any:
        return named(value, cls.shorthand) if cls.shorthand else value

    def with_paths(self, change: Callable[[LocalPath, str], str]) -> Self:
        """A copy in which `change` was applied to every path, also to those of the sections inside."""

        def changed(value: Any, mark: LocalPath | None) -> Any:
            if isinstance(value, Section):
                return value.with_paths(change)
            if isinstance(value, tuple):
                return tuple(changed(item, mark) for item in value)
            return change(mark, value) if mark is not None and isinstance(value, str) else value

        fields = {
            name: changed(getattr(self, name), _path_mark(field.annotation, field.metadata))
            for name, field in type(self).model_fields.items()
        }
        return self.model_copy(update=fields)

    @field_validator("*", mode="before")
    @classmethod
    def _yes_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """`steps: yes` is a slip, not one step."""
        kind = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, bool) and {int, float} & {kind, *get_args(kind)}:
            raise ValueError(f"must be a number (is {value})")
        return value


def _path_mark(kind: Any, metadata: Sequence[Any]) -> LocalPath | None:
    """How a key's values are paths; None where they are none."""
    marks = [item for item in metadata if isinstance(item, LocalPath)]
    if not marks and get_origin(kind) is Annotated:
        return _path_mark(get_args(kind)[0], kind.__metadata__)
    inner = (_path_mark(one, ()) for one in get_args(kind))
    return marks[0] if marks else next((mark for mark in inner if mark is not None), None)


def sections_in(kind: Any) -> Iterator[type[Section]]:
    """The sections that a key of this type holds."""
    if isinstance(kind, type) and issubclass(kind, Section):
        yield kind
    for inner in get_args(kind):
        yield from sections_in(inner)


def named(value: Any, key: str) -> Any:
    """A bare text in place of a section: the section with this one key (`student: some/model`)."""
    return {key: value} if isinstance(value, str) else value


def by_method(sections: Mapping[str, type[Section]], what: str = "") -> Any:
    """The type of a value that is one of `sections`: the name of a method, or a section with `method` and its knobs.

    Args:
        sections: by the name of their method.
        what: what errors say behind the method's name, for example " of a judge"; a stage is named by its place.
    """

    def method_of(value: Any) -> str:
        method = value.get("method") if isinstance(value, dict) else getattr(value, "method", None)
        return method if isinstance(method, str) else ""

    def as_section(value: Any) -> Any:
        value = named(value, "method")
        if isinstance(value, dict) and "method" not in value:
            raise ValueError(f"method is missing; there are: {', '.join(sections)}")
        if method_of(value) not in sections:
            method = value["method"] if isinstance(value, dict) else value
            raise ValueError(f"unknown method {method!r}{what}; there are: {', '.join(sections)}")
        return value

    kinds = tuple(Annotated[section, Tag(name)] for name, section in sections.items())
    return Annotated[Union[kinds], Discriminator(method_of), BeforeValidator(as_section)]  # noqa: UP007 (a tuple)
