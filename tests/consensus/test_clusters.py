"""Fields of prompts, given or found."""

import random

import numpy as np
import pytest

from rayfuse.consensus.clusters import clusters_of, k_means
from rayfuse.quickstart import facts


def test_fields_that_the_data_name_are_taken():
    found = clusters_of(["a", "b", "c"], ["maths", "code", "maths"])
    assert found.names == ("code", "maths")
    assert found.of_prompt.tolist() == [1, 0, 1]
    assert found.given


@pytest.mark.parametrize("fields", [["", "", ""], ["x", "x", "x"], ["x", "y", ""]])
def test_one_name_or_missing_names_are_none(fields):
    found = clusters_of(["a", "b", "c"], fields)
    assert not found.given
    assert found.of_prompt.tolist() == [0, 0, 0]  # too few prompts for two groups
    assert found.names == ("group 1",)


def test_found_clusters_are_pure_and_do_not_depend_on_the_order():
    rows = facts.rows(facts.facts(0), "train")
    texts, fields = [row["prompt"] for row in rows], np.array([row["skill"] for row in rows])
    found = k_means(texts, 12)
    assert len(set(found.tolist())) > 6
    right = sum(np.unique(fields[found == c], return_counts=True)[1].max() for c in set(found.tolist()))
    assert right / len(texts) > 0.97
    size = np.bincount(found)
    assert (np.diff(size) <= 0).all()
    order = list(range(len(texts)))
    random.Random(0).shuffle(order)
    assert (k_means([texts[i] for i in order], 12) == found[order]).all()


@pytest.mark.parametrize("texts", [[], ["one"], ["same"] * 300, ["", "", "ü🙂", "a" * 10_000] * 30])
def test_odd_texts_are_clustered(texts):
    found = k_means(texts, 5)
    assert len(found) == len(texts)
    assert found.max(initial=0) < 5
