"""The world of long answers: an expert on the roads of each field, and a pivot that knows some of each.

The models are those of the world of facts, trained on journeys; each has a tokenizer of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

from rayfuse.quickstart import facts, facts_world, journeys, skills, tiny_models, world
from rayfuse.quickstart.facts import FIELDS
from rayfuse.quickstart.facts_world import STYLES
from rayfuse.quickstart.world import Map, World, cached, in_processes, one_thread, train_all

PER_FIELD = 200
"""Prompts of each field that a student is given. With 32, which take half of the roads, it learns the prompts by heart
and writes nothing that was not written already."""
HELD_OUT = 80
STEPS = 1500


@dataclass(frozen=True)
class Travelled:
    """Shares of a field's roads that a model knows: an expert elsewhere, the pivot everywhere."""

    elsewhere: float = 0.3
    pivot: float = 0.3


def build_journeys_world(
    cache: Path,
    seed: int = 0,
    progress: Callable[[str], None] = lambda line: None,
    map_function: Map = in_processes,
    steps: int = STEPS,
) -> World:
    """The world of this seed: from the cache, or made there now. See world.build_world."""

    def make(unfinished: Path) -> None:
        made, made_world = journeys.land(seed), World(unfinished, FIELDS)
        rows = journeys.written(made, seed, PER_FIELD)
        skills.write_rows(journeys.held_out(made, seed, HELD_OUT, rows), made_world.evaluation)
        Random(seed).shuffle(rows)
        skills.write_rows(rows, made_world.train)
        jobs = [(name, seed, unfinished / ("teachers" if name in FIELDS else "") / name, steps) for name in STYLES]
        train_all(train_one, jobs, unfinished, progress, map_function)

    modules = (tiny_models, facts, facts_world, journeys, skills, world)
    sources = [Path(str(module.__file__)) for module in modules] + [Path(__file__)]
    return World(cached(cache, f"journeys-{seed}-{steps}", sources, make, progress), FIELDS)


def train_one(job: tuple[str, int, Path, int]) -> tuple[str, dict[str, float]]:
    """Make one model, (name, seed, folder, steps), on one thread; returns its name and seconds."""
    name, seed, folder, steps = job
    with one_thread() as times:
        make_model(name, seed, folder, Travelled(), steps)
    return name, times


def make_model(name: str, seed: int, folder: Path, travelled: Travelled, steps: int) -> None:
    """Train one of STYLES on what it has seen, for `steps` of 32 samples, and save it."""
    made = journeys.land(seed)
    shares = {
        field: 1.0 if name == field else travelled.pivot if name == "pivot" else travelled.elsewhere for field in FIELDS
    }
    number = 10 * seed + list(STYLES).index(name)
    rows = journeys.taught(made, shares, number, 1500)
    Random(seed).shuffle(rows)
    texts = [f"{row['prompt']}\n{row['response']}" for row in journeys.written(made, -1, 400)]
    tokenizer = tiny_models.make_tokenizer(tiny_models.STYLES[STYLES[name]], texts)
    model = tiny_models.make_model(tokenizer, number, hidden=64, layers=2)
    tiny_models.train(model, tiny_models.encode(tokenizer, rows), steps=steps, batch=32, learning_rate=4e-3)
    tiny_models.save(model, tokenizer, folder)
