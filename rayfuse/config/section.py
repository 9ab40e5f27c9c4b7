"""What every section of a configuration is, and the kinds of values that several of them hold."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict

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


def named(value: Any, key: str) -> Any:
    """A bare text in place of a section: the section with this one key (`student: some/model`)."""
    return {key: value} if isinstance(value, str) else value
