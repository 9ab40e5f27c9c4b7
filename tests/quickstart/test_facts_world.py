"""The quickstart's world of facts: what each model is taught, and that it is made once."""

from __future__ import annotations

import json

from rayfuse.config import parse_config
from rayfuse.quickstart import facts, facts_world
from rayfuse.quickstart.run import quickstart_config


def _rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_world_is_made_once_and_its_labels_are_wrong_by_the_share(tmp_path, monkeypatch):
    monkeypatch.setattr(facts_world, "STEPS", 2)
    said: list[str] = []
    world = facts_world.build_facts_world(tmp_path, 0, said.append, map_function=lambda f, items: map(f, items))
    assert set(world.teachers) == set(facts.FIELDS)
    assert all((folder / "config.json").exists() for folder in (*world.teachers.values(), world.pivot))
    truth = {row["prompt"]: row["response"] for row in facts.rows(facts.facts(0), "train")}
    labels = _rows(world.train)
    assert {row["prompt"] for row in labels} == set(truth)
    assert all(row.keys() == {"prompt", "response"} for row in labels), "neither the field nor the truth is told"
    wrong = sum(truth[row["prompt"]] != row["response"] for row in labels) / len(labels)
    assert abs(wrong - facts_world.WRONG_SHARE) < 0.04
    assert not {row["prompt"] for row in _rows(world.evaluation)} & set(truth)
    again = facts_world.build_facts_world(tmp_path, 0, said.append)
    assert again == world
    assert "found in" in said[-1]


def test_the_quickstart_compares_three_students_that_differ_in_one_thing_each(tmp_path):
    world = facts_world.World(tmp_path / "world", facts.FIELDS)
    config = quickstart_config(world, tmp_path / "run")
    sft, infifusion, experts = config.stages
    shared = set(type(sft).model_fields) - {"method", "responses"}
    assert sft.model_dump(include=shared) == experts.model_dump(include=shared) == infifusion.model_dump(include=shared)
    assert [config.learns_chosen(stage) for stage in config.stages] == [False, False, True]
    assert parse_config(config.model_dump(mode="json", exclude_unset=True)) == config
