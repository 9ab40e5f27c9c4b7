"""The self-test of a teacher before a run trusts it."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from rayfuse.config.section import Section


class Parity(Section):
    """Whether a teacher's answers are compared with a plain forward of its own weights before they are used."""

    check: bool = Field(True, description="compare; false: trust the serving path as it is")
    tolerance: float | None = Field(
        None,
        gt=0,
        description="largest mean difference of log-probabilities (nats); default: by dtype, see teachers/parity.py",
    )


def _switch(value: Any) -> Any:
    return {"check": value} if isinstance(value, bool) else value


ParitySection = Annotated[Parity, BeforeValidator(_switch)]
"""A Parity section, or just true or false."""
