"""A run's configuration: one YAML file, checked as a whole before anything starts.

A value is valid or it raises; nothing is adjusted silently. Keys that do not exist are refused. The resolved
configuration (every default filled in) is what `config.json` in the run folder holds. This module imports neither
torch nor ray, so that `rayfuse --help` and a wrong key answer at once.

The shortest run:

    student: microsoft/phi-4
    teachers: [Qwen/Qwen2.5-14B-Instruct, mistralai/Mistral-Small-24B-Instruct-2501]
    data: train.jsonl
    stages: [infifusion]
    output: runs/phi4-fused
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)

from rayfuse.errors import ConfigError

Dtype = Literal["float32", "bfloat16", "float16"]


def _without_secrets(value: str) -> str:
    """Refuse user names and passwords in a URL: the configuration is written into the run folder and the card."""
    if re.match(r"[a-z0-9+.-]+://[^/]*@", value):
        raise ValueError("has a user name or password in its URL; give credentials by the environment instead")
    return value


Place = Annotated[str, AfterValidator(_without_secrets)]
"""A path, hub id or URL."""


class Section(BaseModel):
    """Base of every section: frozen; unknown keys and numbers that are not finite are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


class Model(Section):
    """Where a model comes from, and how it is loaded."""

    model: str = Field(min_length=1, description="Hugging Face id or local folder")
    revision: str | None = Field(None, description="branch, tag or commit of a hub model; a commit pins it")
    tokenizer: str | None = Field(None, description="id or folder of the tokenizer; default: the model's own")
    gguf_file: str | None = Field(None, description="name of a GGUF file inside `model`, loaded through transformers")
    dtype: Dtype = Field("bfloat16", description="number format of the weights while they are used")
    trust_remote_code: str | None = Field(
        None, description="repeat the model's name here to run the Python code that ships with it; never on by default"
    )

    @model_validator(mode="after")
    def _remote_code_is_named(self) -> Model:
        if self.trust_remote_code is not None and self.trust_remote_code != self.model:
            raise ValueError(
                f"trust_remote_code must repeat the model's name {self.model!r} to allow its code to run, "
                f"but is {self.trust_remote_code!r}"
            )
        return self


class Replicas(Section):
    """How many copies of a teacher Ray Serve may keep; it scales between the two with the work in flight."""

    min: int = Field(0, ge=0, description="copies kept when idle; 0 frees all memory after idle_s")
    max: int = Field(1, ge=1, description="copies under load")
    idle_s: float = Field(60.0, ge=0, description="seconds without work after which a copy is given up")

    @model_validator(mode="after")
    def _ordered(self) -> Replicas:
        if self.min > self.max:
            raise ValueError(f"replicas.min ({self.min}) is larger than replicas.max ({self.max})")
        return self


class Teacher(Model):
    """A model that answers "what would you say next?"."""

    name: str = Field("", description="short name in metrics and reports; default: the last part of `model`")
    backend: Literal["transformers"] = Field("transformers", description="engine that runs the teacher")
    weight: float = Field(1.0, gt=0, description="w_s of the loss: how much this teacher counts")
    replicas: Replicas = Replicas()
    cpus: float = Field(1.0, gt=0, description="CPU cores per replica")
    gpus: float = Field(0.0, ge=0, le=1, description="GPU per replica, or a share of one; 0: on the CPU")
    batch_tokens: int = Field(16384, ge=64, description="tokens of one forward pass; lower it at out-of-memory")
    patience_s: float = Field(600.0, gt=0, description="seconds to retry a teacher that does not answer")


class Student(Model):
    """The pivot: the model that the teachers are fused into."""

    engine: Literal["torch"] = Field("torch", description="what trains: plain PyTorch, data-parallel with DDP")
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="number format of the forward and backward pass (weights: float32)"
    )
    workers: int = Field(1, ge=1, description="data-parallel training processes")
    cpus: float = Field(1.0, gt=0, description="CPU cores per worker")
    gpus: Literal[0, 1] = Field(0, description="GPUs per worker; 0: on the CPU")
    gradient_checkpointing: bool = Field(False, description="recompute activations: less memory, about 30% slower")
    prefetch: int = Field(4, ge=1, description="units each worker keeps in preparation ahead of its step")
    max_failures: int = Field(3, ge=0, description="restarts from the last checkpoint before the run gives up")


class Data(Section):
    """Conversations (`messages`) or pairs (`prompt`, `response`); the loss is on the assistant's turns only."""

    path: Place = Field(min_length=1, description=".jsonl, .json or .parquet file, folder of a data set, or hub id")
    name: str | None = Field(None, description="configuration name of a hub data set")
    split: str = Field("train", description="split of a hub data set")
    revision: str | None = Field(None, description="branch, tag or commit of a hub data set")
    limit: int | None = Field(None, ge=1, description="read only the first rows")
    max_length: int = Field(4096, ge=8, description="student tokens of prompt and response together")
    too_long: Literal["drop", "cut"] = Field(
        "drop", description="longer samples: drop them, or cut the prompt from the left (a response is never cut)"
    )
    on_bad_row: Literal["error", "skip"] = Field("error", description="a malformed row stops the run, or is counted")
    unit_size: int = Field(8, ge=1, description="samples per unit: one teacher call and one micro-step of the student")


class Signals(Section):
    """What the teachers are asked for, and where their answers are kept."""

    k: int = Field(10, ge=2, description="top-K logits kept per position")
    store: Place | None = Field(None, description="folder or fsspec URL of the signal store; default: OUTPUT/signals")


class Stage(Section):
    """What every stage has: how long, how fast, from which model."""

    method: str
    start_from: Literal["previous", "pivot"] = Field(
        "previous", description="the model this stage starts from: the stage before it, or the untouched student"
    )
    steps: int | None = Field(None, ge=1, description="optimiser steps; give this or epochs")
    epochs: float | None = Field(None, gt=0, description="passes over the data; default 1 when steps is not given")
    batch_size: int = Field(64, ge=1, description="samples per optimiser step over all workers (whole units)")
    learning_rate: float = Field(1e-5, gt=0, description="peak of the cosine schedule")
    warmup: float = Field(0.1, ge=0, lt=1, description="share of the steps with linear warm-up")
    weight_decay: float = Field(0.0, ge=0, description="AdamW weight decay (matrices only)")
    grad_clip: float = Field(1.0, gt=0, description="largest gradient norm")
    save_every: int = Field(200, ge=1, description="steps between checkpoints")
    keep: int = Field(2, ge=1, description="checkpoints kept per stage")

    @model_validator(mode="after")
    def _one_length(self) -> Stage:
        if self.steps is not None and self.epochs is not None:
            raise ValueError(f"give steps or epochs, not both (steps={self.steps}, epochs={self.epochs})")
        return self


class SFT(Stage):
    """Supervised fine-tuning: cross-entropy on the responses."""

    method: Literal["sft"] = "sft"


class Distillation(Stage):
    """What the stages that compare top-K logits share."""

    lam: float = Field(0.5, ge=0, le=1, description="weight of the distillation term; 1 - lam is that of the SFT term")
    k: int | None = Field(None, ge=2, description="ranks compared; default and upper limit: signals.k")
    standardized: bool = Field(True, description="z-score the K logits of each position (no temperature needed)")
    space: Literal["logits", "probs"] = Field("logits", description="compare logits, or their softmax over the kept K")
    alignment: Literal["bytes", "position"] = Field(
        "bytes", description="pair positions that have read equally many bytes, or simply t with t (ablation)"
    )
    over_teachers: Literal["sum", "mean"] = Field("sum", description="how the teachers' distances are added up")


class Merge(Section):
    """How the students of pairwise InfiFusion become one model."""

    method: Literal["task_arithmetic", "ties", "sce"] = Field(description="formula of the merge")
    density: float | None = Field(
        None, gt=0, le=1, description="share of each tensor's elements kept by ties (default 0.2) and sce (0.1)"
    )
    scale: float = Field(1.0, gt=0, description="factor on the merged difference to the model the stage starts from")


class InfiFusion(Distillation):
    """InfiFusion (arXiv 2501.02795): cross-entropy plus the standardised top-K distance to the teachers.

    Unified: one student learns from all teachers. Pairwise (`merge` given): a student per teacher, then merged.
    """

    method: Literal["infifusion"] = "infifusion"
    merge: Annotated[Merge | None, BeforeValidator(lambda value: _named(value, "method"))] = Field(
        None, description="pairwise form: train one student per teacher, and merge them so"
    )


class InfiGFusion(Distillation):
    """InfiGFusion (arXiv 2505.13893): InfiFusion plus the closed-form distance between graphs on the logits."""

    method: Literal["infigfusion"] = "infigfusion"
    alpha: float = Field(1.0, ge=0, description="weight of the graph distance beside the rank distance")


class ByteKD(Stage):
    """Byte-prefix distillation (ours): the teachers' probabilities carried onto the student's tokens, byte by byte."""

    method: Literal["bytekd"] = "bytekd"
    lam: float = Field(
        0.5, ge=0, le=1, description="share of the teachers in the target; 1 - lam is the written text's"
    )
    width: int = Field(16, ge=2, description="student tokens kept per position in the teachers' target")
    temper: float = Field(1.0, ge=0, description="how strongly a teacher's likelihood of the response weighs; 0: equal")


class Preference(Stage):
    """What the stages on preference pairs share. They read `preferences`, and batch_size counts pairs."""

    learning_rate: float = Field(1e-7, gt=0, description="peak of the cosine schedule")
    beta: float = Field(2.5, gt=0, description="strength of the preference: 2.5 with length_norm, 0.1 without")
    length_norm: bool = Field(True, description="divide a response's log-probability by the model's own token count")
    variant: Literal["fpo", "ipo"] = Field("fpo", description="log-sigmoid loss, or IPO's squared one")


class InfiFPO(Preference):
    """InfiFPO (arXiv 2505.13878): preference optimisation against the teachers' fused sequence probabilities."""

    method: Literal["infifpo"] = "infifpo"
    rule: Literal["max_margin", "mean", "confidence"] = Field("max_margin", description="how teachers are fused")
    clip: bool = Field(True, description="bound each teacher by the initial model: above on rejected, below on chosen")
    margin_from: Literal["policy", "initial"] = Field(
        "policy", description="max_margin measures from the current policy, or from the model the stage starts from"
    )


class DPO(Preference):
    """DPO (arXiv 2305.18290), length-normalised unless told otherwise: the reference is the stage's first model."""

    method: Literal["dpo"] = "dpo"


STAGES: dict[str, type[Stage]] = {
    "sft": SFT,
    "infifusion": InfiFusion,
    "infigfusion": InfiGFusion,
    "bytekd": ByteKD,
    "infifpo": InfiFPO,
    "dpo": DPO,
}


class Benchmark(Section):
    """Held-out items: JSONL or Parquet rows of `prompt`, `response` and, where wanted, `skill`."""

    path: Place = Field(min_length=1, description="rows of prompt, response and, optionally, skill")
    limit: int | None = Field(None, ge=1, description="use only the first items")
    score: Literal["exact", "number"] = Field(
        "exact", description="exact: the same text, ends stripped; number: the last number in the answer is the same"
    )
    max_new_tokens: int = Field(64, ge=1, description="longest answer generated")
    batch_size: int = Field(64, ge=1, description="items generated at a time")
    teachers: bool = Field(True, description="evaluate the teachers too, not only the pivot and the stages")
    generate: bool = Field(True, description="exact-match accuracy by greedy generation, besides bits per byte")


class Cluster(Section):
    """The Ray cluster; by default the one that RAY_ADDRESS names, else one embedded in this process."""

    address: str | None = Field(None, description="address of a running cluster, or 'local' for an embedded one")


RESERVED_NAMES = ("model", "checkpoints", "initial", "pivot")
"""Names that stages and tables use themselves."""


def _absolute(path: str, new: bool = False) -> str:
    """A local path made absolute; hub ids and URLs (and, unless it is new, what does not exist) as they are."""
    return str(Path(path).resolve()) if "://" not in path and (new or Path(path).exists()) else path


def _named(value: Any, key: str) -> Any:
    return {key: value} if isinstance(value, str) else value


def _stage_tag(value: Any) -> str:
    method = value.get("method") if isinstance(value, dict) else getattr(value, "method", None)
    return method if isinstance(method, str) else ""


def _as_stage(value: Any) -> Any:
    value = _named(value, "method")
    if isinstance(value, dict) and "method" not in value:
        raise ValueError(f"method is missing; there are: {', '.join(STAGES)}")
    if _stage_tag(value) not in STAGES:
        method = value["method"] if isinstance(value, dict) else value
        raise ValueError(f"unknown method {method!r}; there are: {', '.join(STAGES)}")
    return value


AnyStage = Annotated[
    Annotated[SFT, Tag("sft")]
    | Annotated[InfiFusion, Tag("infifusion")]
    | Annotated[InfiGFusion, Tag("infigfusion")]
    | Annotated[ByteKD, Tag("bytekd")]
    | Annotated[InfiFPO, Tag("infifpo")]
    | Annotated[DPO, Tag("dpo")],
    Discriminator(_stage_tag),
    BeforeValidator(_as_stage),
]


class Config(Section):
    """One run, from data to fused model."""

    student: Annotated[Student, BeforeValidator(lambda value: _named(value, "model"))]
    teachers: tuple[Annotated[Teacher, BeforeValidator(lambda value: _named(value, "model"))], ...] = ()
    data: Annotated[Data, BeforeValidator(lambda value: _named(value, "path"))]
    preferences: Annotated[Data | None, BeforeValidator(lambda value: _named(value, "path"))] = Field(
        None, description="rows of prompt, chosen and rejected, for the stages that learn from preferences"
    )
    stages: tuple[AnyStage, ...]
    output: str = Field(min_length=1, description="run folder, on a file system that every node sees")
    signals: Signals = Signals()
    evaluate: Annotated[Benchmark, BeforeValidator(lambda value: _named(value, "path"))] | None = None
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
        teachers = [_named(item, "model") for item in value]
        named = [
            {**item, "name": item.get("name") or str(item["model"]).rstrip("/").split("/")[-1]}
            if isinstance(item, dict) and "model" in item
            else item
            for item in teachers
        ]
        names = [item["name"] for item in named if isinstance(item, dict) and "name" in item]
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
        return named

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        if not self.stages:
            raise ValueError("stages is empty; name at least one, for example stages: [infifusion]")
        for index, stage in enumerate(self.stages):
            where = f"stages.{index} ({stage.method})"
            section = "preferences" if isinstance(stage, Preference) else "data"
            data = self.preferences if section == "preferences" else self.data
            if data is None:
                raise ValueError(f"{where} needs `preferences`: rows of prompt, chosen and rejected")
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
            if isinstance(stage, Distillation | ByteKD | InfiFPO) and not self.teachers:
                raise ValueError(f"{where} needs at least one teacher")
            if isinstance(stage, Distillation) and stage.k is not None and stage.k > self.signals.k:
                raise ValueError(f"{where}: k {stage.k} is more than signals.k {self.signals.k}")
        return self

    def absolute(self) -> Config:
        """The same configuration with every local path absolute, for processes that run in other folders."""

        def model(section: Any) -> Any:
            paths = {"model": _absolute(section.model), "tokenizer": section.tokenizer and _absolute(section.tokenizer)}
            if section.trust_remote_code is not None:
                paths["trust_remote_code"] = paths["model"]
            return section.model_copy(update=paths)

        def file(section: Any) -> Any:
            return section and section.model_copy(update={"path": _absolute(section.path)})

        signals = self.signals.model_copy(update={"store": self.signals.store and _absolute(self.signals.store, True)})
        return self.model_copy(
            update={
                "student": model(self.student),
                "teachers": tuple(model(teacher) for teacher in self.teachers),
                "data": file(self.data),
                "preferences": file(self.preferences),
                "evaluate": file(self.evaluate),
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


class _UniqueKeys(yaml.SafeLoader):
    """Plain YAML in which a key that stands twice in a section is an error; YAML itself silently keeps the last."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.MarkedYAMLError(
                        problem=f"the key {key.value!r} stands twice", problem_mark=key.start_mark
                    )
                seen.add(key.value)
        return node


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read and check a run's YAML file.

    Args:
        path: the YAML file. Relative paths in it are relative to the folder the command runs in.
        overrides: `a.b=value` strings; a list is entered by number (`teachers.0.dtype=float32`).

    Raises:
        ConfigError: the file cannot be read, is not YAML, or breaks the schema; every fault is named.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the configuration {path}: {error}") from error
    try:
        tree = yaml.load(text, _UniqueKeys)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold keys and values (student, data, stages, output ...), not {tree!r:.80}")
    for override in overrides:
        apply_override(tree, override)
    return parse_config(tree, str(path))


def parse_config(tree: dict[str, Any], where: str = "configuration") -> Config:
    """Check a configuration that is already a tree of dicts and lists; see `load_config`."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_explain(error, where)) from None


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Set one `a.b=value` in the tree, in place; `value` is read as YAML.

    Raises:
        ConfigError: no `=`, or the path runs through something that is not a mapping or a list.
    """
    key, separator, text = override.partition("=")
    parts = key.split(".")
    if not separator or not all(parts):
        raise ConfigError(f"override {override!r} is not of the form a.b=value")
    try:
        value = yaml.load(text, _UniqueKeys)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: the value is not valid YAML: {error}") from error
    node: Any = tree
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        if isinstance(node, list):
            if not part.isdecimal() or int(part) >= len(node):
                raise ConfigError(
                    f"override {override!r}: {part!r} is not one of the list's entries 0..{len(node) - 1}"
                )
            index: Any = int(part)
        elif isinstance(node, dict):
            index = part
        else:
            raise ConfigError(f"override {override!r}: {'.'.join(parts[:depth])} is not a section")
        if last:
            node[index] = value
            return
        child = node[index] if isinstance(node, list) else node.get(index)
        if child is None:
            child = {}
        elif isinstance(child, str):
            # `student: some/model` is short for a section: the override opens it.
            child = {_SHORTHAND.get(parts[0], "model"): child}
        node[index] = child
        node = child


_SHORTHAND = {"data": "path", "preferences": "path", "evaluate": "path", "stages": "method"}


def config_json(config: Config) -> str:
    """The resolved configuration as JSON, every default filled in. It holds no secrets: there is no key for one."""
    return json.dumps(config.model_dump(mode="json"), indent=2) + "\n"


def _explain(error: ValidationError, where: str) -> str:
    """One line per fault: the key, what is wrong, and the value."""
    lines = []
    for fault in error.errors():
        # A stage's tag appears in pydantic's path but not in the file: `stages.0.sft.steps`.
        path = [str(part) for part in fault["loc"]]
        if len(path) > 2 and path[0] == "stages" and path[2] in STAGES:
            del path[2]
        message = fault["msg"].removeprefix("Value error, ")
        if fault["type"] == "extra_forbidden":
            message = "there is no such key"
        elif fault["type"] == "missing":
            message = "is missing"
        elif fault["type"] != "value_error":
            message += f" (is {fault['input']!r:.80})"
        lines.append(f"  {'.'.join(path) or 'the file'}: {message}")
    return f"{where} has {len(lines)} fault{'s' * (len(lines) > 1)}:\n" + "\n".join(lines)
