"""Pairs of rows at which two models have read equally many bytes of the same response."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from rayfuse.errors import AlignmentError

if TYPE_CHECKING:
    pass


@dataclass(frozen=True, slots=True)
class Alignment:
    """Pairs of rows at which student and teacher have read equally many bytes, both strictly increasing, int64 [P]."""

    student: NDArray[np.int64]
    teacher: NDArray[np.int64]


def align(student_ends: NDArray[np.int64], teacher_ends: NDArray[np.int64]) -> Alignment:
    """All pairs of rows at which both have read equally many bytes of one text, in order.

    `student_ends` [n] and `teacher_ends` [m] come from `byte_ends`. The first pair is (0, 0), nothing read; the last is
    (n, m), everything read. Where several rows have read equally many bytes (a token of zero width), the last of them
    pairs: it is the one that predicts the next byte. Row 0 is the exception: it stands for "nothing read" even where a
    dummy space of zero width follows it, because its prediction still holds every way in which the text can begin.

    O(n + m + bytes). Raises AlignmentError where the two have not read the same number of bytes in total.
    """
    student, teacher = _offsets(student_ends, "student"), _offsets(teacher_ends, "teacher")
    total = student[-1]
    if total != teacher[-1]:
        raise AlignmentError(
            f"the student read {total} bytes and the teacher {teacher[-1]}: they did not read the same text; "
            "encode the same response for both with encode_response"
        )
    student_row, teacher_row = _row_at_byte(student, total), _row_at_byte(teacher, total)
    shared = np.flatnonzero((student_row >= 0) & (teacher_row >= 0))
    return Alignment(student_row[shared], teacher_row[shared])


def align_by_position(n_student: int, n_teacher: int) -> Alignment:
    """Row t with row t, cut at the shorter response: what fusion does without alignment, kept for the ablation."""
    if n_student < 0 or n_teacher < 0:
        raise AlignmentError(f"a response cannot have {min(n_student, n_teacher)} tokens; pass the number of its ids")
    rows = np.arange(min(n_student, n_teacher) + 1, dtype=np.int64)
    return Alignment(rows, rows.copy())


def _offsets(ends: NDArray[np.int64], side: str) -> NDArray[np.int64]:
    """Bytes read at rows 0..n, int64 [n + 1], from the bytes read after each of n tokens."""
    values = np.asarray(ends)
    if values.ndim != 1 or (values.size and values.dtype.kind not in "iu"):
        shape = f"{values.dtype} {list(values.shape)}"
        raise AlignmentError(f"the {side}'s byte ends must be integers [n], not {shape}; pass what byte_ends returns")
    offsets = np.concatenate(([0], values.astype(np.int64)))
    if (offsets[1:] < offsets[:-1]).any():
        row = int(np.argmax(offsets[1:] < offsets[:-1]))
        raise AlignmentError(
            f"the {side}'s byte ends fall from {offsets[row]} to {offsets[row + 1]} at token {row}; "
            "pass the cumulative numbers that byte_ends returns"
        )
    return offsets


def _row_at_byte(offsets: NDArray[np.int64], total: int) -> NDArray[np.int64]:
    """The row that has read exactly b bytes, for b in 0..total, or -1: the last one (of a repeated index, numpy
    keeps the last value), and row 0 for nothing read."""
    rows = np.full(total + 1, -1, dtype=np.int64)
    rows[offsets] = np.arange(len(offsets))
    rows[0] = 0
    return rows
