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
from collections.abc import Callable, Iterator, Mapping, Sequence
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
    carried = []
    for reading, row, place in _places(teacher, text, student_ends, labels):
        mass = _carried_mass(reading, row, place, prefixes)
        total = sum(mass.values())
        carried.append({index: chance / total for index, chance in mass.items()} if total >= MIN_MASS else {})
    return carried


def continuations(
    teacher: TeacherSide, text: bytes, student_ends: np.ndarray, labels: Sequence[int], prefixes: PrefixMap
) -> list[dict[int, float] | None]:
    """As `carry`, with the probability that the teacher itself gives: what is missing to 1 goes to other tokens.

    Inside a teacher's token, the candidates that begin with the bytes already read share what the kept candidates have
    together: what the teacher did not keep is taken to go on with these bytes as often as what it kept.

    Returns:
        n + 1 dictionaries, each adding up to at most 1; None where the teacher gave the bytes already read less than
        MIN_MASS.
    """
    found: list[dict[int, float] | None] = []
    for reading, row, place in _places(teacher, text, student_ends, labels):
        prefix_read = text[reading.starts[row] : place.start]
        candidates = reading.rows[row].candidates
        kept = sum(chance for _, chance in candidates)
        read = sum(chance for piece, chance in candidates if (piece or b"").startswith(prefix_read))
        if prefix_read and read < MIN_MASS:
            found.append(None)
            continue
        factor = (kept / read if prefix_read else 1.0) / max(
            1.0, kept
        )  # float16 probabilities can add up to more than 1
        mass = _carried_mass(reading, row, place, prefixes)
        found.append({index: chance * factor for index, chance in mass.items()})
    return found


def _places(
    teacher: TeacherSide, text: bytes, student_ends: np.ndarray, labels: Sequence[int]
) -> Iterator[tuple[_Reading, int, _Place]]:
    """The response as the teacher reads it; and per student row, the teacher's last row that has read no more."""
    starts_T = [0, *teacher.signals.byte_ends.tolist()]
    starts_S = [0, *student_ends.tolist(), len(text) + 1]  # the end of the turn ends beyond the text
    first_rows = np.searchsorted(starts_T, starts_S[:-1], side="right") - 1
    reading = _Reading(text, starts_T, [_row(teacher, row, text, starts_T) for row in range(len(teacher.signals))])
    for i, first_row in enumerate(first_rows.tolist()):
        yield reading, first_row, _Place(starts_S[i], starts_S[i + 1], labels[i], labels[-1])


class _Row(NamedTuple):
    """A teacher row: its candidates as (bytes, probability), where None is the end of the turn; what follows there."""

    candidates: list[tuple[bytes | None, float]]
    actual: bytes | None
    chance: float


class _Reading(NamedTuple):
    """A response as a teacher reads it: its bytes, how many of them each row has read, and what each row says."""

    text: bytes
    starts: Sequence[int]
    rows: Sequence[_Row]


class _Place(NamedTuple):
    """A student row: bytes read, where its own next token ends, that token, and the end of the turn."""

    start: int
    end: int
    label: int
    end_of_turn: int


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


def _carried_mass(reading: _Reading, row: int, place: _Place, prefixes: PrefixMap) -> dict[int, float]:
    """Student id -> mass at one student row.

    The walk begins at the teacher's last row that has read no more than the student (`row`), and goes through the
    teacher's own tokens for as long as they end before the student's next token does. Each row on the way adds its
    candidates, weighted by the probability of the path to it.
    """
    begin = reading.starts[row]
    prefix_read = reading.text[begin : place.start]  # what the student read beyond the teacher's boundary
    next_token = reading.text[place.start : place.end]
    mass: dict[int, float] = {}
    path_probability = 1.0
    while True:
        teacher_read = reading.text[begin : reading.starts[row]]
        said = reading.rows[row]
        passes = said.actual is not None and reading.starts[row + 1] < place.end
        for piece, chance in said.candidates:
            if piece is None:
                index = place.end_of_turn if teacher_read == prefix_read else None
            else:
                continuation = teacher_read + piece
                rest = continuation[len(prefix_read) :] if continuation.startswith(prefix_read) else b""
                if not rest or (passes and piece == said.actual):  # the next row says what follows it
                    continue
                index = place.label if next_token and rest.startswith(next_token) else prefixes.find(rest)
            if index is not None:
                mass[index] = mass.get(index, 0.0) + path_probability * chance
        path_probability *= said.chance
        if not passes or path_probability < MIN_MASS**2:
            return mass
        row += 1


def mix(
    carried_by_teacher: Sequence[Sequence[dict[int, float]]],
    weights: Sequence[float],
    labels: Sequence[int],
    width: int,
) -> tuple[np.ndarray, np.ndarray]:
    """One sparse target per row from all teachers.

    Args:
        carried_by_teacher: per teacher, per row, what `carry` gave.
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
        for weight, carried in zip(weights, carried_by_teacher, strict=True):
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


def teacher_weights(
    signals: Sequence[TopKSignals], temper: float = 1.0, prior: Sequence[float] | None = None
) -> np.ndarray:
    """w_s [S], summing to 1: a prior over the teachers, updated by their likelihood of the whole response.

    Args:
        signals: of one sample, per teacher.
        temper: how strongly the likelihood counts; 0 leaves the prior.
        prior: how much each teacher counts before anything is read (teachers[].weight, times its weight in the sample);
            None, or 0 of each: all the same.
    """
    chances = np.ones(len(signals)) if prior is None else np.asarray(prior, dtype=np.float64)
    scores = np.array([temper * answer.token_logps.sum(dtype=np.float64) for answer in signals])
    if chances.max() > 0:
        with np.errstate(divide="ignore"):  # a teacher that does not count
            scores += np.log(chances / chances.max())
    weights = np.exp(scores - scores.max())
    return weights / weights.sum()
