"""How much a sample counts, and each teacher on it: columns that a row may have beside its conversation.

    {"prompt": "2 + 2?", "response": "4", "sample_weight": 0.98, "teacher_weights": {"math": 0.99, "code": 0.1}}
    {"prompt": "2 + 2?", "response": "4", "teacher": "math"}

`rayfuse fuse` writes the first two to consensus/choices.jsonl; stages read them with `sample_weights: consensus` and
`teacher_weights: consensus`. `teacher` names the one teacher that counts. They are no part of a sample's key: what a
teacher says of a text does not depend on them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rayfuse.data.forms import Row
from rayfuse.data.sample import Weights
from rayfuse.data.turns import from_json
from rayfuse.errors import DataError

SAMPLE, TEACHERS, TEACHER = "sample_weight", "teacher_weights", "teacher"
"""The columns."""


def weights_of(row: Row) -> Weights | None:
    """The weights of a row; None where it has none.

    Raises:
        DataError: a weight is no number from 0 to 1; `teacher` is no name, or stands beside `teacher_weights`.
    """
    sample, teachers, teacher = (row.columns.get(name) for name in (SAMPLE, TEACHERS, TEACHER))
    if sample is None and teachers is None and teacher is None:
        return None
    row.used |= {name for name in (SAMPLE, TEACHERS, TEACHER) if row.columns.get(name) is not None}
    if isinstance(teachers, str):
        teachers = from_json(teachers, f"'{TEACHERS}'")
    if teachers is not None and not isinstance(teachers, Mapping):
        raise DataError(f"'{TEACHERS}' must be an object of teachers' names and weights, not {teachers!r:.60}")
    if teacher is not None:
        if not isinstance(teacher, str) or not teacher:
            raise DataError(f"'{TEACHER}' must be the name of the teacher that counts, not {teacher!r:.60}")
        if teachers is not None:
            raise DataError(f"a row has '{TEACHER}' and '{TEACHERS}', which both say how teachers count; keep one")
    return Weights(
        None if sample is None else _weight(sample, SAMPLE),
        None
        if teachers is None
        else tuple((str(name), _weight(teachers[name], f"{TEACHERS}.{name}")) for name in sorted(teachers)),
        teacher or "",
    )


def _weight(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise DataError(f"'{name}' must be a number from 0 to 1, not {value!r:.60}")
    return float(value)
