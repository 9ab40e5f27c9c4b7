"""FusionBatch: one unit as the student consumes it, with every teacher's signals at the positions where they meet."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class TeacherTarget:
    """One teacher's signals where they meet the student's positions; which fields are filled, see targets.

    Attributes:
        teacher: its name.
        weight: w_s of the loss.
        rows: [P] int64, rows of the batch's N predicted positions.
        logps: [P, k] float16, sorted descending: the teacher's top log-probabilities there.
        response_logps: [B] float32 or None: the log-probability of each whole response, end-of-turn counted.
        response_tokens: [B] float32 or None: its number of tokens under this model's tokenizer, end-of-turn counted.
        graph: float32 or None: of the teacher's logit graph of each sample, over all rows of the teacher (InfiGFusion
            needs no alignment), the sorted node features [B, k] or, in exact mode, the graph itself [B, k, k].
        ids: [P, k] int64 or None: the student's tokens that write the same bytes as those of `logps`, -1 where the
            student has none.
        teacher_ids: [P, k] int64 or None: the tokens of `logps` in the teacher's own vocabulary.
        unmatched: [ceil(V / 8)] uint8 or None: a bit per token of the student, 1 where the teacher has none of the same
            bytes.
        overlap: share of the teacher's tokens that the student has too; known where `unmatched` is.
        answered: [B] bool or None: samples that this teacher has signals for; None: all. Where it has none, it has no
            rows, and the other fields hold nothing that may be read.
        sample_weights: [B] float32 or None: how much the teacher counts in each sample, besides `weight`; None: fully.
    """

    teacher: str
    weight: float
    rows: np.ndarray
    logps: np.ndarray
    graph: np.ndarray | None = None
    response_logps: np.ndarray | None = None
    response_tokens: np.ndarray | None = None
    ids: np.ndarray | None = None
    teacher_ids: np.ndarray | None = None
    unmatched: np.ndarray | None = None
    overlap: float = 0.0
    answered: np.ndarray | None = None
    sample_weights: np.ndarray | None = None


@dataclass(frozen=True)
class RolloutTarget:
    """What the teachers say of texts that the student wrote, on `picks`; see prepare/routed.py.

    Attributes:
        own: [N] bool: positions of texts that the student wrote; the others are learnt as they are written.
        taught: [N] bool: own positions at which the teachers' distribution is known.
        cells: [N, M] int64: the cell that a pick belongs to, -1: none.
        mass: [N, M] float32: the teachers' probability of each cell; a row adds up to at most 1.
        chunks: [N] int64: the chunk of an own position, -1: none.
        chunk_logps: [N] float32: the teacher's log-probability of that whole chunk.
        counts: [N] float32: how much the position counts.
    """

    own: np.ndarray
    taught: np.ndarray
    cells: np.ndarray
    mass: np.ndarray
    chunks: np.ndarray
    chunk_logps: np.ndarray
    counts: np.ndarray


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
        picks: int64 [N, M] or None: tokens of the student whose logits the loss needs besides the top-K.
        mass: float32 [N, M] or None: the teachers' probabilities on `picks`, each row summing to 1; column 0 of the
            picks is then the label.
        sample_weights: [B] float32 or None: how much each sample counts; None: all alike.
        rollouts: what the teachers say of the student's own texts, or None.
        stats: what it took: teacher name -> samples forwarded and found in the store, cut prompts.
    """

    input_ids: np.ndarray
    attention_mask: np.ndarray
    positions: np.ndarray
    labels: np.ndarray
    sample: np.ndarray
    targets: tuple[TeacherTarget, ...] = ()
    picks: np.ndarray | None = None
    mass: np.ndarray | None = None
    sample_weights: np.ndarray | None = None
    rollouts: RolloutTarget | None = None
    stats: dict[str, float] = field(default_factory=dict)

    @property
    def counts(self) -> Counts:
        """The losses' denominators."""
        return Counts(
            len(self.labels),
            len(self.input_ids),
            tuple(len(target.rows) for target in self.targets),
            tuple(float(target.answered[self.sample].sum()) for target in self.targets if target.answered is not None),
        )

    @property
    def shares(self) -> np.ndarray | None:
        """f_b [B]: by how much the remaining teachers count more in each sample, so that their weights add up to those
        of all teachers; None where every teacher answered every sample.

            f_b = SUM_s w_sb / SUM_{s answered b} w_sb        w_sb = w_s times the teacher's weight in the sample

        It is 0 where no teacher with a weight answered: nobody speaks for the others there.
        """
        answered = [target.answered for target in self.targets]
        if all(answered_B is None or answered_B.all() for answered_B in answered):
            return None
        everywhere_B = np.ones(len(self.input_ids))
        weights_SB = np.stack(
            [
                target.weight * (everywhere_B if target.sample_weights is None else target.sample_weights)
                for target in self.targets
            ]
        )
        answered_SB = np.stack([everywhere_B if answered_B is None else answered_B for answered_B in answered])
        remaining_B = (weights_SB * answered_SB).sum(0)
        share_B: np.ndarray = weights_SB.sum(0) / np.where(remaining_B > 0, remaining_B, np.inf)
        return share_B

    def factors(self, s: int) -> np.ndarray | None:
        """How much teacher s's distance counts in each sample [B] float32, besides its `weight`: its weight there times
        the sample's times `shares`, 0 where it did not answer. None where it counts fully in all samples."""
        target = self.targets[s]
        given = [one for one in (self.shares, target.sample_weights, self.sample_weights) if one is not None]
        if not given:
            return None
        product_B: np.ndarray = np.prod(np.stack(given, dtype=np.float64), axis=0)
        return (product_B * (True if target.answered is None else target.answered)).astype(np.float32)

    @property
    def row_weights(self) -> np.ndarray | None:
        """How much each predicted position counts [N] float32: as its sample does; None: all alike."""
        return None if self.sample_weights is None else self.sample_weights[self.sample]

    def known(self) -> np.ndarray | None:
        """How surely some teacher knows what is right [B] float32: min(1, the sum of their weights in each sample).

        What a mixture of the teachers takes of a target; the rest is the written text's. None where no teacher has
        weights by sample.
        """
        weights = [target.sample_weights for target in self.targets if target.sample_weights is not None]
        return np.minimum(np.sum(weights, axis=0, dtype=np.float32), np.float32(1)) if weights else None


@dataclass(frozen=True)
class Counts:
    """Denominators of the losses: of one micro-batch, or summed over a global batch.

    Attributes:
        tokens: predicted positions.
        samples: samples.
        pairs: per teacher, positions aligned with it.
        answered: per teacher, predicted positions of the samples that it answered; empty where none is dropped.
    """

    tokens: float
    samples: float
    pairs: tuple[float, ...] = ()
    answered: tuple[float, ...] = ()

    def as_array(self) -> np.ndarray:
        """float64 [2 + teachers (+ teachers)], for sums over micro-batches and workers."""
        return np.array([self.tokens, self.samples, *self.pairs, *self.answered], dtype=np.float64)

    @staticmethod
    def of_array(values: np.ndarray, teachers: int | None = None) -> Counts:
        """The inverse of `as_array`; `teachers` tells `pairs` from `answered`, where there is any."""
        tokens, samples, *rest = values.tolist()
        per_kind = len(rest) if teachers is None else teachers
        return Counts(tokens, samples, tuple(rest[:per_kind]), tuple(rest[per_kind:]))

    def expected_pairs(self, s: int) -> float:
        """The positions that teacher s would be aligned with, had it answered every sample."""
        if not self.answered or self.answered[s] == self.tokens:
            return self.pairs[s]
        return self.pairs[s] * self.tokens / max(self.answered[s], 1)
