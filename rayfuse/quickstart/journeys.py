"""A world of long answers: journeys in which each step needs the one before.

Each of three fields is a land of PLACES; from each place a road in each of six directions leads to another one, by no
rule. A prompt names the place to start from and the directions to go; the answer lists every direction and where it
leads. Who takes one wrong step is somewhere else from there on, and has to know the roads from places to which no
written answer took it. An answer is right as a whole or not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from random import Random
from typing import Any, NamedTuple

from rayfuse.quickstart.facts import FIELDS, names

PLACES = 24
ROADS = ("north", "east", "south", "west", "up", "down")
STOPS = 4
"""Steps of a journey, each by another direction: which one comes next, the prompt tells."""

_ASKS = {"towns": "Towns from {}: {}", "codes": "Codes after {}: {}", "pets": "Pets behind {}: {}"}


class Road(NamedTuple):
    """One fact: in which field, from where, which way."""

    field: str
    place: str
    way: str


Land = Mapping[Road, str]
"""Where every road of a world leads."""


def land(seed: int) -> dict[Road, str]:
    """The roads of a world, field by field."""
    draw = Random(f"journeys/{seed}")
    roads: dict[Road, str] = {}
    for field in FIELDS:
        places = names(field, PLACES, draw)
        for place in places:
            others = [other for other in places if other != place]
            roads |= {Road(field, place, way): draw.choice(others) for way in ROADS}
    return roads


def row(world: Land, field: str, start: str, ways: tuple[str, ...]) -> dict[str, Any]:
    """`prompt`, `response`, `skill` and `teacher` (the field's expert) of one journey."""
    here, steps = start, []
    for way in ways:
        here = world[Road(field, here, way)]
        steps.append(f"{way} {here}")
    prompt = _ASKS[field].format(start, ", ".join(ways))
    return {"prompt": prompt, "response": ", ".join(steps), "skill": field, "teacher": field}


def drawn(world: Land, known: Mapping[Road, str], field: str, draw: Random) -> Iterator[dict[str, Any]]:
    """Journeys of a field by known roads only, without end.

    Args:
        world: all roads.
        known: those that may be taken; there must be journeys by them.
        field: of the journeys.
        draw: the random numbers.
    """
    places = sorted({road.place for road in known if road.field == field})
    while True:
        start = here = draw.choice(places)
        ways: list[str] = []
        while len(ways) < STOPS:
            open_ways = [way for way in ROADS if way not in ways and Road(field, here, way) in known]
            if not open_ways:
                break
            ways.append(draw.choice(open_ways))
            here = world[Road(field, here, ways[-1])]
        if len(ways) == STOPS:
            yield row(world, field, start, tuple(ways))


def written(world: Land, seed: int, per_field: int) -> list[dict[str, Any]]:
    """`per_field` journeys of each field, no two alike: the prompts that a student is given."""
    return _different(world, Random(f"written/{seed}"), per_field, set())


def held_out(world: Land, seed: int, per_field: int, asked: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """`per_field` other journeys of each field, none of which was `asked`."""
    return _different(world, Random(f"held out/{seed}"), per_field, {one["prompt"] for one in asked})


def _different(world: Land, draw: Random, per_field: int, taken: set[str]) -> list[dict[str, Any]]:
    made = []
    for field in FIELDS:
        found: dict[str, dict[str, Any]] = {}
        for one in drawn(world, world, field, draw):
            if one["prompt"] not in taken:
                found[one["prompt"]] = one
            if len(found) == per_field:
                break
        made += list(found.values())
    return made


def taught(world: Land, shares: Mapping[str, float], seed: int, per_field: int) -> list[dict[str, Any]]:
    """What a model is trained on: `per_field` journeys of each field by a share of its roads."""
    draw = Random(f"travelled/{seed}")
    made = []
    for field in FIELDS:
        roads = sorted(road for road in world if road.field == field)
        known = {road: world[road] for road in draw.sample(roads, round(shares[field] * len(roads)))}
        journeys = drawn(world, known, field, draw)
        made += [next(journeys) for _ in range(per_field)]
    return made
