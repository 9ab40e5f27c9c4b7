"""The training rows of a seed and a condition, and the held-out items.

The prompts of a seed are the same in every condition; a condition with fewer rows has the first of them. Rows of even
and odd number are the two halves, for methods that learn in two steps from different data.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from random import Random
from typing import Any

from rayfuse.compare.design import Condition, Plan, Split
from rayfuse.data.rows import samples_of_row
from rayfuse.data.sample import Sample
from rayfuse.quickstart.skills import make, write_rows
from rayfuse.quickstart.world import EXPERTS, World

Row = dict[str, Any]
TRAIN_SEEDS = 2000
VALIDATION_SEED = 3000
"""Far from the seeds that the world itself draws with."""


def training_rows(condition: Condition, seed: int, half: str = "all") -> list[Row]:
    """Rows {"prompt", "response", "skill", "correct"} in a shuffled order; `half` is "all", "first" or "second"."""
    rows: list[Row] = []
    for skill in EXPERTS:
        skill_rows = make(skill, condition.rows, TRAIN_SEEDS + seed, condition.wrong)
        rows += {"all": skill_rows, "first": skill_rows[0::2], "second": skill_rows[1::2]}[half]
    Random(seed).shuffle(rows)
    return rows


def rows_name(plan: Plan, condition: str, seed: int) -> str:
    """Begin of the names of files made from a seed's training rows; another plan's rows have another name."""
    made_of = [plan.conditions[condition].model_dump_json(exclude={"title"}), plan.sizes.unit_size]
    return f"{condition}-{seed}-{hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:8]}"


def heldout_items(plan: Plan, world: World, split: Split) -> list[Sample]:
    """The items of one split, skill by skill; the validation items hold no prompt of the test items."""
    test = [sample for skill in EXPERTS for sample in _of_skill(_read(world.evaluation), skill)[: plan.sizes.test]]
    if split == "test":
        return test
    taken = {sample.messages for sample in test}
    items = []
    for skill in EXPERTS:
        drawn = [_sample(row) for row in make(skill, 4 * plan.sizes.validation, VALIDATION_SEED, split="heldout")]
        items += [sample for sample in drawn if sample.messages not in taken][: plan.sizes.validation]
    return items


def write_once(rows: list[Row], path: Path) -> Path:
    """Write rows as JSON lines where they are not written yet."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_rows(rows, path)
    return path


def _read(path: Path) -> list[Sample]:
    return [_sample(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def _of_skill(samples: list[Sample], skill: str) -> list[Sample]:
    return [sample for sample in samples if sample.skill == skill]


def _sample(row: Row) -> Sample:
    return samples_of_row(row)[0]
