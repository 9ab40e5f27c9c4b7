"""The world of long answers: what is asked, what is held out, and what each model is taught."""

from __future__ import annotations

import json
from random import Random

from rayfuse.quickstart import journeys, journeys_world
from rayfuse.quickstart.facts import FIELDS
from rayfuse.quickstart.journeys import Road

WORLD = journeys.land(0)


def _roads(row):
    """The roads that a journey takes, read from its prompt and response."""
    here, _, ways = row["prompt"].rpartition(": ")
    here = next(road.place for road in WORLD if here.endswith(f" {road.place}"))
    steps = [step.partition(" ") for step in row["response"].split(", ")]
    assert [way for way, _, _ in steps] == ways.split(", ")
    for way, _, place in steps:
        yield Road(row["skill"], here, way), place
        here = place


def test_every_step_follows_from_the_one_before():
    rows = journeys.written(WORLD, 0, 32)
    assert len(rows) == 3 * 32
    for row in rows:
        roads = list(_roads(row))
        assert len(roads) == len({road.way for road, _ in roads}) == journeys.STOPS
        assert all(WORLD[road] == place for road, place in roads)


def test_what_is_asked_takes_a_part_of_the_roads_and_what_is_held_out_takes_others():
    asked = journeys.written(WORLD, 0, 32)
    held_out = journeys.held_out(WORLD, 0, journeys_world.HELD_OUT, asked)
    assert not {row["prompt"] for row in asked} & {row["prompt"] for row in held_out}
    taken, needed = ({road for row in rows for road, _ in _roads(row)} for rows in (asked, held_out))
    assert 0.4 < len(taken) / len(WORLD) < 0.7
    assert len(needed - taken) > 0.2 * len(WORLD)
    many = journeys.written(WORLD, 0, journeys_world.PER_FIELD)
    assert len({road for row in many for road, _ in _roads(row)}) > 0.95 * len(WORLD)


def test_a_model_is_taught_journeys_by_the_roads_that_it_knows():
    shares = {"towns": 1.0, "codes": 0.3, "pets": 0.3}
    rows = journeys.taught(WORLD, shares, 3, 400)
    for field, share in shares.items():
        used = {road for row in rows if row["skill"] == field for road, _ in _roads(row)}
        assert 0.5 * share < len(used) / (len(WORLD) / 3) <= share + 1e-9
    first = next(journeys.drawn(WORLD, WORLD, "towns", Random(1)))
    assert first == next(journeys.drawn(WORLD, WORLD, "towns", Random(1)))


def test_the_world_is_made_once(tmp_path):
    said: list[str] = []

    def one_by_one(function, items):
        return map(function, items)

    world = journeys_world.build_journeys_world(tmp_path, 0, said.append, one_by_one, steps=2)
    assert set(world.teachers) == set(FIELDS)
    rows = [json.loads(line) for line in world.train.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == len(FIELDS) * journeys_world.PER_FIELD
    assert all(row["teacher"] == row["skill"] for row in rows)
    assert journeys_world.build_journeys_world(tmp_path, 0, said.append, one_by_one, steps=2) == world
    assert "found in" in said[-1]
