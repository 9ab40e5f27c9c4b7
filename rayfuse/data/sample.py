"""What a sample is: one conversation, or the compared responses to one prompt."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

ROLES = ("system", "user", "assistant", "tool")


PAIR = ("chosen", "rejected")
"""Keys of the two responses of a preference row."""


@dataclass(frozen=True)
class Sample:
    """One assistant turn.

    Attributes:
        messages: (role, content) of everything before the response.
        response: the assistant's text, never empty.
        skill: an optional label that evaluation groups by.
    """

    messages: tuple[tuple[str, str], ...]
    response: str
    skill: str = ""

    @cached_property
    def key(self) -> str:
        """sha256 (hex) of the messages and the response: the sample's name in the signal store.

        How a model renders the messages is part of that model's fingerprint, so the two together name one answer.
        """
        text = json.dumps([self.messages, self.response], ensure_ascii=False, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


Compared = tuple[Sample, ...]
"""Responses to one prompt, in the order of a stage's `sides`: the chosen and the rejected one."""


Parsed = TypeVar("Parsed")


@dataclass(frozen=True)
class DataCounts:
    """What became of the rows; shown in the report and the model card.

    Attributes:
        rows: rows read.
        bad_rows: malformed rows left out, and `first_bad` the first of them.
        samples: samples that the run uses.
        too_long: samples dropped for their length.
        unreadable: samples dropped because a model cannot read them exactly, and `first_unreadable` the first of them.
        cut: samples whose prompt is cut from the left.
    """

    rows: int = 0
    bad_rows: int = 0
    samples: int = 0
    too_long: int = 0
    unreadable: int = 0
    cut: int = 0
    first_bad: str = ""
    first_unreadable: str = ""
