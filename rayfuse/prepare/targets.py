"""Targets: what a prepare task makes of the teachers' signals for a stage's loss; one function per kind.

A method names the kinds it needs (`targets` of its configuration class). Each is a function that takes the unit and the
batch so far, and returns the batch with its own fields filled; TARGETS lists them by name. They run in the order in
which the method names them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, cast

import numpy as np

from rayfuse.alignment.pairs import Alignment, align, align_by_position
from rayfuse.batch import FusionBatch, TeacherTarget
from rayfuse.config import ByteKD, InfiGFusion, OnPolicy
from rayfuse.data.render import Rendered
from rayfuse.data.rollout import Rollout
from rayfuse.data.sample import Sample
from rayfuse.errors import RayfuseError
from rayfuse.prepare.byte_prefix import TeacherSide, carry, mix, teacher_weights
from rayfuse.prepare.min_edit import lowest_entropy, mined_target
from rayfuse.prepare.routed import prompt_weights, sample_target, stacked, written_target
from rayfuse.prepare.vocabulary import Vocabularies
from rayfuse.prepare.weights import counting, likeliest, mixed_with_text, weights_of_teacher
from rayfuse.signals.topk import FIELDS, TopKSignals

if TYPE_CHECKING:
    import torch

    from rayfuse.prepare.spec import PrepareSpec


@dataclass(frozen=True)
class ScoredUnit:
    """What targets are made of.

    Attributes:
        spec: what the stage asks for.
        vocabularies: the models' tokens.
        samples: B samples.
        rendered: each as the student reads it.
        signals: per teacher, the signals of each sample; None where a missing teacher was dropped.
    """

    spec: PrepareSpec
    vocabularies: Vocabularies
    samples: Sequence[Sample]
    rendered: Sequence[Rendered]
    signals: Sequence[Sequence[TopKSignals | None]]

    @cached_property
    def pairs(self) -> list[list[Alignment]]:
        """Per teacher and sample, the pairs of rows at which the two models meet.

        Raises:
            AlignmentError: naming teacher and sample.
        """
        return [
            [
                self._align(teacher.name, *of_sample)
                for of_sample in zip(self.samples, self.rendered, answers, strict=True)
            ]
            for teacher, answers in zip(self.spec.teachers, self.signals, strict=True)
        ]

    def _align(self, teacher: str, sample: Sample, item: Rendered, answer: TopKSignals | None) -> Alignment:
        if answer is None:
            return Alignment(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64))
        try:
            if self.spec.alignment == "bytes":
                return align(item.ends, answer.byte_ends)
            return align_by_position(len(item.ends), len(answer.byte_ends))
        except RayfuseError as error:
            raise type(error)(f"teacher {teacher}, sample {sample.key[:12]}: {error}") from error

    def at_pairs(self, s: int, field: str) -> np.ndarray:
        """Teacher s's `logps` or `ids` [P, k] at the pairs of the whole unit."""
        answers = zip(self.signals[s], self.pairs[s], strict=True)
        parts = [
            getattr(answer, field)[pairs.teacher, : self.spec.k] for answer, pairs in answers if answer is not None
        ]
        nothing = np.zeros((0, self.spec.k or 0), dtype={"logps": np.float16, "ids": np.int32}[field])
        return np.concatenate(parts or [nothing])


def ranks(unit: ScoredUnit, batch: FusionBatch) -> FusionBatch:
    """`rows` and `logps` of each teacher: its top log-probabilities where it meets the student."""
    firsts = np.cumsum([0, *(len(item.response_ids) for item in unit.rendered)])
    targets = []
    for s, target in enumerate(batch.targets):
        rows = [first + pairs.student for first, pairs in zip(firsts, unit.pairs[s], strict=False)]
        targets.append(replace(target, rows=np.concatenate(rows), logps=unit.at_pairs(s, "logps")))
    return replace(batch, targets=tuple(targets))


def tokens(unit: ScoredUnit, batch: FusionBatch) -> FusionBatch:
    """`ids` of each teacher: the student's tokens that write the same bytes as those of `logps`; and `picks`, in which
    teacher s has the columns from s k to (s + 1) k (the label stands where there is nothing to ask for)."""
    assert unit.spec.k is not None
    k = unit.spec.k
    picks = np.repeat(batch.labels[:, None], k * len(batch.targets), axis=1)
    targets = []
    for s, target in enumerate(batch.targets):
        ids_Pk = unit.vocabularies.counterparts[s][unit.at_pairs(s, "ids")]
        columns = np.arange(s * k, s * k + ids_Pk.shape[1])
        picks[target.rows[:, None], columns] = np.where(ids_Pk < 0, batch.labels[target.rows, None], ids_Pk)
        targets.append(replace(target, ids=ids_Pk))
    return replace(batch, targets=tuple(targets), picks=picks)


def teacher_ids(unit: ScoredUnit, batch: FusionBatch) -> FusionBatch:
    """`teacher_ids` of each teacher: the tokens of `logps`, in its own vocabulary."""
    targets = [
        replace(target, teacher_ids=unit.at_pairs(s, "ids").astype(np.int64)) for s, target in enumerate(batch.targets)
    ]
    return replace(batch, targets=tuple(targets))


def graphs(unit: ScoredUnit, batch: FusionBatch) -> FusionBatch:
    """`graph` of each teacher, over all of its rows: its logit graphs, or what the closed form needs of them
    (InfiGFusion)."""
    stage = unit.spec.stage
    exact = isinstance(stage, InfiGFusion) and stage.mode == "exact"
    make = graph_matrices if exact else graph_features
    k = unit.spec.k or 0
    targets = []
    for target, answers in zip(batch.targets, unit.signals, strict=True):
        nothing = np.eye(k) if exact else np.zeros(k)
        graph = np.repeat(nothing[None].astype(np.float32), len(answers), axis=0)
        here = [b for b, answer in enumerate(answers) if answer is not None]
        if here:
            graph[here] = make([answer.logps[:, :k] for answer in answers if answer is not None])
        targets.append(replace(target, graph=graph))
    return replace(batch, targets=tuple(targets))


def graph_features(logps: Sequence[np.ndarray]) -> np.ndarray:
    """Teacher's side of InfiGFusion: sorted node features [B, k] float32 of B samples' logit graphs.

    Args:
        logps: per sample [L, k] top log-probabilities, over all of the teacher's rows.
    """
    from rayfuse.losses import gld_features

    return gld_features(*_gauged(logps), len(logps)).numpy()


def graph_matrices(logps: Sequence[np.ndarray]) -> np.ndarray:
    """The graphs themselves [B, k, k] float32, for the exact distance; argument as graph_features."""
    from rayfuse.losses import gld_graphs

    return gld_graphs(*_gauged(logps), len(logps)).numpy()


def _gauged(logps: Sequence[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    """All samples' values end to end [N, k] in the gauge of the graphs, and the sample of each row [N]."""
    import torch

    from rayfuse.losses import gauge

    sample_N = torch.repeat_interleave(torch.tensor([len(rows) for rows in logps]))
    return gauge(torch.from_numpy(np.concatenate(logps))), sample_N


def responses(unit: ScoredUnit, batch: FusionBatch) -> FusionBatch:
    """`response_logps` and `response_tokens` of each model: whole responses, nothing aligned (preferences)."""
    targets = [
        replace(
            target,
            response_logps=np.array(
                [item.token_logps.sum(dtype=np.float64) if item is not None else 0 for item in answers],
                dtype=np.float32,
            ),
            response_tokens=np.array(
                [len(item.token_logps) if item is not None else 1 for item in answers], dtype=np.float32
            ),
        )
        for target, answers in zip(batch.targets, unit.signals, strict=True)
    ]
    return replace(batch, targets=tuple(targets))


def carried(unit: ScoredUnit, batch: FusionBatch) -> FusionBatch:
    """`picks` and `mass`: all teachers' probabilities carried onto the student's tokens, byte by byte (see carry)."""
    stage = unit.spec.stage
    assert isinstance(stage, ByteKD)
    ids, mass = [], []
    for b, (sample, item) in enumerate(zip(unit.samples, unit.rendered, strict=True)):
        labels = item.response_ids.tolist()
        here = counting(batch.targets, [s for s, of_teacher in enumerate(unit.signals) if of_teacher[b] is not None], b)
        answered = [(unit.signals[s][b], unit.vocabularies.teachers[s]) for s in here]
        of_teachers = [
            carry(
                TeacherSide(cast(TopKSignals, answer), teacher.pieces, teacher.end_of_turn),
                sample.response.encode(),
                item.ends,
                labels,
                unit.vocabularies.prefixes,
            )
            for answer, teacher in answered
        ]
        counted = [batch.targets[s].sample_weights for s in here]
        prior = [
            batch.targets[s].weight * (1.0 if of_teacher is None else float(of_teacher[b]))
            for s, of_teacher in zip(here, counted, strict=True)
        ]
        weights = teacher_weights([cast(TopKSignals, answer) for answer, _ in answered], stage.temper, prior)
        of_sample = mix(of_teachers, weights.tolist(), labels, stage.width)
        ids.append(of_sample[0])
        mass.append(mixed_with_text(of_sample[1], counted, b))
    return replace(batch, picks=np.concatenate(ids), mass=np.concatenate(mass))


def unmatched(unit: ScoredUnit, batch: FusionBatch) -> FusionBatch:
    """`unmatched` and `overlap` of each teacher: what the vocabularies lack of each other (ULD with matched tokens)."""
    targets = []
    for target, table in zip(batch.targets, unit.vocabularies.counterparts, strict=True):
        lonely_V = np.ones(len(unit.vocabularies.student.pieces), dtype=bool)
        lonely_V[table[table >= 0]] = False
        targets.append(replace(target, unmatched=np.packbits(lonely_V), overlap=float((table >= 0).mean())))
    return replace(batch, targets=tuple(targets))


def mined(unit: ScoredUnit, batch: FusionBatch) -> FusionBatch:
    """`picks` and `mass`: each sample's best teacher, mapped by minimum edit distance, see mined (FuseLLM).

    Where the consensus weighs teachers, the best is the one of lowest cross-entropy among those that count most.
    """
    vocabularies = unit.vocabularies
    best, made = [], []
    for b, (sample, item) in enumerate(zip(unit.samples, unit.rendered, strict=True)):
        here = [(s, answers[b]) for s, answers in enumerate(unit.signals)]
        answered = [(s, answer) for s, answer in here if answer is not None]
        counted = [batch.targets[s].sample_weights for s, _ in answered]
        trusted = [answered[index] for index in likeliest(counted, b)]
        s, answer = trusted[lowest_entropy([answer for _, answer in trusted])]
        best.append(s)
        to_student = partial(vocabularies.nearest_ids, s)
        text = sample.response.encode()
        ids_NM, mass_NM = mined_target(answer, text, item.ends, item.response_ids, to_student, vocabularies.nearest)
        made.append((ids_NM, mixed_with_text(mass_NM, counted, b)))
    for s, teacher in enumerate(unit.spec.teachers):
        batch.stats[f"chosen/{teacher.name}"] = best.count(s)
    ids, mass = zip(*made, strict=True)
    return replace(batch, picks=np.concatenate(ids), mass=np.concatenate(mass))


def routed(unit: ScoredUnit, batch: FusionBatch) -> FusionBatch:
    """`picks` and `rollouts`: the teachers' mixture on the student's own texts, see routed; and `rows` of each teacher:
    the own positions of the samples in which it weighs most."""
    stage = unit.spec.stage
    assert isinstance(stage, OnPolicy)
    by_row = stage.teacher_weights == "consensus"
    made = []
    for b, (sample, item) in enumerate(zip(unit.samples, unit.rendered, strict=True)):
        if isinstance(sample, Rollout):
            weights = prompt_weights(unit.spec, sample, by_row)
            answers = [of_teacher[b] for of_teacher in unit.signals]
            made.append(sample_target(stage, sample, answers, weights, unit.vocabularies))
        else:
            made.append(written_target(item.response_ids, stage.width + stage.likely))
    picks, target, heaviest = stacked(made)
    targets = tuple(replace(one, rows=np.flatnonzero(heaviest == s)) for s, one in enumerate(batch.targets))
    return replace(batch, targets=targets, picks=picks, rollouts=target)


Builder = Callable[[ScoredUnit, FusionBatch], FusionBatch]

TARGETS: dict[str, Builder] = {
    "ranks": ranks,
    "tokens": tokens,
    "teacher_ids": teacher_ids,
    "graphs": graphs,
    "responses": responses,
    "carried": carried,
    "unmatched": unmatched,
    "mined": mined,
    "routed": routed,
}
"""Kind of target by its name."""

READS: dict[str, tuple[str, ...]] = {
    "ranks": ("logps", "byte_ends"),
    "tokens": ("logps", "ids", "byte_ends"),
    "teacher_ids": ("ids", "byte_ends"),
    "graphs": ("logps",),
    "responses": ("token_logps",),
    "carried": ("logps", "ids", "token_logps", "byte_ends"),
    "unmatched": (),
    "mined": ("logps", "ids", "token_logps", "byte_ends"),
    "routed": ("logps", "ids", "token_logps", "byte_ends"),
}
"""The fields of the signals that a kind is made of, and so all that is read from the store; not listed: everything."""


OF_VOCABULARIES = frozenset({"tokens", "carried", "unmatched", "mined", "routed"})
"""The kinds that ask what a teacher's tokens are, and so need its tokenizer beside its signals."""


def fields_read(kinds: Sequence[str]) -> tuple[str, ...]:
    """The fields that these kinds need together, in the order of signals.FIELDS."""
    asked = {field for kind in kinds for field in READS.get(kind, FIELDS)}
    return tuple(field for field in FIELDS if field in asked)


def bare_targets(spec: PrepareSpec, samples: Sequence[Sample]) -> tuple[TeacherTarget, ...]:
    """One target per teacher that says nothing yet, but how much it counts.

    Raises:
        DataError: see weights_of_teacher.
    """
    return tuple(
        TeacherTarget(
            one.name,
            one.teacher.weight,
            np.zeros(0, dtype=np.int64),
            np.zeros((0, 0), dtype=np.float16),
            sample_weights=weights_of_teacher(spec, one.name, samples),
        )
        for one in spec.teachers
    )
