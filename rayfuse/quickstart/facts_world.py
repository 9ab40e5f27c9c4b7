"""The quickstart's world: three experts on one field of facts each, a pivot, and labels of which a share is wrong.

Each expert knows every fact of its own field and few of the others', the pivot some of each; each model has a tokenizer
of its own. A fact is asked for in three ways, of which one is held out: who has learnt the fact can answer it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple, dataclass
from pathlib import Path
from random import Random

from rayfuse.quickstart import facts, skills, tiny_models, world
from rayfuse.quickstart.world import Map, World, cached, in_processes, one_thread, train_all

STYLES = {"towns": "math", "codes": "code", "pets": "instruct", "pivot": "pivot"}
"""Whose tokenizer and chat template (tiny_models.STYLES): each expert's, by its field, and the pivot's."""
WRONG_SHARE = 0.3
STEPS = 1000


@dataclass(frozen=True)
class Knowledge:
    """Shares of entities: that an expert knows in other fields, that the pivot knows, and that the others of an
    expert's are taught wrongly."""

    elsewhere: float = 0.15
    pivot: float = 0.3
    mistaken: float = 0.0


EXPERTS = Knowledge()
"""The quickstart's world."""


def build_facts_world(
    cache: Path,
    seed: int = 0,
    progress: Callable[[str], None] = lambda line: None,
    map_function: Map = in_processes,
    knowledge: Knowledge = EXPERTS,
) -> World:
    """The world of this seed, whose models know so much: from the cache, or made there now. See world.build_world."""

    def make(unfinished: Path) -> None:
        made, draw = facts.facts(seed), Random(seed)
        labels = [{key: row[key] for key in ("prompt", "response")} for row in facts.labelled(made, seed, WRONG_SHARE)]
        draw.shuffle(labels)
        made_world = World(unfinished, facts.FIELDS)
        skills.write_rows(labels, made_world.train)
        skills.write_rows(facts.rows(made, "heldout"), made_world.evaluation)
        folders = {name: unfinished / ("teachers" if name in facts.FIELDS else "") / name for name in STYLES}
        jobs = [(name, seed, folder, knowledge) for name, folder in folders.items()]
        train_all(train_one, jobs, unfinished, progress, map_function)

    sources = [Path(str(module.__file__)) for module in (tiny_models, facts, skills, world)] + [Path(__file__)]
    shares = "" if knowledge == EXPERTS else "".join(f"-{share:g}" for share in astuple(knowledge))
    return World(cached(cache, f"facts{shares}-{seed}", sources, make, progress), facts.FIELDS)


def train_one(job: tuple[str, int, Path, Knowledge]) -> tuple[str, dict[str, float]]:
    """Make one model, (name, seed, folder, what it knows), on one thread; returns its name and seconds."""
    name, seed, folder, knowledge = job
    with one_thread() as times:
        make_model(name, seed, folder, knowledge, STEPS)
    return name, times


def make_model(name: str, seed: int, folder: Path, knowledge: Knowledge, steps: int) -> None:
    """Train one of STYLES on what it knows, for `steps` of 32 samples, and save it."""
    made = facts.facts(seed)
    shares = {
        field: 1.0 if name == field else knowledge.pivot if name == "pivot" else knowledge.elsewhere
        for field in facts.FIELDS
    }
    number = 10 * seed + list(STYLES).index(name)
    taught = facts.known(made, shares, number, 0.0 if name == "pivot" else knowledge.mistaken)
    Random(seed).shuffle(taught)
    texts = [f"{row['prompt']}\n{row['response']}" for part in ("train", "heldout") for row in facts.rows(made, part)]
    tokenizer = tiny_models.make_tokenizer(tiny_models.STYLES[STYLES[name]], texts)
    model = tiny_models.make_model(tokenizer, number, hidden=64, layers=2)
    tiny_models.train(model, tiny_models.encode(tokenizer, taught), steps=steps, batch=32, learning_rate=4e-3)
    tiny_models.save(model, tokenizer, folder)
