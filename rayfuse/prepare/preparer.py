"""Prepare: one unit of samples -> one packed FusionBatch, ready for a student's micro-step.

    samples -> signal store (hit) ---------------------+-> aligned to the student's rows -> FusionBatch
            -> teacher (miss: the whole unit) -> store -+

Plain Python; `tasks.prepare_unit` is the Ray task around it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from rayfuse.batch import FusionBatch, TeacherTarget
from rayfuse.config import OnPolicy, Teacher
from rayfuse.data.render import Rendered, Renderer
from rayfuse.data.rollout import Rollout, render_rollout
from rayfuse.data.sample import Sample
from rayfuse.errors import MissingSignalsError, RayfuseError, TeacherGoneError
from rayfuse.metrics.definitions import (
    ROLLOUT_AGE,
    ROLLOUT_EMPTY,
    ROLLOUT_SHARE,
    ROLLOUT_TOKENS,
    ROLLOUT_UNFINISHED,
)
from rayfuse.prepare.routed import heard, prompt_weights
from rayfuse.prepare.spec import INITIAL, PrepareSpec, Scorer
from rayfuse.prepare.targets import TARGETS, ScoredUnit, bare_targets, fields_read
from rayfuse.prepare.vocabulary import Vocabularies
from rayfuse.prepare.weights import weights_of_samples
from rayfuse.signals.store import SignalStore
from rayfuse.signals.topk import TopKSignals
from rayfuse.teachers.identity import IdentifiedTeacher

log = logging.getLogger(__name__)
GONE_PAUSE_S = 5.0
"""Pause before a teacher that is gone is asked again, where a run waits for it."""


@dataclass(frozen=True)
class _Asked:
    """One teacher's signals of a unit, while it is being asked.

    Attributes:
        found: per sample what the store holds.
        sent: positions of the samples of each call, and the function that waits for its answers.
    """

    teacher: IdentifiedTeacher
    scorer: Scorer
    found: list[TopKSignals | None]
    sent: list[tuple[range, Callable[[], list[TopKSignals]]]]


class Preparer:
    """Makes FusionBatches. Holds tokenizers, the store and the teachers' clients between units."""

    def __init__(self, spec: PrepareSpec, ask: Callable[[IdentifiedTeacher], Scorer]) -> None:
        """Prepare for `spec`; `ask` tells how a teacher is reached."""
        self.spec = spec
        self.renderer = Renderer.of(spec.student)
        self.store = SignalStore(spec.store)
        self.vocabularies = Vocabularies(self.renderer, [one.teacher for one in spec.teachers])
        self.fields = fields_read(spec.targets)
        self.scorers = [ask(teacher) for teacher in spec.teachers]
        self.gone: dict[str, float] = {}

    def __call__(self, samples: Sequence[Sample]) -> FusionBatch:
        """The batch of one unit.

        Raises:
            RayfuseError: a sample cannot be rendered or aligned, or a teacher cannot answer; the sample is named.
        """
        stats: dict[str, float] = {}
        if self.spec.stage is not None and self.spec.stage.writes:
            samples = self._readable(samples, stats)
        signals = self._signals_read(samples, stats)
        rendered = [self._render(sample) for sample in samples]
        batch = _pack_batch(rendered, bare_targets(self.spec, samples), stats)
        batch = replace(batch, sample_weights=weights_of_samples(self.spec, samples))
        unit = ScoredUnit(self.spec, self.vocabularies, samples, rendered, signals)
        for kind in self.spec.targets if self.spec.teachers else ():
            batch = TARGETS[kind](unit, batch)
        if self.spec.on_missing == "drop":
            batch = _with_answered(batch, signals)
        stats["cut"] = sum(item.cut > 0 for item in rendered)
        return batch

    def _signals_read(self, samples: Sequence[Sample], stats: dict[str, float]) -> list[list[TopKSignals | None]]:
        """The signals that the stage learns from: of all samples or, where the student writes, of what it wrote, from
        the teachers that count there."""
        if self.spec.stage is None or not self.spec.stage.writes:
            return self.signals(samples, stats)
        by_row = self._stage.teacher_weights == "consensus"
        shares = [
            heard(prompt_weights(self.spec, sample, by_row)) if isinstance(sample, Rollout) else set()
            for sample in samples
        ]
        read = [[b for b, asked in enumerate(shares) if s in asked] for s in range(len(self.spec.teachers))]
        found = self._asked_signals([[samples[b] for b in own] for own in read], stats)
        spread: list[list[TopKSignals | None]] = [[None] * len(samples) for _ in self.spec.teachers]
        for s, (own, answers) in enumerate(zip(read, found, strict=True)):
            for b, answer in zip(own, answers, strict=True):
                spread[s][b] = answer
            if self.spec.on_missing == "drop":
                stats[f"dropped/{self.spec.teachers[s].name}"] = answers.count(None)
        return spread

    @property
    def _stage(self) -> OnPolicy:
        assert isinstance(self.spec.stage, OnPolicy)
        return self.spec.stage

    def _readable(self, samples: Sequence[Sample], stats: dict[str, float]) -> list[Sample]:
        """The samples; in place of a rollout that says nothing, or that a teacher's tokenizer changes, what the data
        write. And what is measured of the rollouts."""
        tokenizers = self.vocabularies.teacher_tokenizers
        read: list[Sample] = []
        for sample in samples:
            unreadable = isinstance(sample, Rollout) and not sample.readable_for(tokenizers)
            read.append(sample.written or sample if isinstance(sample, Rollout) and unreadable else sample)
        own = [sample for sample in read if isinstance(sample, Rollout)]
        stats[ROLLOUT_SHARE.name] = len(own) / len(read)
        stats[ROLLOUT_TOKENS.name] = sum(len(rollout.token_ids) for rollout in own)
        stats[ROLLOUT_AGE.name] = max((rollout.age for rollout in own), default=0)
        stats[ROLLOUT_UNFINISHED.name] = sum(not rollout.finished for rollout in own)
        stats[ROLLOUT_EMPTY.name] = sum(isinstance(sample, Rollout) for sample in samples) - len(own)
        return read

    def _render(self, sample: Sample) -> Rendered:
        try:
            if isinstance(sample, Rollout):
                return render_rollout(self.renderer, sample, self._stage.room(self.spec.max_length))
            return self.renderer.render(sample, self.spec.max_length)
        except RayfuseError as error:
            raise type(error)(f"sample {sample.key[:12]} ({sample.response!r:.60}): {error}") from error

    def signals(self, samples: Sequence[Sample], stats: dict[str, float]) -> list[list[TopKSignals | None]]:
        """Per teacher the signals of each sample: from the store, and from the teacher where one is missing there.

        A teacher always scores a whole call, so that an answer computed again has the same bits; what the store already
        holds is used as it is, and read no further than the targets need. A call is the unit; of preference pairs the
        chosen responses are one call and the rejected ones another, for an earlier stage may have learnt from the
        chosen ones. All calls are sent before the first is waited for. Where on_missing is "drop", None stands for what
        a teacher that is gone has not answered.
        """
        signals = self._asked_signals([samples] * len(self.spec.teachers), stats)
        if self.spec.on_missing == "drop":
            self._drop(samples, signals, stats)
        return signals

    def _asked_signals(
        self, samples_of: Sequence[Sequence[Sample]], stats: dict[str, float]
    ) -> list[list[TopKSignals | None]]:
        """The signals of each teacher's samples; see `signals`."""
        sides = max(1, len(self.spec.stage.sides)) if self.spec.stage is not None else 1
        asked = [
            self._ask(teacher, scorer, samples, [range(side, len(samples), sides) for side in range(sides)])
            for teacher, scorer, samples in zip(self.spec.teachers, self.scorers, samples_of, strict=True)
        ]
        signals = [self._complete(one, samples, stats) for one, samples in zip(asked, samples_of, strict=True)]
        stats["damaged"] = self.store.damaged
        self.store.damaged = 0
        return signals

    def _ask(
        self, teacher: IdentifiedTeacher, scorer: Scorer, samples: Sequence[Sample], calls: Sequence[range]
    ) -> _Asked:
        """Look a teacher's signals up, and send the calls of which one is missing."""
        found = [self.store.get(teacher.fingerprint, sample.key, self.fields) for sample in samples]
        needed = [call for call in calls if any(found[i] is None for i in call) and not self._is_gone(teacher.teacher)]
        return _Asked(teacher, scorer, found, [(call, scorer.score([samples[i] for i in call])) for call in needed])

    def _complete(self, asked: _Asked, samples: Sequence[Sample], stats: dict[str, float]) -> list[TopKSignals | None]:
        """Wait for what was asked, and keep it in the store."""
        teacher, complete = asked.teacher, list(asked.found)
        stats[f"stored/{teacher.name}"] = sum(item is not None for item in complete)
        stats[f"forwarded/{teacher.name}"] = sum(len(call) for call, _ in asked.sent)
        for call, wait in asked.sent:
            answers = self._answers(teacher.teacher, asked.scorer, [samples[i] for i in call], wait)
            if answers is None:
                continue
            if len(answers) != len(call):
                raise MissingSignalsError(
                    f"teacher {teacher.name} answered {len(answers)} of {len(call)} samples of a call"
                )
            for i, answer in zip(call, answers, strict=True):
                if complete[i] is None:
                    self.store.put(teacher.fingerprint, samples[i].key, answer)
                    complete[i] = answer
        return complete

    def _answers(
        self, teacher: Teacher, scorer: Scorer, samples: Sequence[Sample], wait: Callable[[], list[TopKSignals]]
    ) -> list[TopKSignals] | None:
        """What the teacher says; None where it is gone and may be dropped."""
        while True:
            try:
                return wait()
            except TeacherGoneError as error:
                if self.spec.on_missing == "fail" or (self.spec.on_missing == "drop" and teacher.name == INITIAL):
                    raise
                log.warning("%s (serving.on_missing: %s)", error, self.spec.on_missing)
                if self.spec.on_missing == "drop":
                    self.gone[teacher.name] = time.monotonic()
                    return None
                time.sleep(GONE_PAUSE_S)
                wait = scorer.score(samples)

    def _is_gone(self, teacher: Teacher) -> bool:
        """Whether the teacher was found gone a moment ago: each unit would lose its whole patience again."""
        since = self.gone.get(teacher.name)
        return since is not None and time.monotonic() - since < teacher.patience_s

    def _drop(
        self, samples: Sequence[Sample], signals: list[list[TopKSignals | None]], stats: dict[str, float]
    ) -> None:
        """Count what is dropped. A preference pair is dropped as a whole, so that both sides are fused from the same.

        Raises:
            MissingSignalsError: no teacher at all has signals for a sample.
        """
        if self.spec.stage is not None and self.spec.stage.uses_preferences:
            sides = len(self.spec.stage.sides)
            for answers in signals:
                for b in range(0, len(answers), sides):
                    if None in answers[b : b + sides]:
                        answers[b : b + sides] = [None] * sides
        fused = [s for s, teacher in enumerate(self.spec.teachers) if teacher.name != INITIAL]
        for s in fused:
            stats[f"dropped/{self.spec.teachers[s].name}"] = sum(item is None for item in signals[s])
        for b, sample in enumerate(samples):
            if fused and all(signals[s][b] is None for s in fused):
                raise MissingSignalsError(
                    f"no teacher has signals for sample {sample.key[:12]} ({sample.response!r:.60}): there is nothing "
                    "to go on with, although serving.on_missing is drop"
                )


def _with_answered(batch: FusionBatch, signals: Sequence[Sequence[TopKSignals | None]]) -> FusionBatch:
    targets = [
        replace(target, answered=np.array([item is not None for item in answers]))
        for target, answers in zip(batch.targets, signals, strict=True)
    ]
    return replace(batch, targets=tuple(targets))


def _pack_batch(
    rendered: Sequence[Rendered], targets: tuple[TeacherTarget, ...], stats: dict[str, float]
) -> FusionBatch:
    B = len(rendered)
    T = max(item.length for item in rendered) - 1  # the end-of-turn token itself is predicted, never read
    input_ids_BT = np.zeros((B, T), dtype=np.int64)
    mask_BT = np.zeros((B, T), dtype=np.int64)
    positions, labels, sample = [], [], []
    for b, item in enumerate(rendered):
        p, n = len(item.prompt_ids), len(item.response_ids)
        input_ids_BT[b, :p] = item.prompt_ids
        input_ids_BT[b, p : p + n - 1] = item.response_ids[:-1]
        mask_BT[b, : p + n - 1] = 1
        positions.append(b * T + p - 1 + np.arange(n))
        labels.append(item.response_ids)
        sample.append(np.full(n, b))
    return FusionBatch(
        input_ids=input_ids_BT,
        attention_mask=mask_BT,
        positions=np.concatenate(positions),
        labels=np.concatenate(labels),
        sample=np.concatenate(sample),
        targets=targets,
        stats=stats,
    )
