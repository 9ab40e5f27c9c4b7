"""What a worker needs to train one stage."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from rayfuse.config import Config, Data, Stage
from rayfuse.prepare.spec import PrepareSpec

BLOCK = 64
"""Units that travel as one object."""


@dataclass(frozen=True)
class StageJob:
    """All that a worker needs to train one stage.

    Attributes:
        config: the run.
        index: which of `config.stages`.
        start: folder or id of the model that the stage starts from.
        identity: hash of everything the result depends on, of which `made_of` names the parts.
        spec: what the prepare tasks are asked for.
        blocks: object references, each to a list of at most BLOCK units.
        sizes: student tokens of each unit, of all there are.
        part: name of this student among those of a pairwise stage; empty where the stage has one student.
        made_of: what the result depends on, for people: the part's name -> its hash or version.
    """

    config: Config
    index: int
    start: str
    identity: str
    spec: PrepareSpec
    blocks: Sequence[Any]
    sizes: Sequence[int]
    part: str = ""
    made_of: Mapping[str, str] = field(default_factory=dict)

    @property
    def stage(self) -> Stage:
        """The stage's configuration."""
        return self.config.stages[self.index]

    @property
    def data(self) -> Data:
        """The section of the data that the stage learns from."""
        preferences = self.stage.uses_preferences
        return cast(Data, self.config.preferences) if preferences else self.config.data

    @property
    def folder(self) -> Path:
        """The stage's folder in the run folder (pairwise: this student's folder in it)."""
        return self.config.stage_folder(self.index) / self.part

    @property
    def name(self) -> str:
        """The stage in metrics and messages, for example 01-sft, or 02-infifusion/math."""
        return str(self.folder.relative_to(Path(self.config.output) / "stages"))

    @property
    def units(self) -> int:
        """How many units there are in all."""
        return len(self.sizes)

    @property
    def units_per_step(self) -> int:
        """Micro-steps of one optimiser step, over all workers."""
        return self.stage.batch_size // self.data.unit_size

    @property
    def steps(self) -> int:
        """Optimiser steps of the stage."""
        if self.stage.steps is not None:
            return self.stage.steps
        return max(1, math.ceil(self.units * (self.stage.epochs or 1.0) / self.units_per_step))
