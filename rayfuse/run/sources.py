"""The data of a run, cut into units, in Ray's object store."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import ray
from rich.console import Console

from rayfuse.config import Config, Stage
from rayfuse.consensus.make import FOLDER
from rayfuse.consensus.weights import PromptWeights
from rayfuse.data.sample import DataCounts, Sample
from rayfuse.prepare.units import load_units
from rayfuse.prepare.weights import refuse_without_weights
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
        weights: hash of the samples' weights, in order; empty where they have none.
    """

    blocks: Sequence[Any]
    sizes: Sequence[int]
    content: str
    counts: DataCounts
    weights: str = ""


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
    sources = {}
    for name in sorted({source_name(config, stage) for stage in config.stages}):
        stages = [stage for stage in config.stages if source_name(config, stage) == name]
        weighs = {kind for stage in stages for kind in stage.weighs}
        asked = config.consensus is not None and name == "data"  # the chosen rows have their weights
        weights = PromptWeights.read(Path(config.output) / FOLDER) if asked and weighs else None
        sources[name] = load_source(config if name == "data" else learnt, stages[0].sides, console, weighs, weights)
    return sources


def load_source(
    config: Config,
    sides: tuple[str, ...],
    console: Console,
    weighs: Collection[str] = (),
    weights: PromptWeights | None = None,
) -> UnitSource:
    """Read `data` or `preferences`, and say what became of the rows.

    Args:
        config: the run.
        sides: of a stage that reads it.
        console: where it is said.
        weighs: what its stages weigh by the consensus, see Stage.weighs.
        weights: of the samples, where they do not carry their own.

    Raises:
        DataError: the data cannot be read, or lack weights that a stage reads.
    """
    units, counts = load_units(config, sides)
    if weights is not None:
        units = units._replace(samples=[weights.weighted(unit) for unit in units.samples])
    for unit in units.samples:
        refuse_without_weights(unit, [teacher.name for teacher in config.teachers], weighs)
    drawn = f" ({counts.drawn:,} an epoch, by weight)" if counts.drawn != counts.samples else ""
    kind = KINDS[len(sides)]
    console.print(f"{counts.rows:,} rows, {counts.samples:,} {kind}{drawn} in {len(units.sizes):,} units{counts.lost}")
    keys = [[sample.key for sample in unit] for unit in units.samples]
    content = hashlib.sha256(json.dumps(keys).encode()).hexdigest()
    blocks = [ray.put(units.samples[start : start + BLOCK]) for start in range(0, len(keys), BLOCK)]
    return UnitSource(blocks, units.sizes, content, counts, weights_hash(units.samples))


def weights_hash(units: Sequence[Sequence[Sample]]) -> str:
    """Hash of the samples' weights, in order; empty where none has any."""
    weights = [sample.weights and astuple(sample.weights) for unit in units for sample in unit]
    return hashlib.sha256(json.dumps(weights).encode()).hexdigest() if any(weights) else ""
