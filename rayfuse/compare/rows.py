"""The training rows of a seed and a condition, and the held-out items.

The prompts of a world are the same for every seed; a seed draws which labels are wrong or missing, and their order.
Rows of even and odd number are the two halves, for methods that learn in two steps from different data.
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
from rayfuse.quickstart import facts
from rayfuse.quickstart.skills import write_rows

Row = dict[str, Any]


def training_rows(plan: Plan, condition: str, seed: int, half: str = "all") -> list[Row]:
    """Rows of all prompts in the seed's order: `prompt`, `skill` (its field), `truth`, and `response` (its label, right
    or wrong) where it has one.

    Args:
        plan: the comparison.
        condition: its key.
        seed: of the labels and the order.
        half: "all", "first" or "second".
    """
    settings = plan.conditions[condition]
    made = facts.facts(plan.worlds[settings.world].seed)
    rows = facts.labelled(made, seed, settings.wrong, settings.per_field)
    Random(seed).shuffle(rows)
    return {"all": rows, "first": rows[0::2], "second": rows[1::2]}[half]


def rows_name(plan: Plan, condition: str, seed: int) -> str:
    """Begin of the names of files made from a seed's training rows; another plan's rows have another name."""
    settings: Condition = plan.conditions[condition]
    made_of = [
        settings.model_dump_json(exclude={"title"}),
        plan.worlds[settings.world].model_dump_json(exclude={"title", "tuned_in"}),
        plan.sizes.unit_size,
    ]
    return f"{condition}-{seed}-{hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:8]}"


def heldout_items(plan: Plan, world: str, split: Split) -> list[Sample]:
    """The items of one split, field by field; an entity is in one split only."""
    rows = facts.rows(facts.facts(plan.worlds[world].seed), "heldout")
    items = []
    for field in facts.FIELDS:
        mine = [row for row in rows if row["skill"] == field]
        Random(f"split/{field}").shuffle(mine)
        sizes = plan.sizes
        taken = mine[: sizes.test] if split == "test" else mine[sizes.test : sizes.test + sizes.validation]
        items += [samples_of_row(row)[0] for row in taken]
    return items


def write_once(rows: list[Row], path: Path) -> Path:
    """Write rows as JSON lines where they are not written yet."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_rows(rows, path)
    return path
