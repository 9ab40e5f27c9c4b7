"""One cell of the comparison: train by a run's own code, evaluate, and give one row of results.

A cell is a whole run without its shell: the same configuration, units, prepare tasks, teachers on Serve, signal store,
training loop and evaluation. Only the Ray Train group around the single worker is left out, because starting one costs
as much as such a small training: `train` runs in the Ray task of the cell itself. All cells share one signal store.
"""

from __future__ import annotations

import hashlib
import json
import math
import pickle
import re
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import ray
from rich.console import Console
from safetensors import safe_open

from rayfuse.compare.design import Cell, Plan
from rayfuse.compare.gradients import measure_gradients
from rayfuse.compare.rows import heldout_items, rows_name, training_rows, write_once
from rayfuse.compare.texts import pairs_for, read_texts, responses_for, texts_file
from rayfuse.config import STAGES, Benchmark, Config, Teacher, parse_config
from rayfuse.data.sample import Sample
from rayfuse.evaluation.models import measure_items
from rayfuse.files import folder_whole, write_whole
from rayfuse.metrics.records import read_metrics
from rayfuse.quickstart.facts import FIELDS
from rayfuse.quickstart.world import World
from rayfuse.run.pairwise import train_pairwise
from rayfuse.run.sources import UnitSource, load_source, source_name
from rayfuse.run.stage_job import stage_job
from rayfuse.student.job import BLOCK, StageJob
from rayfuse.student.loop import train
from rayfuse.teachers.identity import identify, live
from rayfuse.teachers.serving import applications
from rayfuse.teachers.transformers import TransformersTeacher


@dataclass(frozen=True)
class Bench:
    """What all cells share: the plan, its worlds by their keys, and the folder with data, models and signals."""

    plan: Plan
    worlds: Mapping[str, World]
    work: Path

    def world(self, cell: Cell) -> World:
        """The world of a cell."""
        return self.worlds[self.plan.conditions[cell.condition].world]


@ray.remote
def run_cell(bench: Bench, cell: Cell) -> dict[str, Any]:
    """Train and evaluate; returns the cell's row of results."""
    begun = time.monotonic()
    folder = cell_folder(bench, cell)
    shutil.rmtree(folder, ignore_errors=True)
    if cell.purpose == "gradient":
        gradients = measure_gradients(config_of(bench, cell, folder / "run"), Console(quiet=True))
        unscored = {f"right_{field}": "" for field in FIELDS} | {"bits_per_byte": math.nan}
        return {**asdict(cell), "cell": cell.name, **gradients, **unscored, "cell_seconds": time.monotonic() - begun}
    measured: dict[str, Any] = {}
    model = _untrained(bench, cell)
    if model is None:
        config = config_of(bench, cell, folder / "run")
        trained = train_cell(bench, cell, config)
        measured = trained.measured
        model = folder / "model"  # methods that go on from this one find it there
        trained.model.rename(model)
        shutil.rmtree(folder / "run")
    items = heldout_items(bench.plan, bench.plan.conditions[cell.condition].world, cell.split)
    scored = scores(Teacher(model=str(model), name="student", dtype="float32"), items, bench.plan)
    row = {**asdict(cell), "cell": cell.name, **measured, **scored}
    return {**row, "cell_seconds": round(time.monotonic() - begun, 2)}


def _untrained(bench: Bench, cell: Cell) -> Path | None:
    model = bench.plan.methods[cell.method].model
    world = bench.world(cell)
    return None if model is None else {**world.teachers, "pivot": world.pivot}[model]


def cell_folder(bench: Bench, cell: Cell) -> Path:
    """Where a cell leaves its model."""
    return bench.work / "cells" / re.sub(r"[^A-Za-z0-9.-]+", "_", cell.name)


def config_of(bench: Bench, cell: Cell, output: Path) -> Config:
    """The cell as a run's configuration."""
    plan, method, world = bench.plan, bench.plan.methods[cell.method], bench.world(cell)
    sizes = plan.sizes
    steps = round((sizes.cost_steps if cell.purpose == "cost" else sizes.steps) * method.share) // len(method.stages)
    common = {
        "steps": steps,
        "batch_size": sizes.batch_size,
        "learning_rate": sizes.learning_rate,
        "warmup": sizes.warmup,
        "save_every": steps + 1,
    }
    stages = [
        {**common, **{key: value for key, value in stage.items() if key != "tuned_as"}, **changes}
        for stage, changes in zip(method.stages, json.loads(cell.settings), strict=True)
    ]
    tree: dict[str, Any] = {
        "student": {"model": str(_start_of(bench, cell)), "prefetch": 3, "max_failures": 0},
        "teachers": [{"model": str(world.teachers[t]), "dtype": "float32"} for t in method.teachers],
        "data": {"path": str(_data(bench, cell, "responses")), "max_length": 128, "unit_size": sizes.unit_size},
        "stages": stages,
        "signals": {"k": method.k, "store": None if cell.purpose == "cost" else str(bench.work / "signals")},
        "output": str(output),
        "seed": cell.seed,
    }
    if any(STAGES[stage["method"]].sides for stage in stages):
        tree["preferences"] = {**tree["data"], "path": str(_data(bench, cell, "preferences"))}
    return parse_config(tree, cell.name).absolute()


def _data(bench: Bench, cell: Cell, kind: str) -> Path:
    """The file that a cell learns from, made where no cell before has: "responses" or "preferences"."""
    plan, method = bench.plan, bench.plan.methods[cell.method]
    if cell.purpose == "gradient":
        method = method.model_copy(update={"learns_from": "truth"})
    source = method.learns_from if kind == "responses" else method.pairs_from
    name = f"{rows_name(plan, cell.condition, cell.seed)}-{method.half}-{kind}-{re.sub('[^a-z]+', '-', source)}"
    path = bench.work / "data" / f"{name}.jsonl"
    if path.exists():
        return path
    everything = training_rows(plan, cell.condition, cell.seed)
    rows = training_rows(plan, cell.condition, cell.seed, method.half)
    condition = plan.conditions[cell.condition]
    texts = read_texts(texts_file(plan, bench.work, condition.world)) if needs_texts(plan, cell) else {}
    if kind == "responses":
        return write_once(responses_for(method, rows, everything, texts, cell.seed), path)
    return write_once(pairs_for(method, condition, rows, everything, texts, cell.seed), path)


def needs_texts(plan: Plan, cell: Cell) -> bool:
    """Whether a cell learns from what the models of its world answer."""
    method = plan.methods[cell.method]
    answers = method.learns_from not in ("labels", "truth")
    return answers or any(STAGES[stage["method"]].sides for stage in method.stages)


def _start_of(bench: Bench, cell: Cell) -> Path:
    """The model that the cell starts from: the world's pivot, or what another cell made of it."""
    start = bench.plan.start(cell)
    return bench.world(cell).pivot if start is None else cell_folder(bench, start) / "model"


@dataclass(frozen=True)
class Trained:
    """A trained model and what it took."""

    model: Path
    measured: dict[str, Any]


def train_cell(bench: Bench, cell: Cell, config: Config) -> Trained:
    """All stages, one after the other, in this process."""
    needed = any(stage.uses_teachers for stage in config.stages)
    teachers = identify(config.teachers if needed else (), config.signals.k)
    sources = {source_name(config, stage): _source(config, stage.sides) for stage in config.stages}
    kept = None if cell.purpose == "cost" else bench.work / "students"
    wall, cpu = time.monotonic(), time.process_time()
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak of memory starts again
    for index in range(len(config.stages)):
        job = stage_job(config, index, teachers, sources)
        applications.deploy(live(job.spec.teachers), config.signals.k)
        if job.stage.pairwise is not None:
            train_pairwise(job, job.stage.pairwise, partial(_train_once, kept) if kept else train_here, at_once=1)
        else:
            train_here(job)
    measured = {
        "train_seconds": round(time.monotonic() - wall, 3),
        "train_cpu_seconds": round(time.process_time() - cpu, 3),
        "peak_mib": _peak_mib(),
        **_teacher_use(config),
        **(_store_size(Path(config.store_url)) if config.signals.store is None else {}),
    }
    return Trained(job.folder / "model", measured)


def train_here(job: StageJob) -> Path:
    """Train a stage as the only worker, in this process."""
    train(job, rank=0, world=1)
    return job.folder / "model"


def _train_once(kept: Path, job: StageJob) -> Path:
    """One student of a pairwise stage; the stage's other merges find it there."""
    stage = job.stage.model_dump_json(exclude={"merge"})
    made_of = [stage, job.spec.teachers[0].fingerprint, job.spec.k, job.config.data.label, job.config.seed, job.start]
    model = kept / hashlib.sha256(json.dumps(made_of).encode()).hexdigest() / "model"
    if not model.exists():
        trained = train_here(job)
        with folder_whole(model, replace=False) as copy:  # another cell may be faster
            shutil.copytree(trained, copy, dirs_exist_ok=True)
    return model


def _source(config: Config, sides: tuple[str, ...]) -> UnitSource:
    """A data set cut into units: read once, then kept beside the data, whatever method learns from it."""
    data = config.preferences if sides else config.data
    assert data is not None
    kept = Path(data.label).with_suffix(".triples.cut" if len(sides) > 2 else ".cut")
    if not kept.exists():
        source = load_source(config, sides, Console(quiet=True))
        units = [unit for block in ray.get(list(source.blocks)) for unit in block]
        write_whole(kept, pickle.dumps((units, source.sizes, source.content, source.counts)))
    units, sizes, content, counts = pickle.loads(kept.read_bytes())
    return UnitSource([ray.put(units[i : i + BLOCK]) for i in range(0, len(units), BLOCK)], sizes, content, counts)


def _teacher_use(config: Config) -> dict[str, float]:
    """What the steps' records say: tokens, seconds of preparation, teacher answers used."""
    records = read_metrics(Path(config.output) / "metrics.jsonl")

    def total(*kinds: str) -> float:
        return sum(record[name] for record in records for name in record if name.split("/")[0] in kinds)

    batches = {stage.method: stage.batch_size * max(1, len(stage.sides)) for stage in config.stages}
    return {
        "steps": len(records),
        "texts": sum(batches[record["stage"].split("/")[0].split("-", 1)[1]] for record in records),
        "tokens": sum(record["tokens"] for record in records),
        "wait_seconds": round(sum(record["wait_share"] * record["seconds"] for record in records), 3),
        "step_seconds": round(sum(record["seconds"] for record in records), 3),
        "forwarded": total("forwarded"),
        "answers_used": total("stored", "forwarded"),
    }


def _store_size(store: Path) -> dict[str, int]:
    """Bytes of all signals in a store, and the teachers' rows (tokens and ends of turns) that they tell of."""
    sizes, rows = 0, 0
    for path in store.rglob("*.safetensors"):
        sizes += path.stat().st_size
        with safe_open(path, "np") as signals:
            rows += signals.get_slice("lse").get_shape()[0]
    return {"signal_bytes": sizes, "signal_rows": rows}


def scores(model: Teacher, items: list[Sample], plan: Plan) -> dict[str, Any]:
    """Held-out bits per byte and, by field, which items are right: a string of 0 and 1 per field."""
    benchmark = Benchmark(path="-", max_new_tokens=plan.sizes.max_new_tokens, batch_size=200)
    begun = time.process_time()
    bits, right = measure_items(TransformersTeacher(model, k=2), items, benchmark)
    size = np.array([len(item.response.encode()) for item in items])
    marks = {
        f"right_{skill}": "".join(str(int(ok)) for ok, item in zip(right, items, strict=True) if item.skill == skill)
        for skill in FIELDS
    }
    spent = round(time.process_time() - begun, 3)
    return {**marks, "bits_per_byte": float(bits.sum() / size.sum()), "evaluate_cpu_seconds": spent}


def _peak_mib() -> float:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return round(next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024, 1)
