"""Other ways to choose among answers: against counts by hand, and in a world whose truth is known."""

import pytest

from jobs.bench.choosers import PEERS, at_random, majority, of_crowdkit, oracle, router, share_right, surest
from tests.consensus.simulated import Simulated, candidates

ASKED = [
    candidates("a?", [("label", "1", None), ("math", "2", -0.5), ("code", "2 ", -0.9), ("art", "3", -0.1)]),
    candidates("b?", [("math", "1", -0.2), ("code", "2", -0.1), ("pivot", "1", -0.01)]),
    candidates("c?", [("label", "7", None)]),
]


def test_majority_surest_and_oracle_by_hand():
    assert majority(ASKED) == ["2", "2", None]  # of two votes of one the surer
    assert majority(ASKED, everybody=True) == ["2", "1", "7"]
    assert surest(ASKED) == ["3", "2", None]
    assert oracle(ASKED, ["2", "1", "7"]) == ["2", "1", None]
    assert set(at_random(ASKED, 1)[:1]) <= {"2", "2 ", "3"}
    assert share_right(["2 ", None, "7"], ["2", "1", "8"]) == pytest.approx(100 / 3)


def test_a_learnt_router_finds_the_fields():
    pytest.importorskip("sklearn")
    asked, truth = Simulated(prompts=600, label_right=1.0).draw()
    assert share_right(router(asked), truth) > 90  # an expert is right on 96%
    unlabelled, truth = Simulated(prompts=60, labels=0.0).draw()
    assert router(unlabelled) == [None] * 60


@pytest.mark.parametrize("name", ["OneCoinDawidSkene", "MACE"])
def test_crowdkit_chooses_above_the_best_source_and_below_the_oracle(name):
    pytest.importorskip("crowdkit")
    asked, truth = Simulated(prompts=300, expert_right=0.8, other_right=0.7, label_right=0.8).draw()
    points = share_right(of_crowdkit(asked, name), truth)
    assert share_right(at_random(asked), truth) + 10 < points <= 100


def test_every_way_has_a_name():
    assert {"majority of the teachers", "surest teacher", "random teacher", "learnt router"} < set(PEERS)
    assert sum(name.startswith("crowd-kit") for name in PEERS) == 3
