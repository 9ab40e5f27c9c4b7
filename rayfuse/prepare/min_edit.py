"""MinED: tokens of two vocabularies and positions of two token sequences, matched by minimum edit distance.

FuseLLM's (arXiv 2401.10491) way to bring a teacher's distribution to the student:

    positions    dynamic time warping of the two token sequences, the cost of a pair being the edit distance of the
                 tokens without their spaces; a student token that is warped to one teacher token only, and is its
                 match in the vocabulary, takes the distribution that follows it; any other takes the written token
    vocabulary   a teacher token stands for the student's token of the same bytes, else for the nearest one

Edit distances are counted over bytes (FuseLLM: over the characters of a token's string, which for byte-level
tokenizers is the same), many at a time: Myers' bit-parallel algorithm (Hyyro 2003) with a 64-bit word per pair. So of a
token longer than 64 bytes, which is a run of spaces or dashes, the first 64 are compared.

MinCE: of several teachers, each sample takes the one that foresaw the response best.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

import numpy as np

from rayfuse.signals.topk import TopKSignals

WORD = 64
"""Bytes of a token that are compared."""


def lowest_entropy(answers: Sequence[TopKSignals]) -> int:
    """MinCE: which teacher has the lowest cross-entropy on the response, per token of its own (the first of equals)."""
    return int(np.argmax([answer.token_logps.mean() for answer in answers]))


def mined_target(
    answer: TopKSignals,
    text: bytes,
    ends: np.ndarray,
    labels: np.ndarray,
    to_student: Callable[[np.ndarray], np.ndarray],
    nearest: Callable[[bytes], int],
) -> tuple[np.ndarray, np.ndarray]:
    """One teacher's top-K probabilities on the student's tokens, at each of the student's rows.

    Args:
        answer: the teacher's signals.
        text: the response.
        ends: int64 [n], bytes read after each student token.
        labels: int64 [n + 1] the student's ids of the response, and its end-of-turn.
        to_student: the student's nearest ids for ids of the teacher, -1 where there is none.
        nearest: the student's token nearest to given bytes.

    Returns:
        ids int64 [n + 1, K + 1] and mass float32 [n + 1, K + 1] that sums to 1 per row. Column 0 is the label; unused
        columns repeat it with mass 0. Of teacher tokens with the same nearest token, the likeliest counts.
    """
    teacher_pieces, student_pieces = _pieces(text, answer.byte_ends), _pieces(text, ends)
    partner = warp(teacher_pieces, student_pieces)
    matched = [
        j >= 0 and (teacher_pieces[j] == piece or nearest(teacher_pieces[j]) == label)
        for j, piece, label in zip(partner.tolist(), student_pieces, labels.tolist(), strict=False)
    ]
    rows = np.flatnonzero([True, *matched])  # row 0: both have read nothing
    teacher_rows = np.concatenate(([0], partner + 1))[rows]
    labels_R1 = labels[rows, None]

    ids_RK = to_student(answer.ids[teacher_rows])
    repeats_RK = np.tril(ids_RK[:, :, None] == ids_RK[:, None, :], -1).any(2)
    kept_RK = (ids_RK >= 0) & ~repeats_RK
    chances_RK = np.exp(answer.logps[teacher_rows].astype(np.float32)) * kept_RK
    sums_R1 = chances_RK.sum(1, keepdims=True)
    chances_RK /= np.where(sums_R1 > 0, sums_R1, 1)
    written_RK = ids_RK == labels_R1

    ids = np.repeat(labels[:, None], ids_RK.shape[1] + 1, axis=1)
    ids[rows, 1:] = np.where(kept_RK, ids_RK, labels_R1)
    mass = np.zeros(ids.shape, dtype=np.float32)
    mass[:, 0] = 1.0
    mass[rows, 0] = np.where(sums_R1[:, 0] > 0, (chances_RK * written_RK).sum(1), 1)
    mass[rows, 1:] = np.where(written_RK, 0, chances_RK)
    return ids, mass


def _pieces(text: bytes, ends: np.ndarray) -> list[bytes]:
    return [text[start:end] for start, end in pairwise([0, *ends.tolist()])]


class Texts:
    """Byte strings laid out so that one of their bytes at a time can be read of all, longest first.

    Args:
        texts: n byte strings, in descending order of their (cut) length.
    """

    def __init__(self, texts: Sequence[bytes]) -> None:
        self.lengths = np.array([min(len(text), WORD) for text in texts], dtype=np.int64)
        assert (np.diff(self.lengths) <= 0).all()
        self.bytes = np.zeros((max(self.lengths, default=0), len(texts)), dtype=np.uint8)
        for column, text in enumerate(texts):
            self.bytes[: self.lengths[column], column] = np.frombuffer(text[:WORD], dtype=np.uint8)

    def part(self, start: int, stop: int) -> Texts:
        """Texts `start` to `stop`, as views."""
        some = object.__new__(Texts)
        some.lengths = self.lengths[start:stop]
        some.bytes = self.bytes[: max(some.lengths, default=0), start:stop]
        return some


def edit_distances(patterns: Sequence[bytes], texts: Texts) -> np.ndarray:
    """Levenshtein distances int64 [patterns, texts]; O(patterns * bytes of the texts) word operations."""
    lengths = np.array([min(len(pattern), WORD) for pattern in patterns], dtype=np.int64)
    ones = np.uint64(1)
    places = np.zeros((len(patterns), 256), dtype=np.uint64)  # bit i: byte i of the pattern is this byte
    for row, pattern in enumerate(patterns):
        for i, byte in enumerate(pattern[:WORD]):
            places[row, byte] |= ones << np.uint64(i)
    last = np.uint64(1) << np.maximum(lengths - 1, 0).astype(np.uint64)[:, None]
    n = len(texts.lengths)
    rising = np.full((len(patterns), n), ~np.uint64(0))  # Myers' Pv: where the column of distances rises by one
    falling = np.zeros((len(patterns), n), dtype=np.uint64)  # Mv: where it falls by one
    distances = np.repeat(lengths[:, None], n, axis=1)
    for step, column in enumerate(texts.bytes):
        active = int(np.searchsorted(-texts.lengths, -step, side="left"))  # texts longer than `step`
        equal = places[:, column[:active]]
        up, down = rising[:, :active], falling[:, :active]
        vertical = equal | down
        horizontal = (((equal & up) + up) ^ up) | equal
        more = down | ~(horizontal | up)
        less = up & horizontal
        distances[:, :active] += (more & last) != 0
        distances[:, :active] -= (less & last) != 0
        more = (more << ones) | ones
        rising[:, :active] = (less << ones) | ~(vertical | more)
        falling[:, :active] = more & vertical
    return np.where(lengths[:, None] == 0, texts.lengths[None, :], distances)


class NearestTokens:
    """The token of a vocabulary with the smallest edit distance to given bytes; of several, the one of the lowest id.

    Each answer is found once, in a few milliseconds for 100,000 tokens, and kept.

    Args:
        ids: the id that writes given bytes (see alignment.bytes_to_ids).
    """

    def __init__(self, ids: Mapping[bytes, int]) -> None:
        pieces = sorted(ids, key=lambda piece: (-min(len(piece), WORD), ids[piece]))
        self.known: dict[bytes, int] = dict(ids)
        self.ids = np.array([ids[piece] for piece in pieces], dtype=np.int64)
        self.texts = Texts(pieces)

    def __call__(self, piece: bytes) -> int:
        """The nearest token's id."""
        found = self.known.get(piece)
        if found is None:
            found = self.known[piece] = self._search(piece)
        return found

    def _search(self, piece: bytes) -> int:
        """Similar lengths first: a token whose length differs by more than the best distance cannot be nearer."""
        reach, length = 1, min(len(piece), WORD)
        while True:
            start = int(np.searchsorted(-self.texts.lengths, -(length + reach), side="left"))
            stop = int(np.searchsorted(-self.texts.lengths, -(length - reach), side="right"))
            if start < stop:
                distances = edit_distances([piece], self.texts.part(start, stop))[0]
                best = int(distances.min())
                if best <= reach:
                    return int(self.ids[start:stop][distances == best].min())
                reach = best
            else:
                reach *= 2


def warp(teacher: Sequence[bytes], student: Sequence[bytes]) -> np.ndarray:
    """The only teacher token that each student token is warped to: int64 [n], -1 where there are several.

    Dynamic time warping of m teacher tokens with n student tokens. Of several best paths, the one that FuseLLM takes:
    from the end, a step on both sides before one on the teacher's side before one on the student's. O(m n) in numpy,
    and 8 m n bytes.
    """
    m, n = len(teacher), len(student)
    if not m or not n:
        return np.full(n, -1, dtype=np.int64)
    cost_mn = _costs(teacher, student)
    total_mn = np.empty((m, n), dtype=np.int32)
    total_mn[0] = np.cumsum(cost_mn[0])
    for i in range(1, m):
        # A row in one pass: T[j] = c[j] + min(a[j], T[j-1]) is the running minimum of a[j] - S[j-1], plus S[j].
        before = np.minimum(total_mn[i - 1], np.concatenate((total_mn[i - 1, :1], total_mn[i - 1, :-1])))
        sums = np.cumsum(cost_mn[i], dtype=np.int32)
        total_mn[i] = sums + np.minimum.accumulate(before - (sums - cost_mn[i]))
    partner = np.full(n, -1, dtype=np.int64)
    partners = np.zeros(n, dtype=np.int64)
    i, j = m - 1, n - 1
    while True:
        partner[j] = i
        partners[j] += 1
        if i == 0 and j == 0:
            break
        if j == 0:
            i -= 1
        elif i == 0:
            j -= 1
        else:
            both, above, left = total_mn[i - 1, j - 1], total_mn[i - 1, j], total_mn[i, j - 1]
            if both <= above and both <= left:
                i, j = i - 1, j - 1
            elif above <= left:
                i -= 1
            else:
                j -= 1
    return np.where(partners == 1, partner, -1)


def _costs(teacher: Sequence[bytes], student: Sequence[bytes]) -> np.ndarray:
    """Edit distances [m, n] of tokens without their spaces, each pair of different tokens measured once."""
    sides = [[piece.replace(b" ", b"") for piece in side] for side in (teacher, student)]
    unique = [sorted(set(side), key=lambda piece: (-min(len(piece), WORD), piece)) for side in sides]
    where = [{piece: index for index, piece in enumerate(side)} for side in unique]
    rows, columns = (np.array([where[s][piece] for piece in sides[s]]) for s in (0, 1))
    return edit_distances(unique[0], Texts(unique[1])).astype(np.int32)[rows[:, None], columns]
