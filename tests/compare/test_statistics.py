"""Intervals over seeds and items, against scipy, a bootstrap over both, and their coverage on drawn data."""

import numpy as np
import pytest
from scipy import stats

from rayfuse.compare.statistics import Estimate, crossed_interval


def _drawn(rng: np.random.Generator, seeds: int, items: int, of_seed: float, of_item: float, rest: float) -> np.ndarray:
    return (
        of_seed * rng.normal(size=(seeds, 1))
        + of_item * rng.normal(size=(1, items))
        + rest * rng.normal(size=(seeds, items))
    )


def test_items_that_say_the_same_leave_the_t_interval_over_seeds():
    """All items alike: what remains is one value per seed."""
    values_S = np.random.default_rng(1).normal(size=5)
    ours = crossed_interval(np.repeat(values_S[:, None], 40, axis=1))
    theirs = stats.ttest_1samp(values_S, 0).confidence_interval(0.95)
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high))


def test_seeds_that_say_the_same_leave_the_t_interval_over_items():
    """One training would have told as much: the interval is that over the items."""
    values_I = np.random.default_rng(2).normal(size=300)
    ours = crossed_interval(np.repeat(values_I[None, :], 4, axis=0))
    theirs = stats.ttest_1samp(values_I, 0).confidence_interval(0.95)
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high))


def test_one_seed_gives_the_interval_over_items():
    values_I = np.random.default_rng(3).normal(size=(1, 50))
    theirs = stats.ttest_1samp(values_I[0], 0).confidence_interval(0.95)
    ours = crossed_interval(values_I)
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high))


def test_width_is_that_of_a_bootstrap_over_seeds_and_items():
    """With many of both, resampling both gives the same standard error."""
    rng = np.random.default_rng(4)
    values = _drawn(rng, 40, 400, 1.0, 1.0, 1.0)
    means = [values[rng.integers(0, 40, 40)][:, rng.integers(0, 400, 400)].mean() for _ in range(2000)]
    ours = crossed_interval(values)
    assert (ours.high - ours.low) / (2 * stats.t.ppf(0.975, 60)) == pytest.approx(np.std(means), rel=0.06)


@pytest.mark.parametrize(
    ("of_seed", "of_item", "rest"), [(0.05, 0.0, 0.4), (0.0, 0.0, 0.4), (0.02, 0.3, 0.4), (0.1, 0.3, 0.3)]
)
def test_intervals_hold_the_truth_as_often_as_they_say(of_seed, of_item, rest):
    """5 seeds and 300 items, as on the page: 95% of the intervals (at least; never much less) hold the true mean 0."""
    rng = np.random.default_rng(5)
    trials = [crossed_interval(_drawn(rng, 5, 300, of_seed, of_item, rest)) for _ in range(1500)]
    share = np.mean([estimate.low <= 0 <= estimate.high for estimate in trials])
    assert 0.935 <= share <= 0.999


def test_sign():
    assert [Estimate(*e).sign for e in ((1, 0.5, 2), (-1, -2, -0.5), (0, -1, 1))] == [1, -1, 0]
