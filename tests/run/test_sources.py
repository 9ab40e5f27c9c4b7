"""What a stage reads: the rows as they are, or what the consensus chose of them."""

from __future__ import annotations

import pytest

from rayfuse.config import parse_config
from rayfuse.data.sample import Sample, Weights
from rayfuse.errors import ConfigError
from rayfuse.evaluation.models import stage_names
from rayfuse.run.sources import UnitSource, source_name, weights_hash
from rayfuse.run.stage_job import stage_job


def _config(stages, **changes):
    tree = {"student": "pivot", "teachers": ["a", "b"], "data": "train.jsonl", "stages": stages, "output": "run"}
    return parse_config({**tree, **changes})


@pytest.mark.parametrize(
    ("stages", "changes", "names"),
    [
        (["sft", "infifusion"], {}, ["data", "data"]),
        (["sft", "infifusion"], {"consensus": {}}, ["chosen", "chosen"]),
        ([{"method": "sft", "responses": "data"}, "sft"], {"consensus": {}}, ["data", "chosen"]),
        (["sft", "infifpo"], {"preferences": "pairs.jsonl"}, ["data", "preferences"]),
        (["wrpo"], {"preferences": "pairs.jsonl"}, ["triples"]),
    ],
)
def test_a_stage_reads_what_it_says(stages, changes, names):
    config = _config(stages, **changes)
    assert [source_name(config, stage) for stage in config.stages] == names


def test_the_chosen_answers_need_a_consensus():
    with pytest.raises(ConfigError, match=r"stages\.0 \(sft\): responses: consensus needs the section `consensus`"):
        _config([{"method": "sft", "responses": "consensus"}])


@pytest.mark.parametrize(
    ("stages", "names"),
    [
        (["sft", "infifusion"], ["sft", "infifusion"]),
        (["sft", "sft"], ["01-sft", "02-sft"]),
        ([{"method": "sft", "responses": "data"}, "sft"], ["sft", "experts"]),
        ([{"method": "sft", "responses": "data"}, "infifusion", "sft"], ["sft", "infifusion-experts", "experts"]),
    ],
)
def test_students_of_chosen_answers_have_a_name_of_their_own_beside_others(stages, names):
    assert stage_names(_config(stages, consensus={})) == names


def _units(*weights):
    return [[Sample((("user", "2 + 2?"),), "4", weights=one) for one in weights]]


def test_weights_have_a_hash_of_their_own():
    one, other = Weights(0.5, (("a", 1.0),)), Weights(0.5, (("a", 0.999999),))
    assert weights_hash(_units(None, None)) == ""
    assert weights_hash(_units(one)) == weights_hash(_units(Weights(0.5, (("a", 1.0),))))
    assert len({weights_hash(_units(*row)) for row in ([one], [other], [one, other], [other, one], [one, None])}) == 5


def test_a_stage_that_weighs_depends_on_the_weights_and_another_does_not():
    """A resumed run whose weights have changed is another run, where its stage reads them."""
    weighing = {"method": "sft", "sample_weights": "consensus"}
    for stage, depends in ((weighing, True), ("sft", False)):
        config = _config([stage])
        jobs = [
            stage_job(config, 0, (), {"data": UnitSource((), (), "content", None, weights)}, "pivot")
            for weights in ("one", "two")
        ]
        assert (jobs[0].identity != jobs[1].identity) == depends
        assert ("weights of data" in jobs[0].made_of) == depends
