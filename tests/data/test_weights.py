"""Weights that a row has beside its conversation."""

from __future__ import annotations

import pytest

from rayfuse.data.rows import parse_samples
from rayfuse.errors import DataError

ROW = {"prompt": "2 + 2?", "response": "4"}


def _sample(**columns):
    (sample,) = parse_samples({**ROW, **columns}, {}).items
    return sample


def test_weights_are_read_and_name_nothing():
    plain = _sample()
    weighted = _sample(sample_weight=0.75, teacher_weights={"math": 0.9, "code": 0.125})
    assert plain.weights is None
    assert weighted.key == plain.key
    assert weighted.weights.sample == 0.75
    assert [weighted.weights.teacher(name) for name in ("math", "code", "law")] == [0.9, 0.125, None]
    assert _sample(teacher_weights='{"math": 1}').weights.teacher("math") == 1.0


def test_a_row_may_name_the_one_teacher_that_counts():
    weights = _sample(teacher="math").weights
    assert [weights.teacher(name) for name in ("math", "code")] == [1.0, 0.0]
    assert not parse_samples({**ROW, "teacher": "math"}, {}).unread


@pytest.mark.parametrize(
    ("columns", "text"),
    [
        ({"sample_weight": 1.5}, "'sample_weight' must be a number from 0 to 1, not 1.5"),
        ({"teacher_weights": {"math": "much"}}, "'teacher_weights.math' must be a number from 0 to 1"),
        ({"teacher_weights": [1, 2]}, "'teacher_weights' must be an object of teachers' names and weights"),
        ({"teacher": 3}, "'teacher' must be the name of the teacher that counts, not 3"),
        ({"teacher": "math", "teacher_weights": {"math": 1}}, "'teacher' and 'teacher_weights', which both say"),
    ],
)
def test_other_weights_are_refused_by_name(columns, text):
    with pytest.raises(DataError, match=text):
        _sample(**columns)
