"""What a check found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class Finding:
    """One fault, or one remark that does not stop a run.

    Attributes:
        where: the key of the configuration it is about.
        text: what is wrong and what to do.
        fault: False for a remark.
    """

    where: str
    text: str
    fault: bool = True
