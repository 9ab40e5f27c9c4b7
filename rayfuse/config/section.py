"""What every section of a configuration is, and the kinds of values that several of them hold."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Union, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Tag,
    ValidationInfo,
    field_validator,
)

Dtype = Literal["float32", "bfloat16", "float16"]


def _without_secrets(value: str) -> str:
    """Refuse user names and passwords in a URL: the configuration is written into the run folder and the card."""
    if re.match(r"[a-z0-9+.-]+://[^/]*@", value):
        raise ValueError("has a user name or password in its URL; give credentials by the environment instead")
    return value


Place = Annotated[str, AfterValidator(_without_secrets)]
"""A path, hub id or URL."""


class Section(BaseModel):
    """Base of every section: frozen; unknown keys and numbers that are not finite are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _yes_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """`steps: yes` is a slip, not one step."""
        kind = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, bool) and {int, float} & {kind, *get_args(kind)}:
            raise ValueError(f"must be a number (is {value})")
        return value


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
