"""FusionBatch: one unit as the student consumes it, with every teacher's signals at the positions where they meet."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class TeacherTarget:
    """One teacher's signals where they meet the student's positions.

    Attributes:
        teacher: its name.
        weight: w_s of the loss.
        rows: [P] int64, rows of the batch's N predicted positions.
        logps: [P, k] float16, sorted descending: the teacher's top log-probabilities there.
    """

    teacher: str
    weight: float
    rows: np.ndarray
    logps: np.ndarray


@dataclass(frozen=True)
class FusionBatch:
    """One unit as the student consumes it: B samples, T tokens with padding, N predicted positions.

    Attributes:
        input_ids: [B, T] int64, padded on the right with 0.
        attention_mask: [B, T] int64, 1 at real tokens.
        positions: [N] int64, indices into the flattened [B * T] hidden states that predict a response token.
        labels: [N] int64, the token each of them predicts (the last of a sample: end-of-turn).
        sample: [N] int64, which of the B samples a position belongs to.
        targets: one per teacher, in the order of the spec.
        stats: what it took: teacher name -> samples forwarded and found in the store, seconds, cut prompts.
    """

    input_ids: np.ndarray
    attention_mask: np.ndarray
    positions: np.ndarray
    labels: np.ndarray
    sample: np.ndarray
    targets: tuple[TeacherTarget, ...] = ()
    stats: dict[str, float] = field(default_factory=dict)

    @property
    def counts(self) -> np.ndarray:
        """float64 [1 + teachers]: predicted tokens, and aligned pairs per teacher: the losses' denominators."""
        return np.array([len(self.labels), *(len(target.rows) for target in self.targets)], dtype=np.float64)
