"""Rows and weights for the stages."""

import json

import pytest

from rayfuse.config import Data, parse_config
from rayfuse.consensus.candidates import LABEL
from rayfuse.consensus.outcome import decide
from rayfuse.consensus.outputs import doubtful_labels, pairs, responses, teacher_weights, triples
from rayfuse.data.rows import read_preferences, read_samples
from rayfuse.errors import DataError
from rayfuse.run.experts import preferences_of
from tests.consensus.simulated import Simulated


@pytest.fixture(scope="module")
def world():
    asked, truth = Simulated(labels=0.5).draw()
    return decide(asked), truth


def written(rows, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Data(path=str(path))


def test_responses_are_rows_of_data(world, tmp_path):
    outcome, truth = world
    rows = responses(outcome)
    samples, counts = read_samples(written(rows, tmp_path))
    assert counts.bad_rows == 0
    assert [sample.response for sample in samples] == [row["response"] for row in rows]
    kept = [d for d in outcome.decisions if d.chosen() is not None]
    assert [row["provenance"]["prompt"] for row in rows] == [d.candidates.prompt.sample.key for d in kept]
    assert all(row["provenance"]["response"]["right"] >= 0.5 for row in rows)
    by_prompt = {f"field {n % 3} asks {n}": right for n, right in enumerate(truth)}
    assert sum(by_prompt[row["prompt"]] == row["response"] for row in rows) / len(rows) > 0.95
    assert len(responses(outcome, keep=0.99)) < len(rows)


def test_pairs_are_rows_of_preferences(world, tmp_path):
    outcome, truth = world
    rows = pairs(outcome)
    compared, _ = read_preferences(written(rows, tmp_path))
    assert len(compared) == len(rows) > 800
    right = set(truth)
    assert sum(row["chosen"] in right and row["rejected"] not in right for row in rows) / len(rows) > 0.95
    for row in rows:
        of = row["provenance"]
        assert of["chosen"]["right"] - of["rejected"]["right"] >= 0.5 - 1e-6


def test_weights_follow_the_field(world):
    outcome, _ = world
    weights = teacher_weights(outcome, ["expert 0", "expert 1", "expert 2"])
    assert set(weights) == {d.candidates.prompt.sample.key for d in outcome.decisions}
    for field in range(3):
        of_field = [weights[d.candidates.prompt.sample.key] for d in outcome.decisions if d.field == f"field {field}"]
        mean = [sum(of[f"expert {e}"] for of in of_field) / len(of_field) for e in range(3)]
        assert mean[field] == pytest.approx(0.96, abs=0.03)
        assert all(mean[e] == pytest.approx(0.3, abs=0.06) for e in range(3) if e != field)


def test_doubtful_labels_are_the_wrong_ones(world):
    outcome, truth = world
    found = doubtful_labels(outcome)
    by_prompt = {f"field {n % 3} asks {n}": right for n, right in enumerate(truth)}
    wrong = [
        (d.candidates.prompt.sample.plain_text, d.candidates.labels[0].text)
        for d in outcome.decisions
        if d.candidates.labels and d.candidates.labels[0].text != by_prompt[d.candidates.prompt.sample.plain_text]
    ]
    said = [(one.prompt.sample.plain_text, one.label) for one in found]
    assert len(set(said) & set(wrong)) / len(said) > 0.95  # precision
    assert len(set(said) & set(wrong)) / len(wrong) > 0.9  # recall
    assert [one.right for one in found] == sorted(one.right for one in found)
    for one in found:
        assert (one.better is None) == (not one.sources)
        assert LABEL not in one.sources
        assert one.better != one.label


def test_an_outcome_that_fell_back_gives_labels_and_no_pairs():
    asked, _ = Simulated(prompts=20).draw()
    outcome = decide(asked)
    assert outcome.fell_back
    assert [row["provenance"]["response"]["source"] for row in responses(outcome)] == [LABEL] * 20
    assert pairs(outcome) == []
    assert {w for of in teacher_weights(outcome, ["expert 0"]).values() for w in of.values()} == {1.0}


def test_triples_have_a_teacher_and_the_pivot_right(world, tmp_path):
    outcome, truth = world
    rows = triples(outcome)
    sides = ("chosen", "chosen_pivot", "rejected")
    compared, _ = read_preferences(written(rows, tmp_path), sides)
    assert len(compared) == len(rows) > 200
    right = set(truth)
    good = [row["chosen"] in right and row["chosen_pivot"] in right and row["rejected"] not in right for row in rows]
    assert sum(good) / len(good) > 0.95
    for row in rows:
        of = row["provenance"]
        assert of["chosen"]["source"].startswith("expert")
        assert of["chosen_pivot"]["source"] == "pivot"
        assert of["rejected"]["source"] != "pivot"
    asked, _ = Simulated(prompts=20).draw()
    assert triples(decide(asked)) == []


def test_stages_on_preferences_take_them_without_a_key(tmp_path):
    tree = {"student": "p", "teachers": ["a"], "data": "d.jsonl", "consensus": {}, "output": str(tmp_path)}
    for stages, name in (
        (["infifpo"], "pairs"),
        (["dpo"], "pairs"),
        (["wrpo"], "triples"),
        (["dpo", "wrpo"], "triples"),
    ):
        config = parse_config({**tree, "stages": stages})
        (tmp_path / f"{name}.jsonl").write_text("{}\n")
        assert preferences_of(config, tmp_path)["preferences"].path == str(tmp_path / f"{name}.jsonl")
    named = parse_config({**tree, "stages": ["dpo"], "preferences": "mine.jsonl"})
    assert preferences_of(named, tmp_path) == {}
    assert preferences_of(parse_config({**tree, "stages": ["sft"]}), tmp_path) == {}
    (tmp_path / "triples.jsonl").write_text("")
    with pytest.raises(
        DataError, match="no prompt that a teacher and the pivot answer right, and another answer wrong"
    ):
        preferences_of(parse_config({**tree, "stages": ["wrpo"]}), tmp_path)
