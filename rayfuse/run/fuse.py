"""A run from end to end: data -> units -> each stage in turn -> evaluation -> model, card and report.

OUTPUT/config.json            the resolved configuration, written before anything starts
OUTPUT/metrics.jsonl          one record per optimiser step
OUTPUT/consensus/             who is right, and the responses to learn from (with a `consensus` section)
OUTPUT/signals/               the teachers' answers (unless signals.store says otherwise)
OUTPUT/stages/01-sft/         checkpoints, and the stage's model in float32
OUTPUT/model/                 the fused model, complete, in Hugging Face format
OUTPUT/results.json           data counts, evaluation and times
OUTPUT/report.html
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from rayfuse import cluster
from rayfuse.check.data import check_evaluation
from rayfuse.check.machine import check_environments, check_machine, check_serving
from rayfuse.config import Config
from rayfuse.consensus.make import summary
from rayfuse.errors import ConfigError
from rayfuse.evaluation.models import evaluate_all
from rayfuse.files import folder_whole, write_whole
from rayfuse.metrics.live import LiveLine
from rayfuse.report.card import write_card
from rayfuse.report.page import write_report
from rayfuse.report.terminal import make_console
from rayfuse.run.experts import with_consensus
from rayfuse.run.folder import Stopwatch, open_run_folder
from rayfuse.run.fused_model import write_fused
from rayfuse.run.pairwise import train_pairwise
from rayfuse.run.sources import UnitSource, load_sources
from rayfuse.run.stage_job import identify_pivot, stage_job
from rayfuse.run.teachers_first import fill
from rayfuse.signals.store import SignalStore
from rayfuse.student.group import train_group
from rayfuse.student.result import is_finished
from rayfuse.teachers.http.served import served
from rayfuse.teachers.identity import IdentifiedTeacher, describe, identify, live
from rayfuse.teachers.parity.check import check_parity
from rayfuse.teachers.serving import applications


@cluster.session()
def fuse(config: Config, *, resume: bool = False, console: Console | None = None) -> Path:
    """Run all stages and return the folder of the fused model.

    Args:
        config: the run.
        resume: go on with what `output` already holds; without it, `output` must be new.
        console: where progress goes.

    Raises:
        RayfuseError: anything that cannot go on; whatever was done stays, and `resume` goes on from there.
    """
    console = console or make_console()
    config = config.absolute()
    _refuse_faults(config)
    open_run_folder(config, resume)
    timed = Stopwatch(Path(config.output) / "times.json")
    with timed("start Ray"):
        embedded = cluster.connect(config)
    short = cluster.shortage(config)
    if short:
        console.print(f"this run asks for {short}: it waits where it has no room, until nodes join or others end")
    learnt = config
    if config.consensus is not None:
        with timed("find out who is right"):
            learnt = with_consensus(config, config.consensus, console)
    with timed("read data"):
        sources = load_sources(config, learnt, console)
    with timed("identify teachers"):
        needed = any(stage.uses_teachers for stage in config.stages)
        teachers = identify(config.teachers if needed else (), config.signals.k)
        asked = live(teachers)
        describe(asked, config.signals.k, SignalStore(config.store_url))
        pivot = identify_pivot(config)
    if asked:
        with timed("check teachers"):
            models = [config.student, *config.teachers]
            check_parity(asked, config.signals.k, SignalStore(config.store_url), console, models)
    with served(asked, config.signals.k, config.serving.http, console):
        _train_stages(learnt, teachers, sources, pivot, timed, console)
    counts = {name: asdict(source.counts) for name, source in sources.items()}
    results: dict[str, Any] = {**counts, "models": [], "times": timed.seconds}
    if config.consensus is not None:
        results["consensus"] = summary(Path(config.output))
    if config.evaluate is not None:
        with timed("evaluate"):
            if embedded:  # nobody else uses these teachers: their memory is free for the evaluation
                applications.delete(asked)
            results["models"] = evaluate_all(config)
    return _finish(config, results, console)


def _train_stages(
    config: Config,
    teachers: Sequence[IdentifiedTeacher],
    sources: Mapping[str, UnitSource],
    pivot: str,
    timed: Stopwatch,
    console: Console,
) -> None:
    """Every stage that is not done yet, each from the model before it."""
    for index in range(len(config.stages)):
        name = config.stage_folder(index).name
        job = stage_job(config, index, teachers, sources, pivot)
        if is_finished(job):
            console.print(f"{name} is done already")
            continue
        with timed(name):
            first = config.serving.mode == "first"
            if first:
                fill(job, console)
            with (
                applications.borrowed(() if first else live(job.spec.teachers), config.signals.k),
                LiveLine(Path(config.output) / "metrics.jsonl", console),
            ):
                if job.stage.pairwise is not None:
                    train_pairwise(job, job.stage.pairwise)
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


def _finish(config: Config, results: dict[str, Any], console: Console) -> Path:
    """The fused model's folder with its card, results.json and the report."""
    output = Path(config.output)
    with folder_whole(output / "model") as half:
        results["saved"] = write_fused(config, half, console).as_dict()
        write_whole(output / "results.json", json.dumps(results, indent=2) + "\n")
        write_card(half / "README.md", config, results)
    write_report(output)
    return output / "model"
