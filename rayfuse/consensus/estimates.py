"""Estimates: how often each source is right, in which field, and what its certainty is worth."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from rayfuse.consensus.candidates import LABEL
from rayfuse.consensus.clusters import Clusters
from rayfuse.consensus.reliability import BINS, EDGES, UNKNOWN_BIN, Claims


@dataclass(frozen=True)
class Estimate:
    """How often a source is right, in one field or over all ("").

    Attributes:
        source, field: whose, and where.
        answers: that it gave there.
        right: estimated share of them that is right.
        low, high: 95% interval of that share; wider where the posteriors are unsure.
    """

    source: str
    field: str
    answers: int
    right: float
    low: float
    high: float


@dataclass(frozen=True)
class CalibrationRow:
    """One bin of a source's certainty.

    Attributes:
        source: whose.
        low, high: edges of the bin, nats per token; None on the open sides.
        answers: in the bin.
        stated: mean of exp(certainty), the probability per token that the source gives to what it wrote.
        right: estimated share that is right.
    """

    source: str
    low: float | None
    high: float | None
    answers: int
    stated: float
    right: float


def wrong_labels(estimates: Sequence[Estimate]) -> Estimate | None:
    """Share of labels that are wrong, from the estimate of those that are right."""
    right = next((one for one in estimates if one.source == LABEL and not one.field), None)
    return right and replace(right, right=1 - right.right, low=1 - right.high, high=1 - right.low)


def estimates_of(claims: Claims, hit: np.ndarray, clusters: Clusters) -> tuple[Estimate, ...]:
    """How often each source is right, over all and (where there are several fields) in each.

    Args:
        claims: N of them.
        hit: p(right) of each claim [N].
        clusters: the fields.
    """
    estimates = []
    cluster = claims.cluster[claims.prompt]
    for s, source in enumerate(claims.sources):
        of_source = claims.source == s
        places = [("", of_source)]
        if len(clusters.names) > 1:
            places += [(name, of_source & (cluster == c)) for c, name in enumerate(clusters.names)]
        estimates += [_estimate(source, field, hit[where]) for field, where in places if where.any()]
    return tuple(estimates)


def _estimate(source: str, field: str, hit: np.ndarray) -> Estimate:
    n, right = len(hit), float(hit.mean())
    # Two kinds of doubt: other prompts would be answered otherwise, and which of these answers is right is not sure.
    spread = right * (1 - right) / n + float((hit * (1 - hit)).sum()) / n**2
    effective = right * (1 - right) / spread if spread > 0 else n
    low, high = wilson(right, max(effective, 1.0))
    return Estimate(source, field, n, right, low, high)


def wilson(share: float, n: float) -> tuple[float, float]:
    """95% Wilson interval of a share of n."""
    z = 1.959964
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def calibration_of(claims: Claims, hit: np.ndarray) -> tuple[CalibrationRow, ...]:
    """What each model's certainty is worth: estimated share of right answers by bin of certainty."""
    rows = []
    edges = [None, *EDGES, None]
    for s, source in enumerate(claims.sources):
        for b in range(BINS):
            where = (claims.source == s) & (claims.bin == b)
            if b == UNKNOWN_BIN or not where.any():
                continue
            stated = float(np.exp(claims.certainty[where]).mean())
            rows.append(
                CalibrationRow(source, edges[b], edges[b + 1], int(where.sum()), stated, float(hit[where].mean()))
            )
    return tuple(rows)
