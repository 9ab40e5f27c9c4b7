"""Config: one run as a whole, and what must hold between its sections."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, field_validator, model_validator

from rayfuse.config.data import Benchmark, Data, Signals
from rayfuse.config.models import Model, Student
from rayfuse.config.prefer import Prefer
from rayfuse.config.section import Section, named
from rayfuse.config.serving import Serving
from rayfuse.config.stages import AnyStage
from rayfuse.config.stages.base import Distillation
from rayfuse.config.teachers import Teacher


class Cluster(Section):
    """The Ray cluster; by default the one that RAY_ADDRESS names, else one embedded in this process."""

    address: str | None = Field(None, description="address of a running cluster, or 'local' for an embedded one")


RESERVED_NAMES = ("model", "checkpoints", "initial", "pivot")
"""Names that stages and tables use themselves."""


def _absolute(path: str, new: bool = False) -> str:
    """A local path (`~/` too) made absolute; hub ids, URLs and (unless new) what does not exist stay as they are."""
    path = str(Path(path).expanduser()) if path.startswith("~/") else path
    return str(Path(path).resolve()) if "://" not in path and (new or Path(path).exists()) else path


class Config(Section):
    """One run, from data to fused model."""

    student: Annotated[Student, BeforeValidator(lambda value: named(value, "model"))]
    teachers: tuple[Annotated[Teacher, BeforeValidator(lambda value: named(value, "model"))], ...] = ()
    data: Annotated[Data, BeforeValidator(lambda value: named(value, "path"))]
    preferences: Annotated[Data | None, BeforeValidator(lambda value: named(value, "path"))] = Field(
        None, description="rows of prompt, chosen and rejected, for the stages that learn from preferences"
    )
    prefer: Prefer | None = Field(None, description="preference or training data to make with `rayfuse prefer`")
    stages: tuple[AnyStage, ...]
    output: str = Field(min_length=1, description="run folder, on a file system that every node sees")
    signals: Signals = Signals()
    evaluate: Annotated[Benchmark, BeforeValidator(lambda value: named(value, "path"))] | None = None
    serving: Serving = Serving()
    cluster: Cluster = Cluster()
    seed: int = Field(0, ge=0, description="order of the units; with config, data and world size it fixes the result")

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
            section = "preferences" if stage.uses_preferences else "data"
            data = self.preferences if section == "preferences" else self.data
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
            if getattr(stage, "merge", None) is not None and len(self.teachers) < 2:
                raise ValueError(f"{where} merges a student per teacher, and needs two teachers or more (there is 1)")
            if isinstance(stage, Distillation) and stage.k is not None and stage.k > self.signals.k:
                raise ValueError(f"{where}: k {stage.k} is more than signals.k {self.signals.k}")
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
        made = self.preferences.path if self.preferences is not None and self.prefer.write != "responses" else None
        return made if made is not None and "://" not in made and made.endswith(".jsonl") else None

    def absolute(self) -> Config:
        """The same configuration with every local path absolute, for processes that run in other folders."""

        def model(section: Any) -> Any:
            paths = {"model": _absolute(section.model), "tokenizer": section.tokenizer and _absolute(section.tokenizer)}
            if section.trust_remote_code is not None:
                paths["trust_remote_code"] = paths["model"]
            if getattr(section, "endpoint", None) is not None:
                files = {key: getattr(section.endpoint, key) for key in ("api_key_file", "ca_file")}
                absolute = {key: _absolute(path, True) for key, path in files.items() if path}
                paths["endpoint"] = section.endpoint.model_copy(update=absolute)
            return section.model_copy(update=paths)

        def teacher(section: Teacher) -> Teacher:
            environment = section.runtime_env
            if environment is None or environment.py_executable is None:
                return model(section)
            # Not resolved: the link to the interpreter is what makes it that of a virtual environment.
            python = Path(environment.py_executable).expanduser().absolute()
            if not python.exists():  # it may be there on other nodes
                return model(section)
            named_whole = environment.model_copy(update={"py_executable": str(python)})
            return model(section.model_copy(update={"runtime_env": named_whole}))

        def file(section: Any) -> Any:
            return section and section.model_copy(update={"path": _absolute(section.path)})

        prefer = self.prefer
        if prefer is not None:
            judge = prefer.judge
            changes = {
                "prompts": file(prefer.prompts),
                "output": prefer.output and _absolute(prefer.output, True),
                "judge": model(judge) if isinstance(judge, Model) else judge,
                "store": prefer.store and _absolute(prefer.store, True),
            }
            prefer = prefer.model_copy(update=changes)
        signals = self.signals.model_copy(update={"store": self.signals.store and _absolute(self.signals.store, True)})
        return self.model_copy(
            update={
                "student": model(self.student),
                "teachers": tuple(teacher(section) for section in self.teachers),
                "data": file(self.data),
                "preferences": file(self.preferences),
                "evaluate": file(self.evaluate),
                "prefer": prefer,
                "signals": signals,
                "output": _absolute(self.output, True),
            }
        )

    @property
    def store_url(self) -> str:
        """Where the signals are kept."""
        return self.signals.store or str(Path(self.output) / "signals")

    def stage_folder(self, index: int) -> Path:
        """The folder of stage `index` inside the run folder, for example `stages/01-sft`."""
        return Path(self.output) / "stages" / f"{index + 1:02d}-{self.stages[index].method}"


def as_teacher(config: Config, name: str, folder: str | None = None) -> Teacher:
    """The student's model, or the one that a stage left in `folder`, as something that can be scored."""
    student = config.student
    model = {"model": folder, "dtype": student.dtype} if folder else student.model_dump(include=set(Model.model_fields))
    return Teacher.model_validate({**model, "name": name, "cpus": student.cpus, "gpus": student.gpus})
