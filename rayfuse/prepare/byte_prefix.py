"""Carry what a teacher would say next into the student's vocabulary, byte by byte.

Rank-based losses forget which token a probability belongs to. Here the teacher's top-K tokens are read as byte strings.
At a student position, with `r` the bytes that the student has read beyond the teacher's last token boundary, every
teacher token that begins with `r` says how the text may go on; its remainder goes to the longest student token that is
a prefix of it. Where the teacher needs several tokens for the student's next one, its alternatives at each of them
count, weighted by the probability of the way there. With top-K candidates c of teacher rows j, j+1, ... :

    q(v) ~ SUM_t SUM_c  P(text from row j to row j+t) * P(c | row j+t)  [ longest_prefix(text + c minus r) = v ]

Nothing needs to be aligned, so a teacher that cuts numbers in another way still teaches every digit.

Several teachers are mixed by how well they foresaw the whole response (a uniform prior, updated by its likelihood):

    w_s ~ exp( temper * log P_s(response) )           q = SUM_s w_s q_s
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from rayfuse.signals.topk import TopKSignals

MIN_MASS = 0.01
"""Where a teacher gave the bytes already read less than this, it says nothing about what follows them."""


class PrefixMap:
    """The longest token of a vocabulary that is a prefix of given bytes.

    Args:
        ids: the id that writes given bytes (see alignment.bytes_to_ids).
    """

    def __init__(self, ids: Mapping[bytes, int]) -> None:
        self.ids = ids
        self.longest = max(map(len, self.ids), default=0)
        self.find: Callable[[bytes], int | None] = lru_cache(maxsize=1 << 18)(self._find)

    def _find(self, text: bytes) -> int | None:
        """The id of the longest prefix of `text`, or None where no token is one."""
        for length in range(min(len(text), self.longest), 0, -1):
            index = self.ids.get(text[:length])
            if index is not None:
                return index
        return None


@dataclass(frozen=True)
class TeacherSide:
    """One teacher's signals for one sample, with its tokens as bytes.

    Attributes:
        signals: its L rows.
        pieces: bytes of each of its ids.
        end_of_turn: its end-of-turn id.
    """

    signals: TopKSignals
    pieces: Sequence[bytes]
    end_of_turn: int


def carry(
    teacher: TeacherSide, text: bytes, student_ends: np.ndarray, labels: Sequence[int], prefixes: PrefixMap
) -> list[dict[int, float]]:
    """What the teacher says at each of the student's rows, as student id -> probability.

    Args:
        teacher: its signals.
        text: the response.
        student_ends: int64 [n], bytes read after each student token.
        labels: [n + 1] the student's ids of the response, and its end-of-turn.
        prefixes: the student's vocabulary.

    Returns:
        n + 1 dictionaries, each summing to 1, or empty where the teacher says nothing.
    """
    starts_T = [0, *teacher.signals.byte_ends.tolist()]  # bytes read at each teacher row
    starts_S = [0, *student_ends.tolist()]
    first_rows = np.searchsorted(starts_T, starts_S, side="right") - 1
    rows = [_row(teacher, row, text, starts_T) for row in range(len(teacher.signals))]
    carried = []
    for i, start in enumerate(starts_S):
        last = i + 1 == len(starts_S)
        end = len(text) + 1 if last else starts_S[i + 1]
        mass = _at(start, end, int(first_rows[i]), rows, starts_T, text, labels[i], labels[-1], prefixes)
        total = sum(mass.values())
        carried.append({index: chance / total for index, chance in mass.items()} if total >= MIN_MASS else {})
    return carried


class _Row(NamedTuple):
    """A teacher row: its candidates as (bytes, probability), where None is the end of the turn; what follows there."""

    candidates: list[tuple[bytes | None, float]]
    actual: bytes | None
    chance: float


def _row(teacher: TeacherSide, row: int, text: bytes, starts_T: Sequence[int]) -> _Row:
    last = row + 1 == len(starts_T)
    actual = None if last else text[starts_T[row] : starts_T[row + 1]]
    chance = math.exp(float(teacher.signals.token_logps[row]))
    candidates: list[tuple[bytes | None, float]] = []
    for index, logp in zip(teacher.signals.ids[row].tolist(), teacher.signals.logps[row].tolist(), strict=True):
        piece = None if index == teacher.end_of_turn else teacher.pieces[index]
        if piece != b"":
            candidates.append((piece, math.exp(logp)))
    if all(piece != actual for piece, _ in candidates):
        candidates.append((actual, chance))
    return _Row(candidates, actual, chance)


def _at(
    start: int,
    end: int,
    row: int,
    rows: Sequence[_Row],
    starts_T: Sequence[int],
    text: bytes,
    label: int,
    end_of_turn: int,
    prefixes: PrefixMap,
) -> dict[int, float]:
    """Student id -> mass at one student row that has read `start` bytes and whose own next token ends at `end`."""
    begin = starts_T[row]
    read = text[begin:start]  # what the student read beyond the teacher's boundary
    written = text[start:end]  # its own next token
    mass: dict[int, float] = {}
    way = 1.0
    while True:
        there = text[begin : starts_T[row]]  # what the teacher has read since
        of_row = rows[row]
        # Where the teacher's next token ends before the student's does, the way goes on through it.
        through = of_row.actual is not None and starts_T[row + 1] < end
        for piece, chance in of_row.candidates:
            if piece is None:
                index = end_of_turn if there == read else None
            else:
                rest = (there + piece)[len(read) :] if (there + piece).startswith(read) else b""
                if not rest or (through and piece == of_row.actual):
                    continue
                index = label if written and rest.startswith(written) else prefixes.find(rest)
            if index is not None:
                mass[index] = mass.get(index, 0.0) + way * chance
        way *= of_row.chance
        if not through or way < MIN_MASS**2:
            return mass
        row += 1


def mix(
    of_teachers: Sequence[Sequence[dict[int, float]]], weights: Sequence[float], labels: Sequence[int], width: int
) -> tuple[np.ndarray, np.ndarray]:
    """One sparse target per row from all teachers.

    Args:
        of_teachers: per teacher, per row, what `carry` gave.
        weights: of the teachers in this sample, summing to 1; renormalised over those that say something at a row.
        labels: [n + 1] the ids that follow; where no teacher says anything, the label has all the mass.
        width: M, ids kept per row.

    Returns:
        ids int64 [n + 1, M] and mass float32 [n + 1, M] that sums to 1 per row. Column 0 is the label (its mass may be
        0); unused columns repeat it with mass 0.
    """
    ids = np.repeat(np.asarray(labels, dtype=np.int64)[:, None], width, axis=1)
    mass = np.zeros((len(labels), width), dtype=np.float32)
    for row, label in enumerate(labels):
        merged: dict[int, float] = {}
        for weight, carried in zip(weights, of_teachers, strict=True):
            for index, chance in carried[row].items():
                merged[index] = merged.get(index, 0.0) + weight * chance
        mass[row, 0] = merged.pop(label, 0.0)
        kept = sorted(merged.items(), key=lambda item: (-item[1], item[0]))[: width - 1]
        for column, (index, chance) in enumerate(kept, start=1):
            ids[row, column], mass[row, column] = index, chance
        total = mass[row].sum()
        if total > 0:
            mass[row] /= total
        else:
            mass[row, 0] = 1.0
    return ids, mass


def teacher_weights(signals: Sequence[TopKSignals], temper: float = 1.0) -> np.ndarray:
    """w_s [S], summing to 1: a uniform prior over the teachers, updated by their likelihood of the whole response."""
    scores = np.array([temper * answer.token_logps.sum(dtype=np.float64) for answer in signals])
    weights = np.exp(scores - scores.max())
    return weights / weights.sum()
