"""A run from end to end: data -> units -> each stage in turn -> evaluation -> model, card and report.

OUTPUT/config.json            the resolved configuration, written before anything starts
OUTPUT/metrics.jsonl          one record per optimiser step
OUTPUT/signals/               the teachers' answers (unless signals.store says otherwise)
OUTPUT/stages/01-sft/         checkpoints and the stage's model
OUTPUT/model/                 the fused model, complete, in Hugging Face format
OUTPUT/results.json           data counts, evaluation and times
OUTPUT/report.html
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray
from rich.console import Console

from rayfuse import resources
from rayfuse.card import write_card
from rayfuse.config import Config, Model, Teacher, config_json
from rayfuse.data import Sample
from rayfuse.errors import CheckpointError
from rayfuse.evaluate import evaluate_model, read_items
from rayfuse.metrics import LiveLine
from rayfuse.models import fingerprint
from rayfuse.prepare import PrepareSpec
from rayfuse.report import write_report
from rayfuse.stages import METHODS, ranks
from rayfuse.student.group import train_group
from rayfuse.student.worker import BLOCK, StageJob
from rayfuse.teachers import deployment
from rayfuse.units import load_units


def fuse(config: Config, *, resume: bool = False, console: Console | None = None) -> Path:
    """Run all stages and return the folder of the fused model.

    Args:
        config: the run.
        resume: go on with what `output` already holds; without it, `output` must be new.
        console: where progress goes.

    Raises:
        RayfuseError: anything that cannot go on; whatever was done stays, and `resume` goes on from there.
    """
    console = console or Console()
    config = config.absolute()
    _open_run_folder(config, resume)
    timed = Stopwatch(Path(config.output) / "times.json")
    with timed("start Ray"):
        resources.connect(config)
    with timed("read data"):
        units, counts = load_units(config)
        console.print(
            f"{counts.rows:,} rows, {counts.samples:,} samples in {len(units):,} units"
            + (f"; {counts.bad_rows} malformed rows skipped" if counts.bad_rows else "")
            + (f"; {counts.too_long} too long, dropped" if counts.too_long else "")
            + (f"; {counts.unreadable} unreadable for a model, dropped" if counts.unreadable else "")
            + (f"; {counts.cut} prompts cut" if counts.cut else "")
        )
    with timed("identify teachers"):
        fingerprints = _fingerprints(config)

    blocks = [ray.put(units[start : start + BLOCK]) for start in range(0, len(units), BLOCK)]
    for index in range(len(config.stages)):
        name = config.stage_folder(index).name
        if (config.stage_folder(index) / "model").exists():
            console.print(f"{name} is done already")
            continue
        with timed(name):
            job = _stage_job(config, index, fingerprints, units, blocks)
            if job.spec.teachers:
                deployment.deploy(job.spec.teachers, config.signals.k)
            with LiveLine(Path(config.output) / "metrics.jsonl", console):
                train_group(job)
    results: dict[str, Any] = {"data": asdict(counts), "models": [], "times": timed.seconds}
    if config.evaluate is not None:
        with timed("evaluate"):
            results["models"] = evaluate_all(config)
    return _finish(config, results)


def _open_run_folder(config: Config, resume: bool) -> None:
    """Create the run folder with config.json, or make sure that the one there is of this configuration.

    Raises:
        CheckpointError: there is a run and `resume` was not asked for, or it is another run's.
    """
    folder = Path(config.output)
    there = folder / "config.json"
    text = config_json(config)
    if there.exists():
        if not resume:
            raise CheckpointError(f"{folder} already holds a run: go on with --resume, or use another `output`")
        before, now = json.loads(there.read_text(encoding="utf-8")), json.loads(text)
        changed = sorted(key for key in now if before.get(key) != now[key] and key not in ("evaluate", "cluster"))
        if changed:
            raise CheckpointError(
                f"{folder} holds a run with another configuration ({', '.join(changed)} changed): use another `output`"
            )
    folder.mkdir(parents=True, exist_ok=True)
    there.write_text(text, encoding="utf-8")


def _fingerprints(config: Config) -> dict[str, str]:
    used = any(METHODS[stage.method].uses_teachers for stage in config.stages)
    if not used:
        return {}
    with ThreadPoolExecutor(4) as pool:
        prints = pool.map(lambda teacher: fingerprint(teacher, config.signals.k), config.teachers)
        return {teacher.name: print_ for teacher, print_ in zip(config.teachers, prints, strict=True)}


def _stage_job(
    config: Config,
    index: int,
    fingerprints: dict[str, str],
    units: Sequence[Sequence[Sample]],
    blocks: Sequence[Any],
) -> StageJob:
    stage = config.stages[index]
    teachers = config.teachers if METHODS[stage.method].uses_teachers else ()
    previous = index > 0 and stage.start_from == "previous"
    spec = PrepareSpec(
        student=config.student,
        teachers=tuple((teacher, fingerprints[teacher.name]) for teacher in teachers),
        store=config.store_url,
        k=ranks(config, stage),
        alignment=getattr(stage, "alignment", "bytes"),
        max_length=config.data.max_length,
        graphs=METHODS[stage.method].uses_graphs,
    )
    content = hashlib.sha256()
    for unit in units:
        content.update(json.dumps([sample.key for sample in unit]).encode())
    identity = {
        "stage": stage.model_dump(mode="json", exclude={"save_every", "keep"}),
        "student": config.student.model_dump(mode="json", exclude={"prefetch", "max_failures", "cpus"}),
        "teachers": [(fp, teacher.weight) for teacher, fp in spec.teachers],
        "data": content.hexdigest(),
        "k": spec.k,
        "seed": config.seed,
        "index": index,
    }
    return StageJob(
        config=config,
        index=index,
        start=str((config.stage_folder(index - 1) / "model").resolve()) if previous else config.student.model,
        identity=hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest(),
        spec=spec,
        blocks=blocks,
        units=len(units),
    )


def evaluate_all(config: Config) -> list[dict[str, Any]]:
    """Evaluate teachers, pivot and every stage's model on the same items, in parallel tasks."""
    benchmark = config.evaluate
    assert benchmark is not None
    items = read_items(benchmark)
    device = {"cpus": config.student.cpus, "gpus": config.student.gpus}
    models = [(teacher, "teacher") for teacher in config.teachers if benchmark.teachers]
    pivot = config.student.model_dump(include=set(Model.model_fields))
    models.append((Teacher.model_validate({**pivot, **device, "name": "pivot"}), "pivot"))
    methods = [stage.method for stage in config.stages]
    for index, method in enumerate(methods):
        name = method if methods.count(method) == 1 else config.stage_folder(index).name
        path = str(config.stage_folder(index) / "model")
        stage = {"model": path, "name": name, "dtype": config.student.dtype, **device}
        models.append((Teacher.model_validate(stage), "stage"))
    shared = ray.put(items)
    tasks = [
        evaluate_model.options(**resources.evaluate_task(model.gpus)).remote(model, role, shared, benchmark)
        for model, role in models
    ]
    done: list[dict[str, Any]] = ray.get(tasks)
    return done


def _finish(config: Config, results: dict[str, Any]) -> Path:
    """The fused model's folder with its card, results.json and the report."""
    output = Path(config.output)
    half = output / ".model.half"
    shutil.rmtree(half, ignore_errors=True)
    shutil.copytree(config.stage_folder(len(config.stages) - 1) / "model", half)
    (output / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    write_card(half / "README.md", config, results)
    shutil.rmtree(output / "model", ignore_errors=True)
    half.rename(output / "model")
    write_report(output)
    return output / "model"


class Stopwatch:
    """Seconds of each part of a run, kept in `times.json`, so that those of a resumed run add up."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seconds: dict[str, float] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Measure what runs inside."""
        begun = time.monotonic()
        try:
            yield
        finally:
            self.seconds[part] = round(self.seconds.get(part, 0.0) + time.monotonic() - begun, 2)
            self.path.write_text(json.dumps(self.seconds, indent=2) + "\n", encoding="utf-8")
