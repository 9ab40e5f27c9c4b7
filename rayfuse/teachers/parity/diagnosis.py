"""The most likely cause of a teacher that does not answer as its reference does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rayfuse.data.sample import Sample
from rayfuse.signals.topk import TopKSignals
from rayfuse.teachers.parity.reference import PLAIN, Reference, Variation

ALIKE = 2.0
"""A number format explains a difference that is this many times larger or smaller than what it does itself."""


@dataclass(frozen=True)
class Diagnosis:
    """The most likely cause of a difference.

    Attributes:
        cause: template, bos, padding, dtype, quantisation, position, tokenizer or weights.
        text: what the serving path seems to do.
        before, after: the difference to the reference, and what is left of it when the reference does the same.
    """

    cause: str
    text: str
    before: float
    after: float


def diagnose(
    reference: Reference, answers: Sequence[tuple[Sample, TopKSignals]], templates: Mapping[str, str], accepted: float
) -> Diagnosis:
    """Try every variation and name the one that comes closest to the answers.

    A variation is the cause where it leaves less than half of the difference, or less than `accepted`. Two forwards in
    a low number format differ in every kernel's rounding: a format is the cause where it changes the reference by as
    much as the answers differ from it.

    Args:
        reference: the teacher's own model.
        answers: the probes and what the serving path said.
        templates: chat templates of other models, by name.
        accepted: largest difference (nats) that is none.
    """
    before = _largest(reference, answers, PLAIN)
    found: list[tuple[float, Variation]] = []
    for variation in reference.variations(templates):
        try:
            found.append((_largest(reference, answers, variation), variation))
        except Exception:  # a template that refuses the conversation explains nothing
            continue
    after, best = min(found, key=lambda item: item[0])
    if after < max(before / 2, accepted):
        return Diagnosis(best.cause, best.text, before, after)
    for variation in reference.formats():
        size = max(reference.effect(sample, answer, variation) for sample, answer in answers)
        if size / ALIKE < before < size * ALIKE:
            return Diagnosis(variation.cause, variation.text, before, abs(before - size))
    top1 = np.mean([reference.difference(sample, answer).top1 for sample, answer in answers])
    return Diagnosis(
        "weights",
        f"has other weights than {len(found)} tried variations of the configured ones explain (another revision, a "
        f"fine-tune, damaged files, or a quantisation of another kind; the most likely token agrees in {top1:.0%} of "
        "the positions)",
        before,
        after,
    )


def _largest(reference: Reference, answers: Sequence[tuple[Sample, TopKSignals]], variation: Variation) -> float:
    return max(reference.difference(sample, answer, variation).mean for sample, answer in answers)
