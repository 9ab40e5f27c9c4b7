"""What is compared: the plan of a comparison, one YAML file, and the cells that it comes to.

A cell is one training and one evaluation: a method with its settings, in one condition of one world, for one seed. A
method whose settings are tuned has a cell for each of them on every tuning seed, scored on validation items, in one
condition of each world; the best goes into the reported seeds of that world, scored on other items.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from rayfuse.config import STAGES, Section, TeacherStage
from rayfuse.errors import ConfigError
from rayfuse.quickstart.facts import FIELDS
from rayfuse.quickstart.facts_world import Knowledge

Split = Literal["validation", "test"]
Purpose = Literal["tune", "report", "cost", "gradient"]


class Sizes(Section):
    """How large everything is; a larger edition changes only these."""

    steps: int = Field(ge=1, description="optimiser steps of every method")
    batch_size: int = Field(ge=1, description="samples (or pairs) per step")
    unit_size: int = Field(ge=1, description="samples (or pairs) per unit")
    learning_rate: float = Field(gt=0, description="peak, where a method's stage or its tuning names none")
    warmup: float = Field(0.05, ge=0, lt=1, description="share of the steps")
    cost_steps: int = Field(30, ge=1, description="optimiser steps of a measurement of cost")
    test: int = Field(ge=1, description="held-out items per field that are reported")
    validation: int = Field(ge=1, description="other held-out items per field, for tuning alone")
    max_new_tokens: int = Field(40, ge=1, description="longest answer")
    temperature: float = Field(0.8, gt=0, description="of the pivot's samples for preference pairs")


class WorldPlan(Section):
    """What the models of a world know (quickstart/facts_world.py)."""

    title: str = Field(description="as it stands in the page")
    seed: int = Field(0, ge=0, description="of its facts and models")
    elsewhere: float = Field(0.15, ge=0, le=1, description="share of the facts of other fields that a teacher knows")
    pivot: float = Field(0.3, ge=0, le=1, description="share of the facts that the pivot knows")
    mistaken: float = Field(0.0, ge=0, le=1, description="share of the others that a teacher is surely wrong about")
    tuned_in: str = Field(description="condition of this world in which settings are chosen, for all its conditions")

    @property
    def knowledge(self) -> Knowledge:
        """The same, as the world is made from it."""
        return Knowledge(self.elsewhere, self.pivot, self.mistaken)


class Condition(Section):
    """What the training data of a condition are like."""

    title: str = Field(description="as it stands in the page")
    world: str = Field(description="key of the world")
    wrong: float = Field(0.0, ge=0, le=1, description="share of wrong labels, and of pairs the wrong way round")
    per_field: int | None = Field(None, ge=0, description="labels per field; the other prompts have none. Default: all")


class Method(Section):
    """One line of the table."""

    title: str = Field("", description="as it stands in the page; default: the method's key in the plan")
    part: Literal["main", "ablation", "extra"] = "main"
    stages: tuple[dict[str, Any], ...] = Field((), description="as in a run's YAML; they share the steps equally")
    model: Literal["pivot", "towns", "codes", "pets"] | None = Field(
        None, description="in place of stages: a model of the world as it is"
    )
    tune: tuple[dict[str, Any], ...] = Field((), description="settings of the last stage, tried on validation items")
    like: str | None = Field(None, description="take over what was tuned for this method, stage by stage of its kind")
    share: float = Field(1.0, gt=0, le=1, description="share of the steps: the rest went into the model of `after`")
    after: str | None = Field(None, description="start from this method's model of the same seed and condition")
    half: Literal["all", "first", "second"] = Field("all", description="rows that the method learns from")
    learns_from: Literal[
        "labels", "truth", "consensus", "surest teacher", "a teacher", "the field's teacher", "majority"
    ] = Field("labels", description="where the responses come from; all but labels answer every prompt")
    pairs_from: Literal["verifier", "consensus"] = Field(
        "verifier", description="who says which of the answers to a prompt is right, for methods on preferences"
    )
    teachers: tuple[str, ...] = FIELDS
    k: int = Field(10, ge=2, description="signals.k")
    conditions: tuple[str, ...] = Field((), description="only these; default: all")
    seeds: tuple[int, ...] = Field((), description="only these of the reported seeds; default: all")
    compare_to: str = Field("sft", description="method whose difference is shown")

    @model_validator(mode="after")
    def _whole(self) -> Method:
        if bool(self.stages) == bool(self.model):
            raise ValueError("give stages, or a model that is not trained")
        return self


@dataclass(frozen=True)
class Cell:
    """One training and one evaluation.

    Attributes:
        method: key of the method in the plan.
        condition: key of the condition.
        seed: draws the training rows and their order.
        split: which items it is scored on.
        settings: changes to the stages, as JSON: a list with one object per stage.
        purpose: "tune", "report", "cost" or "gradient" (gradients where the student starts, nothing is trained).
        recipe: hash of the rest that the result depends on: sizes, condition and method as the plan has them.
    """

    method: str
    condition: str
    seed: int
    split: Split
    settings: str
    purpose: Purpose
    recipe: str

    @property
    def name(self) -> str:
        """What identifies it: a cell with this name in the results is not done again."""
        return "/".join([self.purpose, self.condition, self.method, self.settings, str(self.seed), self.recipe])


class Plan(Section):
    """The comparison."""

    worlds: dict[str, WorldPlan]
    sizes: Sizes
    seeds: tuple[int, ...] = Field(min_length=1, description="reported; each draws its own labels and their order")
    tuning_seeds: tuple[int, ...] = Field(min_length=1, description="settings are chosen on these, none is reported")
    conditions: dict[str, Condition]
    methods: dict[str, Method]
    cost_condition: str = Field(description="condition in which steps, memory and signals are measured")
    questions: tuple[tuple[str, str], ...] = Field((), description="pairs of methods whose difference is shown")
    notes: dict[str, str] = Field({}, description="text of the page without numbers: setting, account, ablation, ...")

    @model_validator(mode="after")
    def _consistent(self) -> Plan:
        if shared := set(self.tuning_seeds) & set(self.seeds):
            raise ValueError(f"tuning_seeds {sorted(shared)} are among the reported seeds {self.seeds}")
        if self.cost_condition not in self.conditions:
            raise ValueError(f"cost_condition {self.cost_condition!r} is none of {', '.join(self.conditions)}")
        for name, settings in self.conditions.items():
            if settings.world not in self.worlds:
                raise ValueError(f"conditions.{name}: there is no world {settings.world!r}")
        for name, world in self.worlds.items():
            if world.tuned_in not in self.conditions or self.conditions[world.tuned_in].world != name:
                raise ValueError(f"worlds.{name}: tuned_in {world.tuned_in!r} is no condition of this world")
        for name, method in self.methods.items():
            for other in (method.like, method.after, method.compare_to):
                if other is not None and other not in self.methods:
                    raise ValueError(f"methods.{name}: there is no method {other!r}")
            if method.after is not None and (self.methods[method.after].tune or self.methods[method.after].like):
                raise ValueError(f"methods.{name}: it can only go on from a method without tuned settings")
            for condition in method.conditions:
                if condition not in self.conditions:
                    raise ValueError(f"methods.{name}: there is no condition {condition!r}")
            if not set(method.seeds) <= set(self.seeds):
                raise ValueError(f"methods.{name}: seeds {method.seeds} are not all among the reported {self.seeds}")
        return self

    def title(self, name: str) -> str:
        """A method as the page names it."""
        return self.methods[name].title or name

    @property
    def trained(self) -> set[str]:
        """The methods that train, not the world's own models."""
        return {name for name, method in self.methods.items() if method.stages}

    def conditions_of(self, name: str) -> tuple[str, ...]:
        """The conditions in which a method is measured."""
        return self.methods[name].conditions or tuple(self.conditions)

    def worlds_of(self, name: str) -> tuple[str, ...]:
        """The worlds in which a method is measured."""
        return tuple(dict.fromkeys(self.conditions[condition].world for condition in self.conditions_of(name)))

    def settings_of(self, name: str, chosen: Mapping[str, dict[str, Any]], last: Mapping[str, Any]) -> str:
        """A cell's `settings`: what was tuned for other methods where `like` says so, and `last` in the last stage.

        Args:
            name: the method.
            chosen: best settings of tuned methods in the cell's world, by name.
            last: settings of the last stage.
        """
        method = self.methods[name]
        changes: list[dict[str, Any]] = [{} for _ in method.stages]
        for index, stage in enumerate(method.stages):
            donor = stage.get("tuned_as") or (method.like if index == len(method.stages) - 1 else None)
            changes[index] = {**(chosen[donor] if donor else {})}
        if changes:
            changes[-1] |= last
        return json.dumps(changes, sort_keys=True)

    def donors(self, name: str) -> set[str]:
        """The methods whose tuned settings a method takes over."""
        method = self.methods[name]
        return {donor for stage in method.stages if (donor := stage.get("tuned_as"))} | (
            {method.like} if method.like else set()
        )

    def tuning(self, name: str, world: str, chosen: Mapping[str, dict[str, Any]]) -> Iterator[list[Cell]]:
        """The cells on the tuning seeds of a world: for each of the settings tried one per seed, in their order.

        A method that others go on from has one without settings, if it is not tuned itself.
        """
        is_start = any(method.after == name for method in self.methods.values())
        for last in self.methods[name].tune or ([{}] if is_start else []):
            settings = self.settings_of(name, chosen, last)
            condition = self.worlds[world].tuned_in
            yield [self.cell(name, condition, seed, settings, "tune") for seed in self.tuning_seeds]

    def reported(self, name: str, condition: str, chosen: Mapping[str, dict[str, Any]]) -> Iterator[Cell]:
        """The cells that the page reports of a method in a condition; `chosen` holds what tuning gave in its world."""
        settings = self.settings_of(name, chosen, chosen.get(name, {}))
        method = self.methods[name]
        for seed in self.seeds[:1] if method.model else method.seeds or self.seeds:
            yield self.cell(name, condition, seed, settings, "report")

    def costs(self, name: str, chosen: Mapping[str, dict[str, Any]]) -> Iterator[Cell]:
        """The cell that measures time, memory and signals of a main method, alone in a process, with an empty store."""
        if self.methods[name].stages and self.methods[name].part == "main":
            settings = self.settings_of(name, chosen, chosen.get(name, {}))
            yield self.cell(name, self.cost_condition, self.tuning_seeds[0], settings, "cost")

    def gradients(self, name: str) -> Iterator[Cell]:
        """The cells that measure the gradient of a main method's distance, one for each of its worlds."""
        method = self.methods[name]
        one_distance = len(method.stages) == 1 and issubclass(STAGES[method.stages[0]["method"]], TeacherStage)
        if (
            one_distance
            and method.part == "main"
            and method.learns_from == "labels"
            and "merge" not in method.stages[0]
        ):
            for world in self.worlds_of(name):
                yield self.cell(name, self.worlds[world].tuned_in, self.tuning_seeds[0], "[{}]", "gradient")

    def start(self, cell: Cell) -> Cell | None:
        """The cell whose model a cell goes on from, where it is not the world's pivot."""
        after = self.methods[cell.method].after
        if after is None:
            return None
        purpose: Purpose = "report" if cell.seed in self.seeds else "tune"
        return self.cell(after, cell.condition, cell.seed, self.settings_of(after, {}, {}), purpose)

    def cell(self, name: str, condition: str, seed: int, settings: str, purpose: Purpose) -> Cell:
        """A cell with the hash of its recipe; what is reported is scored on the test items, the rest is not."""
        split: Split = "test" if purpose == "report" else "validation"
        return Cell(name, condition, seed, split, settings, purpose, self.recipe(name, condition))

    def recipe(self, name: str, condition: str) -> str:
        """Hash of what the results of a method in a condition depend on, besides settings and seed."""
        method = self.methods[name]
        world = self.worlds[self.conditions[condition].world]
        parts = [
            world.model_dump_json(exclude={"title", "tuned_in"}),
            self.sizes.model_dump_json(exclude={"cost_steps"}),
            self.conditions[condition].model_dump_json(exclude={"title"}),
            method.model_dump_json(
                include={"stages", "model", "share", "half", "learns_from", "pairs_from", "teachers", "k"}
            ),
            method.after and self.recipe(method.after, condition),
        ]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:8]


def load_plan(path: Path) -> Plan:
    """Read and check a plan.

    Raises:
        ConfigError: it cannot be read, or breaks the schema.
    """
    try:
        return Plan.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (OSError, yaml.YAMLError, ValidationError) as error:
        raise ConfigError(f"{path}: {error}") from error
