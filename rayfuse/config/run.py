"""Config: one run as a whole, and what must hold between its sections."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from rayfuse.config.consensus import Consensus
from rayfuse.config.data import Benchmark, Data, Signals
from rayfuse.config.models import Model, Student
from rayfuse.config.prefer import Prefer
from rayfuse.config.recipes import RECIPES
from rayfuse.config.section import LocalPath, NewPlace, Section, named
from rayfuse.config.serving import Serving
from rayfuse.config.stages import AnyStage
from rayfuse.config.stages.base import Stage
from rayfuse.config.teachers import Replicas, Teacher


class Cluster(Section):
    """The Ray cluster; by default the one that RAY_ADDRESS names, else one embedded in this process."""

    address: str | None = Field(None, description="address of a running cluster, or 'local' for an embedded one")
    connect_s: float = Field(30.0, gt=0, description="how long to try to connect to a running cluster, seconds")


RESERVED_NAMES = ("model", "checkpoints", "initial", "pivot")
"""Names that stages and tables use themselves."""


class Config(Section):
    """One run, from data to fused model."""

    recipe: Literal["experts", "papers"] | None = Field(
        None,
        description="what `stages` (and `consensus`, `signals`) are, where the file does not write them: experts: find "
        "out who is right, and learn that; papers: infifusion, infigfusion and infifpo, as published",
    )
    student: Student
    teachers: tuple[Teacher, ...] = ()
    data: Data
    preferences: Data | None = Field(
        None, description="rows of chosen and rejected (and prompt), for the stages that learn from preferences"
    )
    prefer: Prefer | None = Field(None, description="preference or training data to make with `rayfuse prefer`")
    consensus: Consensus | None = Field(
        None, description="find out which labels and answers are right, and learn those; {} for the defaults"
    )
    stages: tuple[AnyStage, ...]
    output: NewPlace = Field(min_length=1, description="run folder, on a file system that every node sees")
    signals: Signals = Signals()
    evaluate: Benchmark | None = None
    serving: Serving = Serving()
    cluster: Cluster = Cluster()
    seed: int = Field(0, ge=0, description="order of the units; with config, data and world size it fixes the result")

    @model_validator(mode="before")
    @classmethod
    def _recipe_opened(cls, value: Any) -> Any:
        """A recipe's sections, where the file does not write them itself."""
        opened = RECIPES.get(str(value.get("recipe")), {}) if isinstance(value, dict) else {}
        missing = {key: section for key, section in opened.items() if value.get(key) is None}
        return {**value, **missing} if missing else value

    @field_validator("output")
    @classmethod
    def _output_is_a_folder(cls, value: str) -> str:
        if "://" in value:
            raise ValueError(f"must be a folder, and {value!r} is a URL; only signals.store may be one")
        return value

    @field_validator("teachers", mode="before")
    @classmethod
    def _name_teachers(cls, value: Any) -> Any:
        """Give every teacher a short name, and refuse two of the same."""
        if not isinstance(value, (list, tuple)):
            return value
        teachers = [named(item, "model") for item in value]
        with_names = [
            {**item, "name": item.get("name") or str(item["model"]).rstrip("/").split("/")[-1]}
            if isinstance(item, dict) and "model" in item
            else item
            for item in teachers
        ]
        names = [item["name"] for item in with_names if isinstance(item, dict) and "name" in item]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two teachers are called {name!r}; give each its own `name`")
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", str(name)):
                raise ValueError(
                    f"teacher name {name!r}: use letters, digits, dot, dash and underscore only, and a letter or digit "
                    "first"
                )
            if name in RESERVED_NAMES:
                raise ValueError(f"teacher name {name!r} stands for something else in a run; give another `name`")
        return with_names

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        if not self.stages:
            raise ValueError("stages is empty; name at least one, for example stages: [infifusion]")
        for index, stage in enumerate(self.stages):
            where = f"stages.{index} ({stage.method})"
            if stage.responses == "consensus" and self.consensus is None:
                raise ValueError(f"{where}: responses: consensus needs the section `consensus` ({{}} for its defaults)")
            section = "preferences" if stage.uses_preferences else "data"
            data = self.preferences if section == "preferences" else self.data
            if data is None and self.consensus is not None:
                data = self.data  # the pairs (and triples) are made from it
            if data is None:
                raise ValueError(f"{where} needs `preferences`: rows of prompt, {', '.join(stage.sides)}")
            units, rest = divmod(stage.batch_size, data.unit_size)
            if rest:
                raise ValueError(
                    f"{where}: batch_size {stage.batch_size} is not a multiple of {section}.unit_size {data.unit_size}"
                )
            if units % self.student.workers:
                raise ValueError(
                    f"{where}: a step has {units} units (batch_size / unit_size), which {self.student.workers} "
                    "workers cannot share equally"
                )
            if stage.uses_teachers and not self.teachers:
                raise ValueError(f"{where} needs at least one teacher")
            if stage.pairwise is not None and len(self.teachers) < 2:
                raise ValueError(f"{where} merges a student per teacher, and needs two teachers or more (there is 1)")
            fault = stage.ranks_fault(self.signals.k) or stage.weights_fault(self.teachers)
            if stage.writes:
                fault = fault or self._unread_fault() or stage.writing_fault(data.max_length)
            if fault:
                raise ValueError(f"{where}: {fault}")
        return self

    def _unread_fault(self) -> str:
        """Why the teachers cannot read what a student in training writes; empty where they can."""
        stored = [teacher.name for teacher in self.teachers if teacher.stored is not None]
        if stored:
            return (
                f"of {', '.join(stored)} there are only stored signals, and the student's own texts are new; give a "
                "teacher that answers, or leave it out"
            )
        if self.serving.mode == "first":
            return "serving.mode: first lets the teachers go before the student writes; use serving.mode: online"
        return ""

    @model_validator(mode="after")
    def _consensus_is_possible(self) -> Config:
        if self.consensus is not None and all(teacher.stored is not None for teacher in self.teachers):
            have = "there are none" if not self.teachers else "all of them are only their stored signals"
            raise ValueError(f"consensus needs a teacher that answers prompts; {have}")
        return self

    @model_validator(mode="after")
    def _prefer_is_possible(self) -> Config:
        prefer = self.prefer
        if prefer is None:
            return self
        if self.prefer_output is None:
            raise ValueError("prefer.output is missing: a .jsonl file to write (or `preferences`, to be made)")
        teachers = sum(prefer.per_teacher for teacher in self.teachers if teacher.stored is None)
        if prefer.write != "preferences" and not teachers:
            raise ValueError(f"prefer.write: {prefer.write} needs responses of at least one teacher")
        if teachers + prefer.pivot_count < 2 and prefer.write != "responses":
            raise ValueError(
                "prefer needs at least two responses to a prompt to compare; raise per_teacher or from_pivot"
            )
        return self

    @property
    def prefer_output(self) -> str | None:
        """The file that `rayfuse prefer` writes; None where the configuration names none."""
        if self.prefer is None:
            return None
        if self.prefer.output is not None:
            return self.prefer.output
        made = self.preferences.file if self.preferences is not None and self.prefer.write != "responses" else None
        return made if made is not None and "://" not in made and made.endswith(".jsonl") else None

    def learns_chosen(self, stage: Stage) -> bool:
        """Whether a stage on `data` learns the answers that the consensus chose, and not the rows as they are."""
        return self.consensus is not None and stage.responses != "data" and not stage.uses_preferences

    def absolute(self) -> Config:
        """The same configuration with every local path absolute, for processes that run in other folders."""
        return self.with_paths(LocalPath.absolute)

    @property
    def store_url(self) -> str:
        """Where the signals are kept."""
        return self.signals.store or str(Path(self.output) / "signals")

    @property
    def rollouts_url(self) -> str:
        """Where the texts are kept that a student in training wrote."""
        return f"{self.signals.store.rstrip('/')}-rollouts" if self.signals.store else f"{self.output}/rollouts"

    def stage_folder(self, index: int) -> Path:
        """The folder of stage `index` inside the run folder, for example `stages/01-sft`."""
        return Path(self.output) / "stages" / f"{index + 1:02d}-{self.stages[index].method}"


def method_of_stage(name: str) -> str:
    """The method of a stage by its name in the run folder and in metrics, `01-sft` or `02-infifusion/TEACHER`."""
    return name.split("/")[0].partition("-")[2]


def as_teacher(config: Config, name: str, folder: str | None = None) -> Teacher:
    """The student's model, or the one that a stage left in `folder`, as something that can be scored."""
    student = config.student
    model = {"model": folder, "dtype": student.dtype} if folder else student.model_dump(include=set(Model.model_fields))
    return Teacher.model_validate({**model, "name": name, "cpus": student.cpus, "gpus": student.gpus})


def as_reference(config: Config, name: str, folder: str | None = None) -> Teacher:
    """`as_teacher` with the numbers of a student in training: float32 weights, computed in the student's dtype.

    So the reference of a preference loss equals the policy at the first step.
    """
    teacher = as_teacher(config, name, folder)
    compute = None if config.student.dtype == "float32" else config.student.dtype
    # Where the teachers work first, the student's places are free meanwhile.
    copies = config.student.workers if config.serving.mode == "first" else 1
    changes = {"dtype": "float32", "autocast": compute, "replicas": Replicas(max=copies)}
    return teacher.model_copy(update=changes)
