"""What the routed teachers say of texts that the student wrote: targets of on-policy distillation.

At each of the student's rows, the mixture q = SUM_s w_s q_s of the teachers' distributions, carried onto the student's
tokens byte by byte (byte_prefix.continuations). Each carried token is a cell of its own; the student's own likely
tokens that begin with a carried token belong to its cell: where a teacher says "4" and the student would write "412",
both go on in the same way, and the student has nothing to unlearn.

The weights w_s of a sample are those of its prompt. Where the teachers that hold most of the weight gave the text so
far almost no probability, there is no distribution to compare with. There the heaviest teacher's probability of the
chunk, between two byte boundaries that both models share, stands for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np

from rayfuse.alignment.pairs import align
from rayfuse.batch import RolloutTarget
from rayfuse.config import OnPolicy
from rayfuse.data.rollout import Rollout
from rayfuse.data.sample import Sample
from rayfuse.data.weights import TEACHER, TEACHERS
from rayfuse.errors import DataError
from rayfuse.prepare.byte_prefix import PrefixMap, TeacherSide, continuations
from rayfuse.prepare.spec import PrepareSpec
from rayfuse.prepare.vocabulary import Vocabularies
from rayfuse.signals.topk import TopKSignals

LEAST_SHARE = 0.01
"""A teacher with less of a prompt's weight is not asked."""
HEARD = 0.5
"""Share of the weight that the teachers with a distribution at a row must hold."""
NO_CHUNK = -1
NO_CELL = -1
NOBODY = -1


@dataclass(frozen=True)
class SampleTarget:
    """The target of one sample: its rows' ids [n + 1, M], and the fields of RolloutTarget, chunks from 0.

    Attributes:
        counts: how much the sample counts.
        heaviest: the teacher that weighs most, of those that answered; NOBODY where none did.
        own: whether the student wrote it.
    """

    ids: np.ndarray
    cells: np.ndarray
    mass: np.ndarray
    taught: np.ndarray
    chunks: np.ndarray
    chunk_logps: np.ndarray
    counts: float = 1.0
    heaviest: int = NOBODY
    own: bool = False


def stacked(made: Sequence[SampleTarget]) -> tuple[np.ndarray, RolloutTarget, np.ndarray]:
    """The targets of a unit's samples as one: the picks [N, M], what is said on them, and each position's heaviest
    teacher [N]."""
    lengths = [len(one.taught) for one in made]
    firsts = np.cumsum([0, *lengths[:-1]])
    numbers = [np.where(one.chunks < 0, NO_CHUNK, one.chunks + first) for one, first in zip(made, firsts, strict=True)]
    target = RolloutTarget(
        own=np.repeat([one.own for one in made], lengths),
        taught=np.concatenate([one.taught for one in made]),
        cells=np.concatenate([one.cells for one in made]),
        mass=np.concatenate([one.mass for one in made]),
        chunks=np.concatenate(numbers),
        chunk_logps=np.concatenate([one.chunk_logps for one in made]),
        counts=np.repeat([one.counts for one in made], lengths).astype(np.float32),
    )
    return np.concatenate([one.ids for one in made]), target, np.repeat([one.heaviest for one in made], lengths)


def sample_target(
    stage: OnPolicy,
    rollout: Rollout,
    answers: Sequence[TopKSignals | None],
    weights: Sequence[float],
    vocabularies: Vocabularies,
) -> SampleTarget:
    """What the teachers say of one rollout.

    Args:
        stage: its knobs.
        rollout: what the student wrote.
        answers: per teacher; None where a missing teacher was dropped.
        weights: per teacher, see prompt_weights.
        vocabularies: the models' tokens.
    """
    student = vocabularies.student
    labels = [*rollout.token_ids, student.end_of_turn]
    said = [s for s, answer in enumerate(answers) if answer is not None and weights[s] > 0]
    total = sum(weights[s] for s in said)
    rows: list[Row | None] = [None] * len(labels)
    numbers, logps = np.full(len(labels), NO_CHUNK), np.zeros(len(labels), dtype=np.float32)
    heaviest = max(said, key=lambda s: (weights[s], -s), default=NOBODY)
    if said:
        numbers, logps = chunks(rollout, cast(TopKSignals, answers[heaviest]))
    if said and stage.divergence != "advantage":
        carried = [_carried(rollout, cast(TopKSignals, answers[s]), labels, s, vocabularies) for s in said]
        shares = [weights[s] / total for s in said]
        for n, label in enumerate(labels):
            merged = mixed([of_teacher[n] for of_teacher in carried], shares)
            likely = rollout.likely[n][: stage.likely] if rollout.likely else ()
            if merged is not None:
                rows[n] = row_target(merged, label, likely, stage.width, student.pieces, vocabularies.prefixes)
    ids, cells, mass = packed(rows, labels, stage.width + stage.likely)
    taught = np.array([row is not None for row in rows])
    counts = min(1.0, sum(weights)) if stage.teacher_weights == "consensus" else 1.0  # what nobody knows teaches little
    return SampleTarget(ids, cells, mass, taught, numbers, logps, counts, heaviest, own=True)


def written_target(labels: np.ndarray, width: int) -> SampleTarget:
    """The target of a sample that is learnt as the data write it: its labels [n + 1] among the picks, nothing else."""
    ids, cells, mass = packed([None] * len(labels), labels.tolist(), width)
    nothing = np.zeros(len(labels), dtype=np.float32)
    return SampleTarget(ids, cells, mass, nothing > 0, np.full(len(labels), NO_CHUNK), nothing)


def _carried(
    rollout: Rollout, signals: TopKSignals, labels: Sequence[int], s: int, vocabularies: Vocabularies
) -> list[dict[int, float] | None]:
    teacher = vocabularies.teachers[s]
    side = TeacherSide(signals, teacher.pieces, teacher.end_of_turn)
    ends = np.asarray(rollout.ends, dtype=np.int64)
    return continuations(side, rollout.response.encode(), ends, labels, vocabularies.prefixes)


@dataclass(frozen=True)
class Row:
    """The target of one position: picked ids, the cell of each, and the teachers' mass of each cell."""

    ids: list[int]
    cells: list[int]
    mass: list[float]


def heard(weights: Sequence[float]) -> set[int]:
    """The teachers that are asked: those with more than a trace of the weight."""
    total = sum(weights)
    return {s for s, weight in enumerate(weights) if weight > 0 and weight >= LEAST_SHARE * total}


def prompt_weights(spec: PrepareSpec, sample: Sample, by_row: bool) -> list[float]:
    """How much each of the spec's teachers counts on the sample's prompt: teachers[].weight, times the row's.

    Raises:
        DataError: the row does not say how much a teacher counts, or names one that the run does not have.
    """
    weights = [float(one.teacher.weight) for one in spec.teachers]
    if not by_row:
        return weights
    names = [one.name for one in spec.teachers]
    if sample.weights is None or (sample.weights.teachers is None and not sample.weights.only):
        raise DataError(
            f"sample {sample.key[:12]} ({sample.plain_text!r:.60}) has no '{TEACHERS}' and no '{TEACHER}', which "
            "teacher_weights: consensus reads: let the run make them (the section `consensus`), or name data that have "
            "them"
        )
    if sample.weights.only and sample.weights.only not in names:
        raise DataError(
            f"sample {sample.key[:12]} ({sample.plain_text!r:.60}): '{TEACHER}' is {sample.weights.only!r}, and the "
            f"teachers are {', '.join(names)}"
        )
    found = [sample.weights.teacher(name) for name in names]
    if None in found:
        missing = [name for name, weight in zip(names, found, strict=True) if weight is None]
        raise DataError(
            f"sample {sample.key[:12]} ({sample.plain_text!r:.60}): '{TEACHERS}' has no weight of {', '.join(missing)}"
        )
    return [weight * (given or 0.0) for weight, given in zip(weights, found, strict=True)]


def mixed(carried: Sequence[Mapping[int, float] | None], weights: Sequence[float]) -> dict[int, float] | None:
    """q at one row, as student id -> probability; None where too little of the weight has something to say.

    Args:
        carried: per teacher, what `continuations` gave.
        weights: of the teachers, adding up to 1.
    """
    share = sum(weight for weight, one in zip(weights, carried, strict=True) if one is not None)
    if share < HEARD:
        return None
    merged: dict[int, float] = {}
    for weight, one in zip(weights, carried, strict=True):
        for index, chance in (one or {}).items():
            merged[index] = merged.get(index, 0.0) + weight / share * chance
    return merged


def row_target(
    merged: Mapping[int, float], label: int, likely: Sequence[int], width: int, pieces: Sequence[bytes], ids: PrefixMap
) -> Row:
    """The label, the `width` - 1 other tokens with the largest mass, and the student's likely tokens in their cells.

    Args:
        merged: q.
        label: the student's own token.
        likely: tokens that the student found likely.
        width: cells.
        pieces: bytes of each of the student's ids.
        ids: the student's vocabulary.
    """
    others = sorted((item for item in merged.items() if item[0] != label), key=lambda item: (-item[1], item[0]))
    kept = [label, *(index for index, _ in others[: width - 1])]
    cell_of = {index: cell for cell, index in enumerate(kept)}
    picked, cells = list(kept), list(range(len(kept)))
    for index in likely:
        if index in cell_of or index in merged:
            continue
        cell = _cell(pieces[index], cell_of, ids)
        if cell is not None:
            picked.append(index)
            cells.append(cell)
    return Row(picked, cells, [merged.get(index, 0.0) for index in kept])


def _cell(piece: bytes, cell_of: Mapping[int, int], ids: PrefixMap) -> int | None:
    """The cell of the longest kept token that `piece` goes on from."""
    for length in range(len(piece) - 1, 0, -1):
        index = ids.ids.get(piece[:length])
        if index is not None and index in cell_of:
            return cell_of[index]
    return None


def packed(rows: Sequence[Row | None], labels: Sequence[int], width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows as arrays [n, M]: ids (int64), cells (int64), mass (float32). Unused places repeat the label, in no cell."""
    ids = np.repeat(np.asarray(labels, dtype=np.int64)[:, None], width, axis=1)
    cells = np.full(ids.shape, NO_CELL, dtype=np.int64)
    mass = np.zeros(ids.shape, dtype=np.float32)
    for n, row in enumerate(rows):
        if row is not None:
            ids[n, : len(row.ids)] = row.ids
            cells[n, : len(row.cells)] = row.cells
            mass[n, : len(row.mass)] = row.mass
    return ids, cells, mass


def chunks(rollout: Rollout, signals: TopKSignals) -> tuple[np.ndarray, np.ndarray]:
    """Per row of a rollout (n + 1), its chunk and the teacher's log-probability of that whole chunk.

    The end of the turn is a chunk by itself where the student ended it; where it was cut, that row is in none.

    Returns:
        numbers int64 [n + 1] from 0, NO_CHUNK where there is none; log-probabilities float32 [n + 1].
    """
    pairs = align(np.asarray(rollout.ends, dtype=np.int64), signals.byte_ends)
    n = len(rollout.token_ids)
    numbers = np.searchsorted(pairs.student, np.arange(n + 1), side="right") - 1
    # A chunk ends where the next begins; the last is the end of the turn.
    ends = np.append(pairs.teacher[1:], len(signals))
    sums = np.cumsum(np.append(0.0, signals.token_logps.astype(np.float64)))
    of_chunk = sums[ends] - sums[pairs.teacher]
    numbers = numbers.astype(np.int64)
    logps = of_chunk[numbers].astype(np.float32)
    if not rollout.finished:
        numbers[n] = NO_CHUNK
    return numbers, logps
