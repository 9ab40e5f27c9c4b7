"""Which settings tuning chose in each world, from the rows of the tuning cells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rayfuse.compare.design import Cell, Plan
from rayfuse.quickstart.facts import FIELDS

Rows = Mapping[str, Mapping[str, Any]]
"""Finished rows by the name of their cell."""


def best_settings(plan: Plan, rows: Rows, name: str, world: str) -> dict[str, Any] | None:
    """The best settings of a method in a world, or None while one of their cells is missing.

    Best is the most right validation items over the tuning seeds; of equals, the fewest bits per byte.
    """
    method = plan.methods[name]
    known = donated(plan, rows, name, world)
    if known is None:
        return None
    if not method.tune:
        return {}
    tried = list(plan.tuning(name, world, known))
    if any(cell.name not in rows for cells in tried for cell in cells):
        return None
    scored = [score(rows, cells) for cells in tried]
    return method.tune[scored.index(max(scored))]


def score(rows: Rows, cells: Sequence[Cell]) -> tuple[int, float]:
    """(right items, minus bits per byte), summed over the cells of one setting."""
    mine = [rows[cell.name] for cell in cells]
    return sum(map(right, mine)), -sum(row["bits_per_byte"] for row in mine)


def donated(plan: Plan, rows: Rows, name: str, world: str) -> dict[str, dict[str, Any]] | None:
    """What was tuned in a world for the methods that a method takes settings from, or None while some is missing."""
    donated = {donor: best_settings(plan, rows, donor, world) for donor in plan.donors(name)}
    known = {donor: settings for donor, settings in donated.items() if settings is not None}
    return known if len(known) == len(donated) else None


def right(row: Mapping[str, Any]) -> int:
    """Right items of a row."""
    return sum(str(row[f"right_{field}"]).count("1") for field in FIELDS)
