"""How a generated answer is compared with the right one."""

from __future__ import annotations

from collections.abc import Callable

from rayfuse.evaluation.numbers import same_number

SCORES: dict[str, Callable[[str, str], bool]] = {
    "exact": lambda answer, reference: answer.strip() == reference.strip(),
    "number": same_number,
}
"""Whether an answer is right, by the name of the score."""
