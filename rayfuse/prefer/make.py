"""Preference and training data made by the models themselves.

prompts -> units -> answers of every teacher and the pivot (kept in the answer store) -> judged -> best, worst -> rows

Units of prompts go through it in parallel, a bounded number at a time. What is written depends on configuration, data
and seed: not on timing, on who answered, or on what was interrupted.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from rayfuse import cluster
from rayfuse.config import Config, Data, Posterior, Prefer
from rayfuse.config.run import as_teacher
from rayfuse.consensus.make import estimate_lines, tests_judge
from rayfuse.consensus.sampled import Sampled, posteriors
from rayfuse.data.prompts import Prompt, read_prompts
from rayfuse.data.sample import DataCounts
from rayfuse.errors import ConfigError, DataError
from rayfuse.files import write_whole
from rayfuse.metrics.live import PLAIN_EVERY_S
from rayfuse.prefer.judging import judged
from rayfuse.prefer.selection import Response, Rows, rows_of_prompt
from rayfuse.prepare.units import form_units
from rayfuse.report.terminal import make_console
from rayfuse.teachers.answers import AnswerStore, Author, Sampling
from rayfuse.teachers.identity import identify
from rayfuse.teachers.serving import applications

SIDES = ("chosen", "chosen_pivot", "response", "rejected")
"""Keys of responses in a row."""


@cluster.session()
def prefer(config: Config, *, console: Console | None = None) -> Path:
    """Make the data that `prefer` asks for; returns the file of rows. Its summary lies beside it.

    Started again, it finds the answers that are there already and goes on.

    Raises:
        RayfuseError: anything that cannot go on; the answers so far are kept.
    """
    console = console or make_console()
    config = config.absolute()
    settings, data, output = _what(config)
    identity = _identity(config, settings)
    _refuse_other_file(output, identity)
    embedded = cluster.connect(config)
    units, counts, dropped = _read(config, settings, data)
    console.print(f"{counts.rows:,} rows, {counts.samples:,} prompts in {len(units):,} units", highlight=False)
    sources = _sources(config, settings)
    for teacher in config.teachers:
        if teacher.stored is not None:
            console.print(f"{teacher.name} is only its stored signals and answers nothing")
    AnswerStore(sources[0].store).check()
    applications.deploy([source.model for source in sources], config.signals.k)
    try:
        made = _make(config, settings, data, sources, units, console)
    finally:
        if embedded:
            applications.delete([source.model for source in sources])
    summary = {
        "identity": identity,
        "write": settings.write,
        "rows": len(made.rows),
        "counts": {"rows read": counts.rows, "malformed rows": counts.bad_rows, **dropped, **made.left_out},
        "models": made.per_model,
        "settings": settings.model_dump(mode="json"),
    }
    _write_rows(output, made.rows)
    write_whole(summary_path(output), json.dumps(summary, indent=2) + "\n")
    return output


def summary_path(output: Path) -> Path:
    """Where the summary of a file of rows is."""
    return output.with_suffix(".summary.json")


def _what(config: Config) -> tuple[Prefer, Data, Path]:
    if config.prefer is None or config.prefer_output is None:
        raise ConfigError("the configuration has no `prefer` section; say there what to make, for example judge: exact")
    return config.prefer, config.prefer.prompts or config.data, Path(config.prefer_output).resolve()


def _identity(config: Config, settings: Prefer) -> str:
    """Hash of the settings that the rows depend on, without the data's content."""
    exclude = {"in_flight": True, "store": True, "replicas": True, "output": True}
    parts = {
        "prefer": settings.model_dump(mode="json", exclude=exclude),
        "data": config.data.model_dump(mode="json"),
        "models": [model.model for model in (config.student, *config.teachers)],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _refuse_other_file(output: Path, identity: str) -> None:
    """Raises DataError where the file is there and was not made from the same settings."""
    if not output.exists():
        return
    summary = summary_path(output)
    made_by = json.loads(summary.read_text(encoding="utf-8")).get("identity") if summary.exists() else None
    if made_by != identity:
        raise DataError(
            f"{output} is there already, made with other settings: move it away, or set another prefer.output"
        )


def _read(config: Config, settings: Prefer, data: Data) -> tuple[list[list[Prompt]], DataCounts, dict[str, int]]:
    """The prompts in units, and what was left out. Of equal prompts the first counts."""
    prompts, counts = read_prompts(data, settings.judge.needs if settings.judge else "")
    by_key: dict[str, Prompt] = {}
    for prompt in prompts:
        by_key.setdefault(prompt.sample.key, prompt)
    groups = [(prompt.sample,) for prompt in by_key.values()]
    units, counts = form_units(config, data, groups, counts)
    dropped = {
        "duplicate prompts": len(prompts) - len(by_key),
        "prompts too long": counts.too_long,
        "prompts a model cannot read": counts.unreadable,
    }
    return [[by_key[sample.key] for sample in unit] for unit in units.samples], counts, dropped


def _sources(config: Config, settings: Prefer) -> list[Author]:
    """Who answers: every teacher that is more than its stored signals, then the pivot."""
    pivot = as_teacher(config, "pivot").model_copy(update={"replicas": settings.replicas})
    live = [teacher for teacher in config.teachers if teacher.stored is None]
    asked = [*((teacher, settings.per_teacher) for teacher in live), (pivot, settings.pivot_count)]
    asked = [(model, count) for model, count in asked if count]
    store = settings.store or str(Path(config.output) / "answers")
    models = identify([model for model, _ in asked], config.signals.k)
    return [
        Author(model, Sampling(count, settings.temperature, settings.max_new_tokens, settings.seed), store)
        for model, (_, count) in zip(models, asked, strict=True)
    ]


# --- units through answering and judging ------------------------------


@dataclass
class Made:
    """What came of the prompts so far.

    Attributes:
        rows: in the order of the prompts' keys.
        left_out: prompts without a row, by reason.
        per_model: per model what its responses were: how many, usable ones, how many of them different from each other,
            faulty ones by fault, mean score of the usable, and how often chosen and rejected.
    """

    rows: Rows = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    per_model: dict[str, dict[str, float]] = field(default_factory=dict)

    def add(self, settings: Prefer, prompt: Prompt, responses: Sequence[Response]) -> None:
        """Take one prompt's responses in."""
        rows, reason = rows_of_prompt(settings, prompt, responses)
        self.rows += rows
        if reason:
            self.left_out[f"prompts left out: {reason}"] += 1
        for response in responses:
            counted = self.per_model.setdefault(
                response.model, {"responses": 0, "usable": 0, "different": 0, "score": 0.0}
            )
            counted["responses"] += 1
            if response.fault:
                counted[response.fault] = counted.get(response.fault, 0) + 1
            else:
                counted["score"] = (counted["score"] * counted["usable"] + response.score) / (counted["usable"] + 1)
                counted["usable"] += 1
        for model, _ in {(response.model, response.text) for response in responses if not response.fault}:
            self.per_model[model]["different"] += 1
        for row in rows:
            for side in SIDES:
                if side in row:
                    counted = self.per_model[row["provenance"][side]["model"]]
                    counted[side] = counted.get(side, 0) + 1


def _make(
    config: Config,
    settings: Prefer,
    data: Data,
    sources: Sequence[Author],
    units: Sequence[list[Prompt]],
    console: Console,
) -> Made:
    """Answer and judge all units, and choose once all are done, in an order that does not depend on who was first."""
    done: dict[str, tuple[Prompt, list[Response]]] = {}
    with _Progress(console, sum(map(len, units))) as progress:
        for index, responses in judged(config, settings, data, sources, units):
            for prompt, prompt_responses in zip(units[index], responses, strict=True):
                done[prompt.sample.key] = prompt, prompt_responses
            progress.advance(len(units[index]))
    if isinstance(settings.judge, Posterior):
        done = _by_consensus(settings.judge, done, console)
    made = Made()
    for key in sorted(done):
        made.add(settings, *done[key])
    return made


def _by_consensus(
    judge: Posterior, done: dict[str, tuple[Prompt, list[Response]]], console: Console
) -> dict[str, tuple[Prompt, list[Response]]]:
    """The same, each usable response with the probability that it is right as its score."""
    keys = [key for key in sorted(done) if any(not response.fault for response in done[key][1])]
    sampled = [Sampled(done[key][0], [(r.model, r.text) for r in done[key][1] if not r.fault]) for key in keys]
    found, outcome = posteriors(sampled, judge.equivalence, tests_judge(judge.tests), judge.clusters)
    for line in estimate_lines(outcome):
        console.print(line, highlight=False)
    scored = dict(done)
    for key, right in zip(keys, found, strict=True):
        prompt, responses = done[key]
        scored[key] = prompt, [r if r.fault else replace(r, score=round(right[r.text], 6)) for r in responses]
    return scored


# --- what is shown and written ------------------------------


class _Progress:
    """Prompts answered and judged: one line that moves on a terminal, now and then a line in a log."""

    def __init__(self, console: Console, prompts: int) -> None:
        self.console, self.prompts = console, prompts
        self.done, self.shown_at = 0, time.monotonic()
        columns = (TextColumn("prompts answered and judged"), BarColumn(), MofNCompleteColumn())
        times = (TimeElapsedColumn(), TimeRemainingColumn())
        self.bar = Progress(*columns, *times, console=console, disable=not console.is_terminal)
        self.task = self.bar.add_task("prompts", total=prompts)

    def __enter__(self) -> _Progress:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def advance(self, prompts: int) -> None:
        """So many more are done."""
        self.done += prompts
        self.bar.advance(self.task, prompts)
        if not self.console.is_terminal and time.monotonic() - self.shown_at >= PLAIN_EVERY_S:
            self.shown_at = time.monotonic()
            self.console.print(f"{self.done:,} of {self.prompts:,} prompts answered and judged", highlight=False)


def _write_rows(output: Path, rows: Rows) -> None:
    if not rows:
        raise DataError(
            "no prompt gives a row: all responses are empty, tied or below min_score. The answers are kept; change "
            "judge, min_score or min_gap, or sample more responses"
        )
    output.parent.mkdir(parents=True, exist_ok=True)
    write_whole(output, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def summary_table(summary: dict[str, Any]) -> Table:
    """What each model contributed."""
    sides = [side for side in SIDES if any(side in counted for counted in summary["models"].values())]
    table = Table(title=f"{summary['rows']:,} rows of {summary['write']}")
    table.add_column("model")
    for name in ("responses", "usable", "different", "mean score", *sides):
        table.add_column(name, justify="right")
    for model, counted in summary["models"].items():
        counts = [f"{counted.get(side, 0):,}" for side in sides]
        numbers = [f"{counted[name]:,}" for name in ("responses", "usable", "different")]
        table.add_row(model, *numbers, f"{counted['score']:.4g}", *counts)
    return table
