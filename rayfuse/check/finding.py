"""What a check found."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """One fault, a remark that does not stop a run, or a note.

    Attributes:
        where: the key of the configuration it is about.
        text: what is wrong and what to do.
        fault: False for a remark.
        note: True for what is only shown: neither a fault nor a remark.
    """

    where: str
    text: str
    fault: bool = True
    note: bool = False
