"""A tiny comparison from end to end: every cell once, resumed without doing one again, and a page with its numbers."""

import json
from pathlib import Path

import pandas as pd
import pytest
from rich.console import Console

from rayfuse.compare.cell import Bench
from rayfuse.compare.design import Plan
from rayfuse.compare.grid import Results, open_cells, run_grid
from rayfuse.compare.page import write_page
from rayfuse.compare.tuning import right
from rayfuse.quickstart.facts import FIELDS
from rayfuse.quickstart.facts_world import STYLES
from rayfuse.quickstart.world import World

PLAN = {
    "worlds": {"one": {"title": "One", "tuned_in": "wrong"}},
    "sizes": {
        "steps": 4,
        "batch_size": 16,
        "unit_size": 8,
        "learning_rate": 1e-3,
        "cost_steps": 2,
        "test": 4,
        "validation": 3,
        "max_new_tokens": 4,
    },
    "seeds": [1, 2],
    "tuning_seeds": [0, 9],
    "conditions": {"wrong": {"title": "30% wrong", "world": "one", "wrong": 0.3, "per_field": 20}},
    "cost_condition": "wrong",
    "methods": {
        "sft": {"title": "SFT", "stages": [{"method": "sft"}]},
        "infifusion": {
            "title": "InfiFusion",
            "stages": [{"method": "infifusion"}],
            "tune": [{"lam": 0.1}, {"lam": 0.5}],
        },
        "infigfusion": {"stages": [{"method": "infigfusion"}], "like": "infifusion"},
        "drawn": {"stages": [{"method": "sft"}], "learns_from": "a teacher"},
    },
    "questions": [["infigfusion", "infifusion"]],
}


@pytest.fixture
def bench(tiny, tmp_path) -> Bench:
    """The tiny world's models, laid out as a world of facts."""
    folder = tmp_path / "world"
    (folder / "teachers").mkdir(parents=True)
    for field in FIELDS:
        (folder / "teachers" / field).symlink_to(tiny.model(STYLES[field]))
    (folder / "pivot").symlink_to(tiny.model("pivot"))
    return Bench(Plan.model_validate(PLAN), {"one": World(folder, FIELDS)}, tmp_path / "work")


@pytest.mark.slow
def test_a_comparison_is_done_in_pieces_and_told_as_measured(bench, tmp_path, embedded_ray):
    results, docs = tmp_path / "results.parquet", tmp_path / "docs"
    console = Console()
    only_sft = bench.plan.model_copy(update={"methods": {"sft": bench.plan.methods["sft"]}, "questions": ()})
    assert run_grid(Bench(only_sft, bench.worlds, bench.work), results, console) == []
    before = pd.read_parquet(results)
    assert sorted(before.purpose) == ["cost", "report", "report"]

    assert run_grid(bench, results, console) == []
    table = pd.read_parquet(results)
    pd.testing.assert_frame_equal(table.iloc[:3][before.columns], before, check_dtype=False)  # not done again
    assert table.cell.is_unique
    assert table.purpose.value_counts().to_dict() == {"report": 8, "tune": 4, "cost": 4, "gradient": 2}
    assert not list(open_cells(bench.plan, Results(results).rows))

    _check_rows(table)
    page = write_page(bench.plan, results, docs).read_text()
    assert "Trainings behind this page: 8 reported, 4 for tuning." in page
    assert (docs / "results-main.svg").read_text().count("<circle") == 3


def _check_rows(table: pd.DataFrame) -> None:
    """Seeds draw other data; the tuned weight is in use; the cost cells asked each teacher once per text."""
    by_cell = table.set_index(["purpose", "method", "seed"])
    reported = by_cell.loc["report"]
    assert reported.loc[("sft", 1), "bits_per_byte"] != reported.loc[("sft", 2), "bits_per_byte"]
    tuning = table[table.purpose == "tune"].to_dict("records")
    tried = {row["settings"]: [one for one in tuning if one["settings"] == row["settings"]] for row in tuning}
    assert {len(rows) for rows in tried.values()} == {2}, "one per tuning seed"
    best = max(
        tried,
        key=lambda settings: (
            sum(right(row) for row in tried[settings]),
            -sum(row["bits_per_byte"] for row in tried[settings]),
        ),
    )
    distances = table.method.isin(["infifusion", "infigfusion"])
    assert set(table[distances & table.purpose.isin(["report", "cost"])].settings) == {best}
    assert json.loads(best)[0]["lam"] in (0.1, 0.5)
    gradients = table[table.purpose == "gradient"]
    assert (gradients.gradient_ratio > 0).all()
    assert gradients.gradient_cosine.between(-1, 1).all()
    costs = by_cell.loc["cost"]
    assert costs.loc[("sft", 0), "forwarded"] == 0
    for method in ("infifusion", "infigfusion"):
        row = costs.loc[(method, 0)]
        assert row["forwarded"] == 3 * row["texts"] == 3 * 32
        assert 59 <= row["signal_bytes"] / row["signal_rows"] < 400  # K = 10: 59 bytes per token, and the file's header


def test_cells_wait_for_what_they_need(bench):
    """Reported cells wait for the tuning, and those that take over settings for the other method's."""
    plan = bench.plan
    rows = {}
    cells = list(open_cells(plan, rows))
    assert {(cell.method, cell.purpose) for cell in cells} == {
        ("sft", "report"),
        ("sft", "cost"),
        ("infifusion", "tune"),
        ("drawn", "report"),
        ("drawn", "cost"),
        ("infifusion", "gradient"),
        ("infigfusion", "gradient"),
    }
    tuning = [cell for cell in cells if cell.purpose == "tune"]
    # The second setting is better over both seeds, though not on the first of them.
    for cell, marks in zip(tuning, ("110", "100", "100", "111"), strict=True):
        rows[cell.name] = {f"right_{field}": marks for field in FIELDS} | {"bits_per_byte": 0.5}
    cells = list(open_cells(plan, rows))
    assert {(cell.method, cell.purpose) for cell in cells} == {
        (method, purpose) for method in plan.methods for purpose in ("report", "cost")
    } | {("infifusion", "gradient"), ("infigfusion", "gradient")}
    assert {cell.settings for cell in cells if cell.method.startswith("inf") and cell.purpose != "gradient"} == {
        '[{"lam": 0.5}]'
    }


def test_a_changed_plan_does_its_cells_again(bench):
    """Sizes, condition and method are part of a cell's name; titles and the choice of seeds are not."""
    plan = bench.plan
    cell = next(cell for cell in open_cells(plan, {}) if cell.method == "sft")
    longer = plan.model_copy(update={"sizes": plan.sizes.model_copy(update={"steps": 8})})
    renamed = plan.model_copy(update={"seeds": (1, 2, 3)})
    assert next(open_cells(longer, {cell.name: {}})).name != cell.name
    assert cell.name not in [other.name for other in open_cells(renamed, {cell.name: {}})]


def test_the_shipped_plan_is_valid():
    from rayfuse.compare.design import load_plan

    plan = load_plan(Path(__file__).parents[2] / "jobs" / "compare.yaml")
    assert len(plan.seeds) >= 5
    assert len(plan.tuning_seeds) >= 3
    assert {world.tuned_in for world in plan.worlds.values()} <= set(plan.conditions)
    assert {plan.conditions[name].per_field for name in ("experts-few", "experts-none")} == {80, 0}
