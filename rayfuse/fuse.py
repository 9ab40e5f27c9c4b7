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
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import ray
from rich.console import Console

from rayfuse import resources
from rayfuse.card import public_name, write_card
from rayfuse.check import check_environments, check_evaluation, check_machine, check_serving
from rayfuse.config import Config, Data, Model, Teacher, TeacherStage, config_json
from rayfuse.data import DataCounts
from rayfuse.errors import CheckpointError, ConfigError
from rayfuse.evaluate import evaluate_model, read_items
from rayfuse.filling import fill
from rayfuse.http.server import served
from rayfuse.metrics import LiveLine
from rayfuse.models import fingerprint
from rayfuse.pairwise import train_pairwise
from rayfuse.prepare import INITIAL, PrepareSpec
from rayfuse.report import write_report
from rayfuse.stages import METHODS, ranks
from rayfuse.store import SignalStore
from rayfuse.student.group import train_group
from rayfuse.student.worker import BLOCK, StageJob
from rayfuse.teachers import deployment
from rayfuse.teachers.parity import check_parity
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
    _refuse_faults(config)
    _open_run_folder(config, resume)
    timed = Stopwatch(Path(config.output) / "times.json")
    with timed("start Ray"):
        embedded = resources.connect(config)
    short = resources.shortage(config)
    if short:
        console.print(f"this run asks for {short}: it waits where it has no room, until nodes join or others end")
    with timed("read data"):
        sources = {sides: load_source(config, sides, console) for sides in _needed(config)}
    with timed("identify teachers"):
        fingerprints = _fingerprints(config)
        _describe(config, fingerprints)
    teachers = [(teacher, fingerprints[teacher.name]) for teacher in config.teachers if fingerprints]
    if teachers:
        with timed("check teachers"):
            check_parity(teachers, config.signals.k, SignalStore(config.store_url), console, [config.student])
    with served(teachers, config.signals.k, config.serving.http, console):
        _train_stages(config, fingerprints, sources, timed, console)
    counts = {KINDS[len(sides)][0]: asdict(source.counts) for sides, source in sources.items()}
    results: dict[str, Any] = {**counts, "models": [], "times": timed.seconds}
    if config.evaluate is not None:
        with timed("evaluate"):
            if embedded:  # nobody else uses these teachers: their memory is free for the evaluation
                deployment.delete(teachers)
            results["models"] = evaluate_all(config)
    return _finish(config, results)


def _train_stages(
    config: Config,
    fingerprints: dict[str, str],
    sources: Mapping[tuple[str, ...], Source],
    timed: Stopwatch,
    console: Console,
) -> None:
    """Every stage that is not done yet, each from the model before it."""
    for index in range(len(config.stages)):
        name = config.stage_folder(index).name
        if (config.stage_folder(index) / "model").exists():
            console.print(f"{name} is done already")
            continue
        with timed(name):
            job = _stage_job(config, index, fingerprints, sources)
            first = config.serving.mode == "first"
            if first:
                fill(job, console)
            with (
                deployment.borrowed(() if first else job.spec.teachers, config.signals.k),
                LiveLine(Path(config.output) / "metrics.jsonl", console),
            ):
                if isinstance(job.stage, TeacherStage) and job.stage.merge is not None:
                    train_pairwise(job, job.stage.merge)
                else:
                    train_group(job)


def _refuse_faults(config: Config) -> None:
    """The checks whose faults would otherwise show only at the end of a long run, or never.

    Raises:
        ConfigError: naming them.
    """
    faults = [
        finding
        for check in (check_machine, check_environments, check_serving, check_evaluation)
        for finding in check(config)
        if finding.fault
    ]
    if faults:
        raise ConfigError("; ".join(f"{fault.where}: {fault.text}" for fault in faults))


def _open_run_folder(config: Config, resume: bool) -> None:
    """Create the run folder with config.json, or make sure that the one there is of this configuration.

    Raises:
        CheckpointError: there is a run and `resume` was not asked for, or it is another run's.
    """
    folder = Path(config.output)
    there = folder / "config.json"
    text = config_json(config)
    if there.exists() and (folder / "stages").exists():  # a run that trained nothing has nothing to lose
        if not resume:
            raise CheckpointError(f"{folder} already holds a run: go on with --resume, or use another `output`")
        before, now = json.loads(there.read_text(encoding="utf-8")), json.loads(text)
        changed = sorted(key for key in now if before.get(key) != now[key] and key not in NOT_THE_RESULT)
        if changed:
            raise CheckpointError(
                f"{folder} holds a run with another configuration ({', '.join(changed)} changed): use another `output`"
            )
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(there, text)


KINDS = {0: ("data", "samples"), 2: ("preferences", "pairs"), 3: ("triples", "triples")}
"""What the data of a stage is called in results.json, and what it holds, by the number of the stage's sides."""
NOT_THE_RESULT = ("evaluate", "cluster", "prefer", "serving")
"""Sections that a resumed run may change."""


@dataclass(frozen=True)
class Source:
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


def _needed(config: Config) -> list[tuple[str, ...]]:
    """What the stages read: `data` (no sides), the pairs or the triples of `preferences`, in this order."""
    return sorted({stage.sides for stage in config.stages}, key=len)


def load_source(config: Config, sides: tuple[str, ...], console: Console) -> Source:
    """Read `data` or `preferences`, and say what became of the rows."""
    units, counts = load_units(config, sides)
    console.print(
        f"{counts.rows:,} rows, {counts.samples:,} {KINDS[len(sides)][1]} in {len(units.sizes):,} units"
        + (f"; {counts.bad_rows} malformed rows skipped" if counts.bad_rows else "")
        + (f"; {counts.too_long} too long, dropped" if counts.too_long else "")
        + (f"; {counts.unreadable} unreadable for a model, dropped" if counts.unreadable else "")
        + (f"; {counts.cut} prompts cut" if counts.cut else "")
    )
    keys = [[sample.key for sample in unit] for unit in units.samples]
    content = hashlib.sha256(json.dumps(keys).encode()).hexdigest()
    blocks = [ray.put(units.samples[start : start + BLOCK]) for start in range(0, len(keys), BLOCK)]
    return Source(blocks, units.sizes, content, counts)


def _fingerprints(config: Config) -> dict[str, str]:
    """Each teacher's fingerprint, by its name; none where no stage asks a teacher."""
    if not any(stage.uses_teachers for stage in config.stages):
        return {}
    with ThreadPoolExecutor(4) as pool:
        prints = pool.map(lambda teacher: fingerprint(teacher, config.signals.k), config.teachers)
        return {teacher.name: print_ for teacher, print_ in zip(config.teachers, prints, strict=True)}


def _describe(config: Config, fingerprints: Mapping[str, str]) -> None:
    """Leave word in the store whose signals a fingerprint stands for, so that a `store` teacher can name them."""
    store = SignalStore(config.store_url)
    for teacher in config.teachers:
        if teacher.name in fingerprints and teacher.stored is None:
            about = {"name": teacher.name, "model": public_name(teacher.model), "backend": teacher.backend}
            store.describe(fingerprints[teacher.name], {**about, "k": config.signals.k})


def _stage_job(
    config: Config, index: int, fingerprints: dict[str, str], sources: Mapping[tuple[str, ...], Source]
) -> StageJob:
    stage = config.stages[index]
    source = sources[stage.sides]
    previous = index > 0 and stage.start_from == "previous"
    start = str(config.stage_folder(index - 1) / "model") if previous else config.student.model
    teachers = [(teacher, fingerprints[teacher.name]) for teacher in config.teachers if stage.uses_teachers]
    if stage.uses_preferences:
        initial = as_teacher(config, INITIAL, start if previous else None)
        teachers.append((initial, fingerprint(initial, config.signals.k)))
    data = cast(Data, config.preferences) if stage.uses_preferences else config.data
    spec = PrepareSpec(
        student=config.student,
        teachers=tuple(teachers),
        store=config.store_url,
        k=ranks(config, stage),
        alignment=getattr(stage, "alignment", "bytes"),
        max_length=data.max_length,
        targets=METHODS[stage.method].targets,
        stage=stage,
        on_missing=config.serving.on_missing,
    )
    identity = {
        "stage": stage.model_dump(mode="json", exclude={"save_every": True, "keep": True, "merge": {"parallel"}}),
        "student": config.student.model_dump(mode="json", exclude={"prefetch", "max_failures", "cpus"}),
        "teachers": [(fp, teacher.weight) for teacher, fp in spec.teachers],
        "data": source.content,
        "k": spec.k,
        "seed": config.seed,
        "index": index,
    }
    return StageJob(
        config=config,
        index=index,
        start=start,
        identity=hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest(),
        spec=spec,
        blocks=source.blocks,
        sizes=source.sizes,
    )


def as_teacher(config: Config, name: str, folder: str | None = None) -> Teacher:
    """The student's model, or the one that a stage left in `folder`, as something that can be scored."""
    student = config.student
    model = {"model": folder, "dtype": student.dtype} if folder else student.model_dump(include=set(Model.model_fields))
    return Teacher.model_validate({**model, "name": name, "cpus": student.cpus, "gpus": student.gpus})


def evaluate_all(config: Config) -> list[dict[str, Any]]:
    """Evaluate teachers, pivot and every stage's model on the same items, in parallel tasks."""
    benchmark = config.evaluate
    assert benchmark is not None
    items = read_items(benchmark)
    models = [(teacher, "teacher") for teacher in config.teachers if benchmark.teachers and teacher.stored is None]
    models.append((as_teacher(config, "pivot"), "pivot"))
    methods = [stage.method for stage in config.stages]
    for index, method in enumerate(methods):
        name = method if methods.count(method) == 1 else config.stage_folder(index).name
        models.append((as_teacher(config, name, str(config.stage_folder(index) / "model")), "stage"))
    shared = ray.put(items)
    tasks = [
        evaluate_model.options(**resources.evaluate_task(model)).remote(model, role, shared, benchmark)
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


def write_whole(path: Path, text: str) -> None:
    """Write a small file so that it is there completely or not at all."""
    beside = path.with_name(f".{path.name}.half")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


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
            write_whole(self.path, json.dumps(self.seconds, indent=2) + "\n")
