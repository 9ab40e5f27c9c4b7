"""The data of a run, cut into units, in Ray's object store."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray
from rich.console import Console

from rayfuse.config import Config, Stage
from rayfuse.data.sample import DataCounts
from rayfuse.prepare.units import load_units
from rayfuse.student.job import BLOCK

KINDS = {0: "samples", 2: "pairs", 3: "triples"}
"""What a data set holds, by the number of the sides that its stages compare."""


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


def source_name(config: Config, stage: Stage) -> str:
    """What a stage reads, as results.json calls it: the rows of `data`, what a consensus chose of them, or pairs or
    triples of `preferences`."""
    if stage.uses_preferences:
        return "triples" if len(stage.sides) > 2 else "preferences"
    return "chosen" if config.learns_chosen(stage) else "data"


def load_sources(config: Config, learnt: Config, console: Console) -> dict[str, UnitSource]:
    """All that the stages read, by `source_name`.

    Args:
        config: the run.
        learnt: the same with what its consensus made in place of the data; without a consensus, the run itself.
        console: where it is said what became of the rows.
    """
    sides = {source_name(config, stage): stage.sides for stage in config.stages}
    return {name: load_source(config if name == "data" else learnt, sides[name], console) for name in sorted(sides)}


def load_source(config: Config, sides: tuple[str, ...], console: Console) -> UnitSource:
    """Read `data` or `preferences`, and say what became of the rows."""
    units, counts = load_units(config, sides)
    drawn = f" ({counts.drawn:,} an epoch, by weight)" if counts.drawn != counts.samples else ""
    kind = KINDS[len(sides)]
    console.print(f"{counts.rows:,} rows, {counts.samples:,} {kind}{drawn} in {len(units.sizes):,} units{counts.lost}")
    keys = [[sample.key for sample in unit] for unit in units.samples]
    content = hashlib.sha256(json.dumps(keys).encode()).hexdigest()
    blocks = [ray.put(units.samples[start : start + BLOCK]) for start in range(0, len(keys), BLOCK)]
    return UnitSource(blocks, units.sizes, content, counts)
