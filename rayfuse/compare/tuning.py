"""Which settings tuning chose, from the rows of the tuning cells."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rayfuse.compare.design import Plan
from rayfuse.quickstart.world import EXPERTS

Rows = Mapping[str, Mapping[str, Any]]
"""Finished rows by the name of their cell."""


def best_settings(plan: Plan, rows: Rows, name: str) -> dict[str, Any] | None:
    """The settings of a method's best tuning cell, or None while some of them are missing.

    Best is the most right validation items; of equals, the fewest bits per byte.
    """
    method = plan.methods[name]
    known = donated(plan, rows, name)
    if known is None:
        return None
    if not method.tune:
        return {}
    cells = list(plan.tuning(name, known))
    if any(cell.name not in rows for cell in cells):
        return None
    scored = [(right(rows[cell.name]), -rows[cell.name]["bits_per_byte"]) for cell in cells]
    return method.tune[scored.index(max(scored))]


def donated(plan: Plan, rows: Rows, name: str) -> dict[str, dict[str, Any]] | None:
    """What was tuned for the methods that a method takes settings from, or None while some of it is missing."""
    donated = {donor: best_settings(plan, rows, donor) for donor in plan.donors(name)}
    known = {donor: settings for donor, settings in donated.items() if settings is not None}
    return known if len(known) == len(donated) else None


def right(row: Mapping[str, Any]) -> int:
    """Right items of a row."""
    return sum(str(row[f"right_{skill}"]).count("1") for skill in EXPERTS)
