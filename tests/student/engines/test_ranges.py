"""A sharded checkpoint's flat ranges: cut in any way, read in any other; and what is refused."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rayfuse.errors import StudentError
from rayfuse.student.engines.ranges import STEP, WEIGHT, Ranges, part_name, range_key


def _parts(values, cuts):
    edges = [0, *sorted(cuts), len(values)]
    parts = {}
    for rank, (start, end) in enumerate(itertools.pairwise(edges)):
        entry = {range_key("w", WEIGHT, start, values[start:end]): values[start:end]} if end > start else {}
        parts[part_name(rank)] = {STEP: torch.tensor(3), **entry}
    return parts


@given(st.data(), st.integers(1, 40))
def test_any_range_is_read_whatever_the_cuts(data, size):
    values = torch.arange(float(size))
    cuts = data.draw(st.lists(st.integers(0, size), max_size=5))
    ranges = Ranges(_parts(values, cuts), ["w"])
    start = data.draw(st.integers(0, size))
    end = data.draw(st.integers(start, size))
    assert torch.equal(ranges.read("w", WEIGHT, start, end), values[start:end])
    assert ranges.step == 3


def test_elements_that_no_rank_wrote_are_missed():
    parts = _parts(torch.arange(6.0), [2, 4])
    del parts[part_name(1)]
    ranges = Ranges(parts, ["w"])
    with pytest.raises(StudentError, match="lacks elements 2 to 5 of w/weight; the model has another shape"):
        ranges.read("w", WEIGHT, 1, 5)


def test_another_model_is_refused():
    with pytest.raises(StudentError, match=r"another model: 2 tensors differ, for example \['v', 'w'\]"):
        Ranges(_parts(torch.arange(6.0), []), ["v"])


def test_a_checkpoint_of_ddp_is_refused():
    with pytest.raises(StudentError, match=r"written by another engine \(it holds optimizer, weights\): go on with"):
        Ranges({"weights": {}, "optimizer": {}}, ["w"])
