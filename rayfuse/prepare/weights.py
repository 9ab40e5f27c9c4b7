"""How much teachers and samples count in a unit, where a stage weighs them by the consensus.

The weights come with the samples (data.weights). A loss that adds up distances multiplies them (FusionBatch.factors);
a target that mixes or chooses teachers does that here:

    w_sb    ~ v_s p_sb                             v_s: teachers[].weight, p_sb: p(teacher s is right on prompt b)
    q       = k_b SUM_s w_sb q_s + (1 - k_b) onehot(y)      k_b = min(1, SUM_s p_sb): where nobody knows, the written
                                                            text is the target
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from rayfuse.batch import TeacherTarget
from rayfuse.data.sample import Sample
from rayfuse.data.weights import SAMPLE, TEACHERS
from rayfuse.errors import DataError
from rayfuse.prepare.spec import PrepareSpec


def weights_of_teacher(spec: PrepareSpec, name: str, samples: Sequence[Sample]) -> np.ndarray | None:
    """How much a teacher counts in each sample [B] float32; None where the stage does not weigh teachers so.

    Raises:
        DataError: a sample has no weight of that teacher.
    """
    if spec.stage is None or "teachers" not in spec.stage.weighs:
        return None
    return np.array([_of_teacher(sample, name) for sample in samples], dtype=np.float32)


def weights_of_samples(spec: PrepareSpec, samples: Sequence[Sample]) -> np.ndarray | None:
    """How much each sample counts [B] float32; None where the stage does not weigh samples so.

    Raises:
        DataError: a sample has no weight.
    """
    if spec.stage is None or "samples" not in spec.stage.weighs:
        return None
    return np.array([_of_sample(sample) for sample in samples], dtype=np.float32)


def refuse_without_weights(samples: Sequence[Sample], teachers: Sequence[str], weighs: Collection[str]) -> None:
    """Raises DataError where a sample lacks a weight that a stage reads; see Stage.weighs."""
    for sample in samples:
        if "samples" in weighs:
            _of_sample(sample)
        for name in teachers if "teachers" in weighs else ():
            _of_teacher(sample, name)


def _of_teacher(sample: Sample, name: str) -> float:
    weight = sample.weights.teacher(name) if sample.weights is not None else None
    return _there(weight, sample, f"'{TEACHERS}' of {name}", "teacher_weights")


def _of_sample(sample: Sample) -> float:
    weight = sample.weights.sample if sample.weights is not None else None
    return _there(weight, sample, f"'{SAMPLE}'", "sample_weights")


def _there(weight: float | None, sample: Sample, what: str, key: str) -> float:
    if weight is None:
        raise DataError(
            f"sample {sample.key[:12]} ({sample.response!r:.60}) has no {what}, which `{key}: consensus` reads: let "
            "the run make them (the section `consensus`), or name data that have them, as the file "
            "consensus/choices.jsonl of an earlier run"
        )
    return weight


def mixed_with_text(mass: np.ndarray, weights: Sequence[np.ndarray | None], b: int) -> np.ndarray:
    """Targets [n, M] of sample b with the written text's share: k_b `mass`, and 1 - k_b on the label (column 0).

    Args:
        mass: the teachers' target, each row summing to 1.
        weights: how much each teacher that answered counts in each sample; None: the mass stays.
        b: which sample.
    """
    given = [of_teacher[b] for of_teacher in weights if of_teacher is not None]
    if not given:
        return mass
    known = min(np.float32(1), np.sum(given, dtype=np.float32))
    mixed = known * mass
    mixed[:, 0] += 1 - known
    return mixed


def likeliest(weights: Sequence[np.ndarray | None], b: int) -> list[int]:
    """Which of the teachers count most in sample b: all, where they count alike."""
    here = [1.0 if of_teacher is None else float(of_teacher[b]) for of_teacher in weights]
    return [index for index, weight in enumerate(here) if weight == max(here)]


def counting(targets: Sequence[TeacherTarget], answered: Sequence[int], b: int) -> list[int]:
    """Of the teachers that answered sample b those with a weight there; all, where none has one."""
    weights = [targets[s].sample_weights for s in answered]
    return [s for s, w in zip(answered, weights, strict=True) if w is None or w[b] > 0] or list(answered)
