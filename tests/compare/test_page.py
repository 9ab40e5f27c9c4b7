"""The page from made-up results: its numbers are those of the Parquet, worked out here another way."""

import json
import re

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from rayfuse.compare.design import Plan
from rayfuse.compare.page import write_page
from rayfuse.compare.statistics import crossed_interval
from rayfuse.quickstart.facts import FIELDS

ITEMS = 40
PLAN = Plan.model_validate(
    {
        "worlds": {"one": {"title": "One", "tuned_in": "wrong"}},
        "sizes": {
            "steps": 4,
            "batch_size": 16,
            "unit_size": 8,
            "learning_rate": 1e-3,
            "test": ITEMS,
            "validation": ITEMS,
        },
        "seeds": [1, 2, 3],
        "tuning_seeds": [0, 9],
        "conditions": {
            "clean": {"title": "Clean", "world": "one"},
            "wrong": {"title": "30% wrong", "world": "one", "wrong": 0.3},
        },
        "cost_condition": "wrong",
        "methods": {
            "pivot": {"model": "pivot"},
            "oracle": {"stages": [{"method": "sft"}], "learns_from": "truth", "conditions": ["wrong"]},
            "sft": {"title": "SFT", "stages": [{"method": "sft"}]},
            "infifusion": {
                "title": "InfiFusion",
                "stages": [{"method": "infifusion"}],
                "tune": [{"lam": 0.1}, {"lam": 0.3}, {"lam": 0.5}],
            },
            "k2": {
                "part": "ablation",
                "stages": [{"method": "infifusion", "k": 2}],
                "like": "infifusion",
                "compare_to": "infifusion",
            },
        },
        "questions": [["infifusion", "sft"]],
    }
)
SHARES = {"pivot": 0.3, "oracle": 0.8, "sft": 0.4, "infifusion": 0.6, "k2": 0.6}


def _row(cell, rng: np.random.Generator, share: float) -> dict:
    marks = {f"right_{field}": "".join(map(str, rng.binomial(1, share, ITEMS))) for field in FIELDS}
    used = {"steps": 4, "train_cpu_seconds": 0.6, "peak_mib": 600.0, "answers_used": 4 * 16 * 3}
    return {**vars(cell), "cell": cell.name, **marks, **used, "bits_per_byte": float(rng.uniform(0.4, 0.6))}


@pytest.fixture
def table() -> pd.DataFrame:
    """Every cell of the plan; of the two settings of InfiFusion the second is right more often."""
    rng = np.random.default_rng(1)
    tried = zip(PLAN.tuning("infifusion", "one", {}), (0.2, 0.4, 0.7), strict=True)
    rows = [_row(cell, rng, share) for cells, share in tried for cell in cells]
    chosen = {"infifusion": {"lam": 0.5}}
    for name in PLAN.methods:
        for condition in PLAN.conditions_of(name):
            rows += [_row(cell, rng, SHARES[name]) for cell in PLAN.reported(name, condition, chosen)]
    for cell in PLAN.costs("infifusion", chosen):
        measured = {"steps": 10, "texts": 160}
        signals = {"forwarded": 480, "signal_bytes": 7600, "signal_rows": 100}
        rows.append({**_row(cell, rng, 0.5), **measured, **signals})
    return pd.DataFrame(rows)


@pytest.fixture
def page(table, tmp_path) -> str:
    table.to_parquet(tmp_path / "results.parquet")
    return write_page(PLAN, tmp_path / "results.parquet", tmp_path).read_text()


def _marks(table: pd.DataFrame, method: str, condition: str) -> np.ndarray:
    """[seeds, items] of 0 and 1."""
    rows = table[(table.method == method) & (table.condition == condition) & (table.purpose == "report")]
    texts = [row.right_towns + row.right_codes + row.right_pets for row in rows.itertuples()]
    return np.array([[int(mark) for mark in text] for text in texts])


def _cells(page: str, section: str, title: str) -> list[str]:
    lines = page.split(f"\n{section}\n")[1].splitlines()
    line = next(line for line in lines if line.startswith(f"| {title} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_accuracies_differences_and_head_room(page, table):
    for condition, section in (("clean", "## Clean"), ("wrong", "## 30% wrong")):
        cells = _cells(page, section, "InfiFusion")
        assert cells[1:3] == ["lam 0.5", "3"]
        ours, sft = _marks(table, "infifusion", condition), _marks(table, "sft", condition)
        assert cells[6].startswith(f"{ours.mean():.1%} (")
        assert cells[7] == "SFT"
        mean, low, high = map(float, re.findall(r"[+-][0-9.]+", cells[8]))
        assert mean == pytest.approx(100 * (ours - sft).mean(), abs=0.05)
        # The interval over seeds and items, which test_statistics.py holds against simulations.
        assert (mean, low, high) == pytest.approx(crossed_interval(100.0 * (ours - sft)), abs=0.051)
        # No narrower than that of the items alone.
        alone = stats.t.interval(0.95, ITEMS * 3 - 1, scale=stats.sem(100.0 * (ours - sft).mean(0)))[1]
        assert (high - low) / 2 >= alone - 0.051
        assert low < mean < high
        assert cells[8].startswith("**") == (low > 0 or high < 0)
        # The oracle learns from no label: measured in one condition, it is the end of the way in all of its world.
        pivot, oracle = _marks(table, "pivot", condition)[0].mean(), _marks(table, "oracle", "wrong").mean()
        assert cells[9] == f"{(ours.mean() - pivot) / (oracle - pivot):.0%}"


def test_summary_tuning_ablation_and_cost(page, table):
    short = page.split("## In short")[1].split("\n## ")[0]
    titles = [line.split(" | ")[0].strip("| ") for line in short.splitlines() if line.startswith("| ")]
    assert titles[:4] == ["minus SFT, points", "InfiFusion", "SFT", "oracle"], "the best of the first condition first"
    sft = _marks(table, "sft", "clean").mean()
    assert f"| SFT | {sft:.1%} |" in short
    tuning = table[table.purpose == "tune"]
    for lam, mark in ((0.1, ""), (0.3, ""), (0.5, "chosen, at the edge of what was tried")):
        line = next(line for line in page.split("## Tuning")[1].splitlines() if f"| lam {lam} |" in line)
        mine = [row for row in tuning.itertuples() if json.loads(row.settings)[0]["lam"] == lam]
        right = sum((row.right_towns + row.right_codes + row.right_pets).count("1") for row in mine)
        assert len(mine) == 2
        assert f"| {right / (2 * 3 * ITEMS):.1%} |" in line
        assert line.endswith(f"| {mark} |")
    assert _cells(page, "### Clean", "k2")[4] == "InfiFusion"
    assert _cells(page, "## Cost", "InfiFusion")[1:] == ["0.150", "600", "3.0", "3.0", "76"]
    assert _cells(page, "## Cost", "SFT")[1:] == ["0.150", "600", "3.0", "", ""]


def test_a_complete_page_misses_nothing(page):
    assert "not measured yet" not in page


def test_plots_hold_a_dot_for_each_trained_method(page, tmp_path):
    main = (tmp_path / "results-main.svg").read_text()
    assert main.count("<circle") == 3  # InfiFusion twice and the oracle; SFT is the line, the pivot is not trained
    assert (tmp_path / "results-ablation.svg").read_text().count("<circle") == 2


def test_what_is_not_measured_is_said(table, tmp_path):
    table[(table.condition == "clean") | (table.purpose != "report")].to_parquet(tmp_path / "results.parquet")
    text = write_page(PLAN, tmp_path / "results.parquet", tmp_path).read_text()
    assert (
        "or not with all seeds:** pivot (30% wrong); oracle; SFT (30% wrong); InfiFusion (30% wrong); k2 (30% wrong)."
        in text
    )
    assert "Not measured yet." in text.split("\n## 30% wrong\n")[1]
