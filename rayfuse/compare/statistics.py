"""Means and differences with intervals over seeds and items.

The marks of a method are a matrix [S, I]: S seeds, each another training set and order, all scored on the same I items.
Both are samples: of the training sets one might have drawn, and of the items one might have asked. So the interval of
the mean comes from the crossed random-effects model

    x_si = mean + seed_s + item_i + rest_si,         var(mean) = (MS_seed + MS_item - MS_rest) / (S I),

with Student's t at Satterthwaite's degrees of freedom. Differences between two methods are taken seed by seed and item
by item first: what makes a seed or an item easy for both falls out.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy import stats


class Estimate(NamedTuple):
    """A mean with its 95% interval."""

    mean: float
    low: float
    high: float

    @property
    def sign(self) -> int:
        """1 where the interval is above 0, -1 where it is below, 0 where it holds 0."""
        return int(self.low > 0) - int(self.high < 0)


def crossed_interval(values_SI: np.ndarray, level: float = 0.95) -> Estimate:
    """Mean of [S, I] values, I >= 2, and its interval over seeds and items (over items alone where S is 1).

    A variance that the method of moments puts below that of the seeds or that of the items alone is raised to the
    larger of them, so that the interval is never narrower than one over seeds, or over items, alone would be.
    """
    seeds, items = values_SI.shape
    mean = float(values_SI.mean())
    by_seed, by_item = values_SI.mean(1), values_SI.mean(0)
    ms_item = seeds * float(by_item.var(ddof=1))
    scaled, freedom = ms_item, items - 1.0
    if seeds > 1:
        rest = values_SI - by_seed[:, None] - by_item[None, :] + mean
        ms_seed = items * float(by_seed.var(ddof=1))
        ms_rest = float((rest**2).sum()) / ((seeds - 1) * (items - 1))
        if ms_seed >= ms_item:
            scaled, freedom = ms_seed, seeds - 1.0
        if ms_seed + ms_item - ms_rest > scaled:
            scaled = ms_seed + ms_item - ms_rest
            spread = ms_seed**2 / (seeds - 1) + ms_item**2 / (items - 1) + ms_rest**2 / ((seeds - 1) * (items - 1))
            freedom = scaled**2 / spread
    half = float(stats.t.ppf((1 + level) / 2, freedom)) * (scaled / (seeds * items)) ** 0.5
    return Estimate(mean, mean - half, mean + half)
