"""A world in which methods can be told apart: three fields of facts that no model knows all of.

Each field has ENTITIES invented names and one fact of each, asked for in three ways. One way per entity is held out: a
student that has learnt the fact answers it, one that has learnt a sentence does not. What a model knows of a field is a
share of its entities, so an expert, a generalist and a model that lies outside its field are numbers here.
"""

from __future__ import annotations

from collections.abc import Mapping
from random import Random
from typing import Any, NamedTuple

ENTITIES = 200
FIELDS = ("towns", "codes", "pets")

# fmt: off
_STARTS = [
    "bra", "cel", "dor", "fen", "gal", "hor", "jun", "kel", "lom", "mar", "nev", "osk", "pel", "rud", "sol", "tev",
    "ulm", "vor", "wes", "zan",
]
_ENDS = ["ba", "den", "fi", "gor", "ka", "lin", "mo", "nus", "pa", "rit", "sa", "tor"]
_WORDS = [
    "red", "blue", "green", "black", "white", "pink", "cat", "dog", "fox", "hen", "cow", "pig", "sun", "moon", "star",
    "rain", "snow", "wind", "tree", "leaf", "rose", "seed", "corn", "rice", "milk", "salt", "cup", "pan", "lamp",
]
# fmt: on

_WAYS = {
    "towns": ("Which land is {} in?", "{} lies in", "Land of the town {}:"),
    "codes": ("Code of {}?", "{} opens with", "Say the code for {}:"),
    "pets": ("Which pet has {}?", "{} keeps a", "Name the pet of {}:"),
}


class Fact(NamedTuple):
    """One fact: whose, what, and the way of asking that is held out."""

    field: str
    entity: str
    answer: str
    held_out: int


def facts(seed: int) -> list[Fact]:
    """All facts of a world, field by field."""
    draw = Random(f"facts/{seed}")
    names = [start + end for start in _STARTS for end in _ENDS]
    made = []
    for field in FIELDS:
        for index, name in enumerate(draw.sample(names, ENTITIES)):
            entity = f"{name.capitalize()}{field[0]}"
            made.append(Fact(field, entity, _answer(field, draw), index % 3))
    return made


def _answer(field: str, draw: Random) -> str:
    if field == "codes":
        return str(draw.randint(100, 999))
    words = draw.sample(_WORDS, 2)
    return f"{words[0].capitalize()}{words[1]}" if field == "towns" else f"{words[0]} {words[1]}"


def names(field: str, count: int, draw: Random) -> list[str]:
    """`count` different names in the style of a field's answers."""
    found: dict[str, None] = {}
    while len(found) < count:
        found[_answer(field, draw)] = None
    return list(found)


def rows(world: list[Fact], split: str) -> list[dict[str, Any]]:
    """Rows of `prompt`, `response` and `skill`: of "train" two ways of asking per fact, of "heldout" the third."""
    return [
        {"prompt": _WAYS[fact.field][way].format(fact.entity), "response": fact.answer, "skill": fact.field}
        for fact in world
        for way in range(3)
        if (way == fact.held_out) == (split == "heldout")
    ]


def known(world: list[Fact], shares: Mapping[str, float], seed: int, mistaken: float = 0.0) -> list[dict[str, Any]]:
    """What a model is trained on: the train rows of a share of each field's entities.

    Args:
        world: its facts.
        shares: of entities known, by field.
        seed: of which they are.
        mistaken: share of the other entities for which the model is taught another entity's answer, always the same:
            it is sure and wrong there.
    """
    draw = Random(f"known/{seed}")
    taught = []
    for fact in world:
        lot, lie = draw.random(), draw.random()
        other = draw.choice([one.answer for one in world if one.field == fact.field and one.answer != fact.answer])
        if lot < shares[fact.field]:
            taught.append(fact)
        elif lie < mistaken:
            taught.append(fact._replace(answer=other))
    return rows(taught, "train")


def labelled(world: list[Fact], seed: int, wrong: float = 0.0, per_field: int | None = None) -> list[dict[str, Any]]:
    """The train rows as data to learn from.

    Args:
        world: its facts.
        seed: of which labels are wrong or missing.
        wrong: share of the labels that are another entity's answer; each wrong label is drawn by itself.
        per_field: labels per field; the other rows have none. Default: all.
    """
    draw = Random(f"labels/{seed}")
    clean = rows(world, "train")
    answers = {field: [fact.answer for fact in world if fact.field == field] for field in FIELDS}
    keep = {
        field: set(draw.sample(range(2 * ENTITIES), 2 * ENTITIES if per_field is None else per_field))
        for field in FIELDS
    }
    number = dict.fromkeys(FIELDS, 0)
    made = []
    for row in clean:
        field = row["skill"]
        other = draw.choice([answer for answer in answers[field] if answer != row["response"]])
        is_wrong, label = draw.random() < wrong, number[field] in keep[field]
        number[field] += 1
        made.append({"prompt": row["prompt"], "skill": field, "truth": row["response"]})
        if label:
            made[-1]["response"] = other if is_wrong else row["response"]
    return made
