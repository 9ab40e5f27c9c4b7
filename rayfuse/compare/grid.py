"""All cells of a comparison, a few at a time, each done once.

The Parquet file of results is all the state there is: it is written whole after every cell, so a comparison that is
broken off goes on where it was, and a plan that grows adds its new cells to the same file.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import ray
from ray.exceptions import RayTaskError
from rich.console import Console

from rayfuse import cluster
from rayfuse.compare.cell import Bench, needs_texts, run_cell
from rayfuse.compare.design import Cell, Plan
from rayfuse.compare.rows import training_rows, write_once
from rayfuse.compare.texts import texts_file, write_texts
from rayfuse.compare.tuning import Rows, best_settings, donated, right
from rayfuse.config import Config, parse_config
from rayfuse.errors import RayfuseError
from rayfuse.files import write_whole
from rayfuse.quickstart.facts import FIELDS
from rayfuse.quickstart.facts_world import build_facts_world
from rayfuse.teachers.serving import applications


class Results:
    """The Parquet file of raw results: one row per finished cell."""

    def __init__(self, path: Path) -> None:
        self.path = path
        records = pd.read_parquet(path).to_dict("records") if path.exists() else []
        self.rows: dict[str, dict[str, Any]] = {str(record["cell"]): dict(record) for record in records}  # type: ignore[misc]

    def add(self, row: dict[str, Any]) -> None:
        """Keep one row; the file is the old one or the new one, never half of it."""
        self.rows[row["cell"]] = row
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self.path, pd.DataFrame(list(self.rows.values())).to_parquet(index=False))


@cluster.session()
def compare(
    plan: Plan,
    cache: Path,
    work: Path,
    results: Path,
    console: Console,
    *,
    at_once: int = 2,
    until: float | None = None,
) -> None:
    """Make the worlds that are not in the cache, and do all cells; see `run_grid`.

    Raises:
        RayfuseError: cells failed; the others are done.
    """
    worlds = {
        key: build_facts_world(cache, world.seed, console.print, knowledge=world.knowledge)
        for key, world in plan.worlds.items()
    }
    failed = run_grid(Bench(plan, worlds, work.resolve()), results, console, at_once=at_once, until=until)
    if failed:
        raise RayfuseError(f"{len(failed)} cells failed, the first: {failed[0].name}; call again to try them again")


def run_grid(
    bench: Bench, results: Path, console: Console, *, at_once: int = 2, until: float | None = None
) -> list[Cell]:
    """Do the cells that `results` does not hold yet.

    Args:
        bench: plan, worlds and folder of everything that can be made again.
        results: the Parquet file.
        console: where progress goes.
        at_once: cells at a time, one core each.
        until: time.time() after which no cell is begun.

    Returns:
        The cells that were begun and failed; what they left out is tried again by the next call.
    """
    table = Results(results)
    failed: list[Cell] = []
    running: dict[Any, Cell | str] = {}
    cluster.connect(_everything(bench))
    applications.start_serve()  # which two cells at once would race for
    while True:
        busy = [*running.values(), *failed]
        for cell in open_cells(bench.plan, table.rows):
            if len(running) >= at_once or (until is not None and time.time() > until):
                break
            if cell in busy:
                continue
            if cell.purpose == "cost" and running:
                break
            world = bench.plan.conditions[cell.condition].world
            if needs_texts(bench.plan, cell) and not texts_file(bench.plan, bench.work, world).exists():
                if world not in busy:
                    busy.append(world)
                    running[write_texts.remote(bench.plan, world, bench.worlds[world], bench.work)] = world
                continue
            running[run_cell.options(**_options(cell)).remote(bench, cell)] = cell
            if cell.purpose == "cost":
                break
        if not running:
            return failed
        (finished, *_), _ = ray.wait(list(running), num_returns=1)
        done = running.pop(finished)
        try:
            row = ray.get(finished)
        except RayTaskError as error:
            if isinstance(done, str):
                raise
            failed.append(done)
            console.print(f"{done.name} failed: {error}", markup=False)
            continue
        if isinstance(done, Cell):
            table.add(row)
            console.print(f"{len(table.rows):4d}  {summary(row)}", highlight=False, markup=False)


def open_cells(plan: Plan, rows: Rows) -> Iterator[Cell]:
    """The cells that can be done now and are not, in the order of the plan.

    A method's reported cells wait for its tuning, for the tuning of the methods it takes settings from, and for the
    model that it goes on from.
    """
    for name in plan.methods:
        cells: list[Cell] = []
        for world in plan.worlds_of(name):
            chosen, best = donated(plan, rows, name, world), best_settings(plan, rows, name, world)
            if chosen is None:
                continue
            cells += [cell for tried in plan.tuning(name, world, chosen) for cell in tried]
            for condition in plan.conditions_of(name) if best is not None else ():
                if plan.conditions[condition].world == world:
                    cells += plan.reported(name, condition, {**chosen, name: best or {}})
        yield from (cell for cell in cells if cell.name not in rows and _has_start(plan, rows, cell))
    for name in plan.methods:
        yield from (cell for cell in plan.gradients(name) if cell.name not in rows)
    world = plan.conditions[plan.cost_condition].world
    for name in plan.methods:
        if plan.cost_condition not in plan.conditions_of(name):
            continue
        chosen, best = donated(plan, rows, name, world), best_settings(plan, rows, name, world)
        if chosen is not None and best is not None:
            costs = list(plan.costs(name, {**chosen, name: best}))
            yield from (cell for cell in costs if cell.name not in rows and _has_start(plan, rows, cell))


def summary(row: Mapping[str, Any]) -> str:
    """One row as a person reads it."""
    if row["purpose"] == "gradient":
        measured = f"ratio {row['gradient_ratio']:.3g}, cosine {row['gradient_cosine']:+.2f}"
        return f"{row['purpose']:6} {row['condition']:18} {row['method']:24} {measured}  {row['cell_seconds']:.0f} s"
    total = sum(len(row[f"right_{field}"]) for field in FIELDS)
    return (
        f"{row['purpose']:6} {row['condition']:18} {row['method']:24} seed {row['seed']} {row['settings']:40} "
        f"{right(row) / total:6.1%} {row['bits_per_byte']:.4f} bits/byte  {row['cell_seconds']:.0f} s"
    )


def _options(cell: Cell) -> dict[str, Any]:
    """A measurement of cost gets a process of its own, in which nothing else has used memory."""
    return {"runtime_env": {"env_vars": {"RAYFUSE_CELL": cell.name}}} if cell.purpose == "cost" else {}


def _has_start(plan: Plan, rows: Rows, cell: Cell) -> bool:
    start = plan.start(cell)
    return start is None or start.name in rows


def _everything(bench: Bench) -> Config:
    """A configuration with all teachers, for an embedded Ray that has room for them and the cells."""
    world = next(iter(bench.worlds.values()))
    rows = write_once(
        training_rows(bench.plan, next(iter(bench.plan.conditions)), 0)[:1], bench.work / "data/any.jsonl"
    )
    teachers = [
        {"model": str(folder), "name": f"{key}-{name}"}
        for key, one in bench.worlds.items()
        for name, folder in one.teachers.items()
    ]
    tree = {"student": {"model": str(world.pivot), "workers": 2}, "teachers": teachers, "data": str(rows)}
    stages = [{"method": "sft", "batch_size": 16}]
    return parse_config({**tree, "stages": stages, "output": str(bench.work)})
