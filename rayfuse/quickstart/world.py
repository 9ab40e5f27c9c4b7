"""The world of tasks that methods are compared in: three experts, a pivot and the data, made once and kept in a cache.

    python -m rayfuse.quickstart.world --cache /tmp/world

Each expert is trained on right answers, nearly all of its own skill. The pivot has seen a little of every skill. The
training set for the pivot is imperfect, as collected data are: a share of its responses is wrong.
"""

import argparse
import hashlib
import json
import multiprocessing
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rayfuse.files import folder_whole
from rayfuse.quickstart import skills, tiny_models
from rayfuse.report.terminal import make_printable

TRAIN_ROWS_PER_SKILL = 4000
HELDOUT_ROWS_PER_SKILL = 200
WRONG_SHARE = 0.3
EXPERTS = ("math", "code", "instruct")


@dataclass(frozen=True)
class Recipe:
    """How one model is made: rows of each skill to learn from, and for how many steps."""

    name: str
    rows: dict[str, int]
    steps: int
    learning_rate: float
    seed: int


@dataclass(frozen=True)
class World:
    """A finished world; every path exists.

    Attributes:
        folder: where it is in the cache.
        experts: the skills, each with its teacher.
        teachers: model folder of each expert, by its skill.
        pivot: folder of the model that fusion starts from.
        train: JSON lines to train on, `WRONG_SHARE` of each skill's responses wrong.
        evaluation: JSON lines of held-out prompts with right responses.
    """

    folder: Path
    experts: tuple[str, ...] = EXPERTS

    @property
    def teachers(self) -> dict[str, Path]:
        return {skill: self.folder / "teachers" / skill for skill in self.experts}

    @property
    def pivot(self) -> Path:
        return self.folder / "pivot"

    @property
    def train(self) -> Path:
        return self.folder / "train.jsonl"

    @property
    def evaluation(self) -> Path:
        return self.folder / "eval.jsonl"


def recipes(seed: int) -> list[Recipe]:
    """The four models, the longest training first."""
    few = 1000
    experts = {"math": (2400, 3e-3), "code": (1600, 2e-3), "instruct": (1400, 2e-3)}
    made = [
        Recipe(skill, {other: 24_000 if other == skill else few for other in EXPERTS}, steps, rate, 10 * seed + number)
        for number, (skill, (steps, rate)) in enumerate(experts.items())
    ]
    return [*made, Recipe("pivot", dict.fromkeys(EXPERTS, 4000), 700, 2e-3, 10 * seed + 9)]


# Runs a function on each item, in any order and place, and gives the results as they come.
Map = Callable[[Callable[[Any], Any], Sequence[Any]], Iterable[Any]]


def in_processes(function: Callable[[Any], Any], items: Sequence[Any]) -> Iterable[Any]:
    """A map over two fresh processes."""
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(function, items)


def build_world(
    cache: Path, seed: int = 0, progress: Callable[[str], None] = lambda line: None, map_function: Map = in_processes
) -> World:
    """The world of this seed: from the cache, or made there now.

    The folder's name is a hash of the seed and of the code that makes a world. It appears under that name only when it
    is complete, so that a broken-off run leaves nothing that a later one would take for a world.
    """

    def make(unfinished: Path) -> None:
        _write_data(World(unfinished), seed)
        jobs = [
            (recipe, unfinished / ("teachers" if recipe.name in EXPERTS else "") / recipe.name)
            for recipe in recipes(seed)
        ]
        train_all(train_one, jobs, unfinished, progress, map_function)

    sources = [Path(str(module.__file__)) for module in (tiny_models, skills)] + [Path(__file__)]
    return World(cached(cache, f"world-{seed}", sources, make, progress))


def cached(
    cache: Path, name: str, sources: Sequence[Path], make: Callable[[Path], None], progress: Callable[[str], None]
) -> Path:
    """The folder of a world: made where it is not in the cache.

    Its name ends with a hash of the code that makes the world, and it appears only when it is complete.
    """
    digest = hashlib.sha256(b"".join(source.read_bytes() for source in sources))
    folder = cache / f"{name}-{digest.hexdigest()[:12]}"
    if folder.exists():
        progress(f"models and data found in {folder}")
        return folder
    with folder_whole(folder, replace=False) as unfinished:  # another process may be faster
        make(unfinished)
    return folder


def _write_data(world: World, seed: int) -> None:
    files: tuple[tuple[Path, int, float, skills.Split], ...] = (
        (world.train, TRAIN_ROWS_PER_SKILL, WRONG_SHARE, "train"),
        (world.evaluation, HELDOUT_ROWS_PER_SKILL, 0.0, "heldout"),
    )
    for path, n, wrong_share, split in files:
        rows = [row for skill in EXPERTS for row in skills.make(skill, n, 1000 + seed, wrong_share, split)]
        Random(seed).shuffle(rows)
        skills.write_rows(rows, path)


def train_all(
    train: Callable[[Any], tuple[str, dict[str, float]]],
    jobs: Sequence[Any],
    folder: Path,
    progress: Callable[[str], None],
    map_function: Map,
) -> None:
    """Make all models of a world; CPU and wall seconds of each are left in `times.json`."""
    times = {}
    for name, seconds in map_function(train, jobs):
        progress(f"{name}: trained in {seconds['wall']:.0f} s")
        times[name] = seconds
    (folder / "times.json").write_text(json.dumps(times, indent=2), encoding="utf-8")


def train_one(job: tuple[Recipe, Path]) -> tuple[str, dict[str, float]]:
    """Make one model from its recipe, on one thread, so that its bits depend on the recipe alone."""
    recipe, folder = job
    with one_thread() as times:
        rows = [row for skill, n in recipe.rows.items() for row in skills.make(skill, n, recipe.seed)]
        Random(recipe.seed).shuffle(rows)
        style = tiny_models.STYLES[recipe.name]
        tokenizer = tiny_models.make_tokenizer(style, [f"{row['prompt']}\n{row['response']}" for row in rows[:5000]])
        model = tiny_models.make_model(tokenizer, recipe.seed)
        samples = tiny_models.encode(tokenizer, rows)
        tiny_models.train(
            model, samples, steps=recipe.steps, batch=32, learning_rate=recipe.learning_rate, seed=recipe.seed
        )
        tiny_models.save(model, tokenizer, folder)
    return recipe.name, times


@contextmanager
def one_thread() -> Iterator[dict[str, float]]:
    """Torch computes on one thread; at the end the dictionary holds CPU and wall seconds."""
    wall, cpu = time.monotonic(), time.process_time()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    times: dict[str, float] = {}
    try:
        yield times
    finally:
        torch.set_num_threads(threads)
        times |= {"cpu": time.process_time() - cpu, "wall": time.monotonic() - wall}


def accuracies(folder: Path, rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Share of right greedy answers of one saved model, by skill."""
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    answers = tiny_models.answers(model, tokenizer, [row["prompt"] for row in rows])
    right: dict[str, list[bool]] = {skill: [] for skill in EXPERTS}
    for row, answer in zip(rows, answers, strict=True):
        right[row["skill"]].append(answer == row["response"])
    return {skill: sum(marks) / len(marks) for skill, marks in right.items()}


def main() -> None:
    """Make the world and print how good its models are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True, help="folder that holds the made worlds")
    parser.add_argument("--seed", type=int, default=0, help="seed of tasks and models")
    arguments = parser.parse_args()
    make_printable()
    start = time.monotonic()
    world = build_world(arguments.cache, arguments.seed, progress=print)
    print(f"{world.folder}: {time.monotonic() - start:.0f} s")
    times = json.loads((world.folder / "times.json").read_text(encoding="utf-8"))
    rows = [json.loads(line) for line in world.evaluation.read_text(encoding="utf-8").splitlines()]
    print(f"{'model':10}" + "".join(f"{skill:>10}" for skill in EXPERTS) + f"{'CPU s':>10}{'wall s':>10}")
    for name, folder in {**world.teachers, "pivot": world.pivot}.items():
        shares = accuracies(folder, rows)
        row = "".join(f"{100 * shares[skill]:9.1f}%" for skill in EXPERTS)
        print(f"{name:10}{row}{times[name]['cpu']:10.0f}{times[name]['wall']:10.0f}")


if __name__ == "__main__":
    main()
