"""The data of a run, cut into units, in Ray's object store."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray
from rich.console import Console

from rayfuse.config import Config
from rayfuse.data.sample import DataCounts
from rayfuse.prepare.units import load_units
from rayfuse.student.job import BLOCK

KINDS = {0: ("data", "samples"), 2: ("preferences", "pairs"), 3: ("triples", "triples")}
"""What the data of a stage is called in results.json, and what it holds, by the number of the stage's sides."""


@dataclass(frozen=True)
class UnitSource:
    """A data set cut into units, in Ray's object store.

    Attributes:
        blocks: references to lists of at most BLOCK units.
        sizes: student tokens of each unit.
        content: hash of all units, in order.
        counts: what became of the rows.
    """

    blocks: Sequence[Any]
    sizes: Sequence[int]
    content: str
    counts: DataCounts


def needed_sides(config: Config) -> list[tuple[str, ...]]:
    """What the stages read: `data` (no sides), the pairs or the triples of `preferences`, in this order."""
    return sorted({stage.sides for stage in config.stages}, key=len)


def load_source(config: Config, sides: tuple[str, ...], console: Console) -> UnitSource:
    """Read `data` or `preferences`, and say what became of the rows."""
    units, counts = load_units(config, sides)
    drawn = f" ({counts.drawn:,} an epoch, by weight)" if counts.drawn != counts.samples else ""
    kind = KINDS[len(sides)][1]
    console.print(f"{counts.rows:,} rows, {counts.samples:,} {kind}{drawn} in {len(units.sizes):,} units{counts.lost}")
    keys = [[sample.key for sample in unit] for unit in units.samples]
    content = hashlib.sha256(json.dumps(keys).encode()).hexdigest()
    blocks = [ray.put(units.samples[start : start + BLOCK]) for start in range(0, len(keys), BLOCK)]
    return UnitSource(blocks, units.sizes, content, counts)
