"""Prepare: one unit of samples -> one packed FusionBatch, ready for a student's micro-step.

    samples -> signal store (hit) ---------------------+-> aligned to the student's rows -> FusionBatch
            -> teacher (miss: the whole unit) -> store -+

`Preparer` is the plain class; `prepare_unit` is the Ray task around it. The task is idempotent: whatever is lost is
done again and gives the same bits.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import ray

from rayfuse.alignment import align, align_by_position, token_bytes
from rayfuse.batch import FusionBatch, TeacherTarget
from rayfuse.carry import PrefixMap, TeacherSide, carry, mix, teacher_weights
from rayfuse.config import Model, Teacher
from rayfuse.data import Sample
from rayfuse.errors import MissingSignalsError, RayfuseError
from rayfuse.models import load_tokenizer
from rayfuse.render import Rendered, Renderer
from rayfuse.signals import TopKSignals
from rayfuse.store import SignalStore


class Scorer(Protocol):
    """What a teacher looks like from here: send a unit, then wait for its signals."""

    def score(self, samples: Sequence[Sample]) -> Callable[[], list[TopKSignals]]:
        """Send; the returned function waits."""


@dataclass(frozen=True)
class PrepareSpec:
    """What a stage asks of its prepare tasks; small, hashable, the same for all units.

    Attributes:
        student: whose tokenizer and template the batch is in.
        teachers: (teacher, fingerprint) of those whose signals the stage uses; empty for SFT.
        store: URL of the signal store.
        k: ranks that the batch carries per teacher position.
        alignment: "bytes" or "position".
        max_length: student tokens; longer prompts are cut from the left.
        graphs: whether the batch carries the features of the teachers' logit graphs.
        responses: whether it carries log-probabilities of whole responses instead of aligned top-K logits.
        soft: (width, temper) where it carries the teachers' mass on the student's tokens; see carry.
    """

    student: Model
    teachers: tuple[tuple[Teacher, str], ...]
    store: str
    k: int | None
    alignment: str
    max_length: int
    graphs: bool = False
    responses: bool = False
    soft: tuple[int, float] | None = None


class Preparer:
    """Makes FusionBatches. Holds tokenizers, the store and the teachers' clients between units."""

    def __init__(self, spec: PrepareSpec, ask: Callable[[Teacher, str], Scorer]) -> None:
        """Args: the spec, and how to reach a (teacher, fingerprint)."""
        self.spec = spec
        self.renderer = Renderer(load_tokenizer(spec.student))
        self.store = SignalStore(spec.store)
        if spec.soft:
            self.prefixes = PrefixMap(token_bytes(self.renderer.tokenizer))
            renderers = [Renderer(load_tokenizer(teacher)) for teacher, _ in spec.teachers]
            self.readers = [(token_bytes(renderer.tokenizer), renderer.end_of_turn) for renderer in renderers]
        self.scorers = [ask(teacher, fingerprint) for teacher, fingerprint in spec.teachers]

    def __call__(self, samples: Sequence[Sample]) -> FusionBatch:
        """The batch of one unit.

        Raises:
            RayfuseError: a sample cannot be rendered or aligned, or a teacher cannot answer; the sample is named.
        """
        begun = time.perf_counter()
        stats: dict[str, float] = {}
        signals = self._signals(samples, stats)
        rendered = [self._render(sample) for sample in samples]
        targets = tuple(
            self._target(teacher, rendered, of_teacher, samples)
            for of_teacher, (teacher, _) in zip(signals, self.spec.teachers, strict=True)
        )
        soft_ids, soft_mass = self._soft(samples, rendered, signals) if self.spec.soft else (None, None)
        stats["cut"] = sum(item.cut > 0 for item in rendered)
        stats["seconds"] = time.perf_counter() - begun
        return replace(_pack_batch(rendered, targets, stats), soft_ids=soft_ids, soft_mass=soft_mass)

    def _render(self, sample: Sample) -> Rendered:
        try:
            return self.renderer.render(sample, self.spec.max_length)
        except RayfuseError as error:
            raise type(error)(f"sample {sample.key[:12]} ({sample.response!r:.60}): {error}") from error

    def _signals(self, samples: Sequence[Sample], stats: dict[str, float]) -> list[list[TopKSignals]]:
        """Per teacher the signals of each sample: from the store, and from the teacher where one is missing there.

        A teacher always scores the whole unit, so that an answer computed again has the same bits; what the store
        already holds is used as it is. All teachers are asked before the first is waited for.
        """
        found = [[self.store.get(fp, sample.key) for sample in samples] for _, fp in self.spec.teachers]
        waits = [
            scorer.score(samples) if any(item is None for item in of_teacher) else None
            for scorer, of_teacher in zip(self.scorers, found, strict=True)
        ]
        signals = []
        for (teacher, fp), of_teacher, wait in zip(self.spec.teachers, found, waits, strict=True):
            missing = [index for index, item in enumerate(of_teacher) if item is None]
            stats[f"stored/{teacher.name}"] = len(samples) - len(missing)
            stats[f"forwarded/{teacher.name}"] = len(samples) if wait else 0
            if wait is None:
                signals.append([item for item in of_teacher if item is not None])
                continue
            answers = wait()
            if len(answers) != len(samples):
                raise MissingSignalsError(
                    f"teacher {teacher.name} answered {len(answers)} of {len(samples)} samples of a unit"
                )
            for index in missing:
                self.store.put(fp, samples[index].key, answers[index])
            signals.append([item or answers[index] for index, item in enumerate(of_teacher)])
        stats["damaged"] = self.store.damaged
        self.store.damaged = 0
        return signals

    def _soft(
        self, samples: Sequence[Sample], rendered: Sequence[Rendered], signals: Sequence[Sequence[TopKSignals]]
    ) -> tuple[np.ndarray, np.ndarray]:
        """The teachers' mass on the student's tokens at every predicted position: ids and mass [N, M]."""
        assert self.spec.soft is not None
        width, temper = self.spec.soft
        ids, mass = [], []
        for b, (sample, item) in enumerate(zip(samples, rendered, strict=True)):
            labels = item.response_ids.tolist()
            carried = [
                carry(TeacherSide(of_teacher[b], *reader), sample.response.encode(), item.ends, labels, self.prefixes)
                for of_teacher, reader in zip(signals, self.readers, strict=True)
            ]
            weights = teacher_weights([of_teacher[b] for of_teacher in signals], temper)
            of_sample = mix(carried, weights.tolist(), labels, width)
            ids.append(of_sample[0])
            mass.append(of_sample[1])
        return np.concatenate(ids), np.concatenate(mass)

    def _target(
        self,
        teacher: Teacher,
        rendered: Sequence[Rendered],
        signals: Sequence[TopKSignals],
        samples: Sequence[Sample],
    ) -> TeacherTarget:
        if self.spec.responses:
            return _responses(teacher, signals)
        rows, logps = [], []
        first_row = 0
        for item, answer, sample in zip(rendered, signals, samples, strict=True):
            try:
                if self.spec.alignment == "bytes":
                    pairs = align(item.ends, answer.byte_ends)
                else:
                    pairs = align_by_position(len(item.ends), len(answer.byte_ends))
            except RayfuseError as error:
                raise type(error)(f"teacher {teacher.name}, sample {sample.key[:12]}: {error}") from error
            rows.append(first_row + pairs.student)
            logps.append(answer.logps[pairs.teacher, : self.spec.k])
            first_row += len(item.response_ids)
        graph = graph_features([answer.logps[:, : self.spec.k] for answer in signals]) if self.spec.graphs else None
        return TeacherTarget(teacher.name, teacher.weight, np.concatenate(rows), np.concatenate(logps), graph)


def _responses(teacher: Teacher, signals: Sequence[TopKSignals]) -> TeacherTarget:
    """Log-probability and length of whole responses under one model; nothing is aligned."""
    return TeacherTarget(
        teacher=teacher.name,
        weight=teacher.weight,
        rows=np.zeros(0, dtype=np.int64),
        logps=np.zeros((0, 0), dtype=np.float16),
        response_logps=np.array([answer.token_logps.sum(dtype=np.float64) for answer in signals], dtype=np.float32),
        response_tokens=np.array([len(answer) for answer in signals], dtype=np.float32),
    )


def graph_features(logps: Sequence[np.ndarray]) -> np.ndarray:
    """Teacher's side of InfiGFusion: sorted node features [B, k] float32 of B samples' logit graphs.

    Args:
        logps: per sample [L, k] top log-probabilities, over all of the teacher's rows.
    """
    import torch

    from rayfuse.losses import gauge, gld_features

    sample_N = torch.repeat_interleave(torch.tensor([len(rows) for rows in logps]))
    return gld_features(gauge(torch.from_numpy(np.concatenate(logps))), sample_N, len(logps)).numpy()


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


# --- the Ray task ------------------------------


@lru_cache(maxsize=8)
def _preparer(spec: PrepareSpec) -> Preparer:
    """One preparer per process and stage: Ray reuses the processes of tasks, so tokenizers load once."""
    if not spec.teachers:
        return Preparer(spec, _no_teacher)
    from rayfuse.teachers.deployment import TeacherClient

    return Preparer(spec, TeacherClient)


def _no_teacher(teacher: Teacher, fingerprint: str) -> Scorer:
    raise AssertionError(f"a stage without teachers asked {teacher.name} ({fingerprint})")


@ray.remote
def prepare_unit(spec: PrepareSpec, units: list[list[Sample]], index: int, after: Any = None) -> Any:
    """The FusionBatch of unit `index` of a block of units.

    `after` is the batch of the same unit from the epoch before, where that is still in preparation: Ray waits for it,
    so that this task finds the teachers' answers in the store instead of asking again.
    """
    return _preparer(spec)(units[index])
