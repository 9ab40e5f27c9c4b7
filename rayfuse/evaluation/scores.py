"""How a generated answer is compared with the right one."""

from __future__ import annotations

import re
from collections.abc import Callable

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def _last_number(text: str) -> str | None:
    numbers = _NUMBER.findall(text)
    return numbers[-1].replace(",", "") if numbers else None


def _same_number(answer: str, reference: str) -> bool:
    got, wanted = _last_number(answer), _last_number(reference)
    return got is not None and wanted is not None and float(got) == float(wanted)


SCORES: dict[str, Callable[[str, str], bool]] = {
    "exact": lambda answer, reference: answer.strip() == reference.strip(),
    "number": _same_number,
}
"""Whether an answer is right, by the name of the score."""
