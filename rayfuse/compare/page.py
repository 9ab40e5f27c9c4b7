"""docs/results.md: every number on it comes from the Parquet of raw results, none is typed by hand."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from rayfuse.compare.design import Plan
from rayfuse.compare.plot import differences_svg
from rayfuse.compare.statistics import Estimate
from rayfuse.compare.table import RawResults
from rayfuse.quickstart.facts import FIELDS


def write_page(plan: Plan, results: Path, docs: Path) -> Path:
    """Write results.md and its plots into `docs`; returns the page."""
    raw = RawResults(plan, results)
    tables = {
        (condition, part): raw.main_table(condition, part)
        for condition in plan.conditions
        for part in ("main", "extra", "ablation")
    }
    docs.mkdir(parents=True, exist_ok=True)
    for part in ("main", "ablation"):
        svg = _plot(plan, {c: tables[c, part] for c in plan.conditions if not tables[c, part].empty})
        (docs / f"results-{part}.svg").write_text(svg, encoding="utf-8")
    page = docs / "results.md"
    page.write_text("\n".join(_lines(raw, tables)) + "\n", encoding="utf-8")
    return page


def _lines(raw: RawResults, tables: dict[tuple[str, str], pd.DataFrame]) -> Iterator[str]:
    plan = raw.plan
    yield "# What helps, and by how much"
    yield ""
    yield "`make compare` writes this page from the raw results in `results.parquet`; no number is typed by hand."
    yield ""
    yield from plan.notes.get("setting", "").strip().splitlines()
    yield ""
    yield from _sizes(raw)
    yield ""
    yield "## In short"
    yield ""
    yield from _short_table(raw, tables)
    yield ""
    if missing := raw.missing():
        yield f"**In the plan, but not measured yet, or not with all seeds:** {'; '.join(missing)}."
    yield ""
    yield from _questions(raw)
    yield ""
    yield from plan.notes.get("account", "").strip().splitlines()
    yield ""
    yield "![Accuracy minus that of SFT, with 95% intervals](results-main.svg)"
    for condition in plan.conditions:
        yield ""
        yield f"## {plan.conditions[condition].title}"
        yield ""
        yield from _main_table(plan, tables[condition, "main"])
    yield from _part(plan, tables, "extra", "Beyond the methods as defined", partial(_main_table, plan))
    yield from _part(plan, tables, "ablation", "Ablations", partial(_ablation_table, plan))
    yield ""
    yield "## Tuning"
    yield ""
    yield from plan.notes.get("tuning", "").strip().splitlines()
    yield ""
    yield from _tuning_table(raw)
    gradients = raw.gradients()
    if not gradients.empty:
        yield ""
        yield "## Gradients at the pivot"
        yield ""
        yield from plan.notes.get("gradients", "").strip().splitlines()
        yield ""
        yield "| world | distance of | norm over SFT's | cosine with SFT's |"
        yield "|---|---|---|---|"
        for row in gradients.sort_values(["world", "gradient_cosine"], ascending=[True, False]).itertuples():
            yield f"| {row.world} | {row.title} | {row.gradient_ratio:.2f} | {row.gradient_cosine:+.2f} |"
    costs = raw.costs()
    if not costs.empty:
        yield ""
        yield "## Cost"
        yield ""
        yield from plan.notes.get("cost", "").strip().splitlines()
        yield ""
        yield from _cost_table(costs)
    yield ""
    yield "## Again"
    yield ""
    yield from plan.notes.get("again", "").strip().splitlines()


def _part(
    plan: Plan,
    tables: dict[tuple[str, str], pd.DataFrame],
    part: str,
    title: str,
    table: Callable[[pd.DataFrame], Iterator[str]],
) -> Iterator[str]:
    """The section of a part of the plan: its note, its plot where there is one, and a table for each condition."""
    measured = [condition for condition in plan.conditions if not tables[condition, part].empty]
    if not measured:
        return
    yield from ("", f"## {title}", "", *plan.notes.get(part, "").strip().splitlines())
    if part == "ablation":
        yield ""
        yield "![Accuracy minus that of the method as defined, with 95% intervals](results-ablation.svg)"
    for condition in measured:
        yield from ("", f"### {plan.conditions[condition].title}", "", *table(tables[condition, part]))


def _sizes(raw: RawResults) -> Iterator[str]:
    plan, sizes = raw.plan, raw.plan.sizes
    counts = raw.rows.purpose.value_counts()
    yield (
        f"- {sizes.steps} steps of {sizes.batch_size} samples; seeds {', '.join(map(str, plan.seeds))} draw which "
        "labels are wrong or missing, and the order of the rows."
    )
    yield (
        f"- {len(FIELDS) * sizes.test} test items. Settings are chosen on {len(FIELDS) * sizes.validation} items about "
        f"other facts, with seeds {', '.join(map(str, plan.tuning_seeds))}, which are not reported, by most right "
        "answers, in one condition of each world, and used in all its conditions."
    )
    for world in plan.worlds.values():
        yield (
            f"- {world.title}: a teacher knows {world.elsewhere:.0%} of the facts outside its field"
            + (f" and is surely wrong about {world.mistaken:.0%} of the others" if world.mistaken else "")
            + f", the pivot {world.pivot:.0%} of all; settings are chosen in "
            f'"{plan.conditions[world.tuned_in].title}".'
        )
    yield f"- Trainings behind this page: {counts.get('report', 0)} reported, {counts.get('tune', 0)} for tuning."


def _short_table(raw: RawResults, tables: dict[tuple[str, str], pd.DataFrame]) -> Iterator[str]:
    """Every trained main method that has all its seeds: accuracy minus SFT's by condition, the best of the first one
    first; the accuracy itself where SFT has nothing to learn from."""
    plan = raw.plan
    by_method: dict[str, dict[str, Any]] = {}
    for condition in plan.conditions:
        for record in tables[condition, "main"].to_dict("records"):
            if record["method"] in plan.trained and record["seeds"] >= len(plan.seeds):
                by_method.setdefault(record["method"], {})[condition] = record
    first = next(iter(plan.conditions))

    def gain(name: str) -> float:
        record = by_method[name].get(first)
        if record is None or not isinstance(record["difference"], Estimate):
            return 0.0 if name == "sft" else -math.inf
        return record["difference"].mean

    titles = " | ".join(condition.title for condition in plan.conditions.values())
    yield f"| minus SFT, points | {titles} | of the head-room |"
    yield "|---|" + "---|" * (len(plan.conditions) + 1)
    for name in sorted(by_method, key=gain, reverse=True):
        cells = [_short_cell(by_method[name].get(condition), name) for condition in plan.conditions]
        share = by_method[name].get(first, {}).get("headroom")
        yield f"| {plan.title(name)} | {' | '.join(cells)} | {'' if share is None else f'{share:.0%}'} |"
    yield ""
    title = plan.conditions[first].title
    yield f'The last column is of "{title}": 0% is the pivot, 100% is SFT on right labels for every prompt.'


def _short_cell(record: dict[str, Any] | None, name: str) -> str:
    if record is None:
        return ""
    if isinstance(record["difference"], Estimate) and name != "sft":
        return _points(record["difference"])
    return f"{record['all'].mean:.1%}"


def _questions(raw: RawResults) -> Iterator[str]:
    """The direct comparisons that the plan asks for."""
    plan = raw.plan
    conditions = list(plan.conditions)
    yield "| accuracy of | minus that of | " + " | ".join(plan.conditions[c].title for c in conditions) + " |"
    yield "|---|---|" + "---|" * len(conditions)
    for one, other in plan.questions:
        cells = []
        for condition in conditions:
            difference = raw.difference(one, other, condition) if _both(raw, one, other, condition) else None
            cells.append("" if difference is None else _points(difference))
        yield f"| {plan.title(one)} | {plan.title(other)} | " + " | ".join(cells) + " |"


def _both(raw: RawResults, one: str, other: str, condition: str) -> bool:
    return not raw.reported(one, condition).empty and not raw.reported(other, condition).empty


def _main_table(plan: Plan, table: pd.DataFrame) -> Iterator[str]:
    if table.empty:
        yield "Not measured yet."
        return
    yield f"| method | chosen | seeds | {' | '.join(FIELDS)} | all | minus | difference | of the head-room |"
    yield "|---|---|---|" + "---|" * (len(FIELDS) + 4)
    for record in table.sort_values("all", key=lambda column: column.map(_mean), ascending=False).to_dict("records"):
        share = record["headroom"]
        yield (
            f"| {record['title']} | {record['settings']} | {record['seeds']} | "
            + " | ".join(f"{record[field].mean:.1%}" for field in FIELDS)
            + f" | {_share(record['all'])} | {plan.title(record['compare_to'])} | {_points(record['difference'])} | "
            + ("" if share is None or pd.isna(share) else f"{share:.0%}")
            + " |"
        )


def _mean(estimate: Estimate) -> float:
    return estimate.mean


def _ablation_table(plan: Plan, table: pd.DataFrame) -> Iterator[str]:
    yield "| variant | chosen | seeds | all | minus | difference |"
    yield "|---|---|---|---|---|---|"
    for record in table.to_dict("records"):
        yield (
            f"| {record['title']} | {record['settings']} | {record['seeds']} | {_share(record['all'])} | "
            f"{plan.title(record['compare_to'])} | {_points(record['difference'])} |"
        )


def _tuning_table(raw: RawResults) -> Iterator[str]:
    yield "| world | method | settings | validation items right | bits per byte | |"
    yield "|---|---|---|---|---|---|"
    for record in raw.tuning():
        mark = "chosen, at the edge of what was tried" if record["edge"] else "chosen" if record["chosen"] else ""
        yield (
            f"| {record['world']} | {record['title']} | {record['settings']} | {record['right']:.1%} | "
            f"{record['bits_per_byte']:.3f} | {mark} |"
        )


def _cost_table(costs: pd.DataFrame) -> Iterator[str]:
    shown = [column for column in COST_COLUMNS if costs[column.key].notna().any()]
    yield "| method | " + " | ".join(column.title for column in shown) + " |"
    yield "|---" * (len(shown) + 1) + "|"
    for record in costs.to_dict("records"):
        yield f"| {record['title']} | " + " | ".join(_number(record[c.key], c.form) for c in shown) + " |"


class _Column(NamedTuple):
    key: str
    title: str
    form: str


COST_COLUMNS = (
    _Column("cpu_per_step", "processor seconds per step", ".3f"),
    _Column("peak_mib", "peak memory, MiB", ".0f"),
    _Column("answers_per_text", "teachers' answers per text", ".1f"),
    _Column("forwards_per_text", "forward passes per text, empty store", ".1f"),
    _Column("bytes_per_token", "bytes of signals per teacher token, empty store", ".0f"),
)


def _number(value: float, form: str) -> str:
    return "" if pd.isna(value) else format(value, form)


def _plot(plan: Plan, tables: dict[str, pd.DataFrame]) -> str:
    columns = {
        plan.conditions[condition].title: {
            str(record["title"]): record["difference"]
            for record in table.to_dict("records")
            if isinstance(record["difference"], Estimate) and record["method"] in plan.trained
        }
        for condition, table in tables.items()
    }
    names = [
        plan.title(name) for name in plan.methods if any(plan.title(name) in column for column in columns.values())
    ]
    return differences_svg(names, columns, "percentage points of accuracy")


def _share(estimate: Estimate) -> str:
    return f"{estimate.mean:.1%} ({100 * estimate.low:.1f} to {100 * estimate.high:.1f})"


def _points(estimate: object) -> str:
    if not isinstance(estimate, Estimate):
        return ""
    text = f"{100 * estimate.mean:+.1f} ({100 * estimate.low:+.1f} to {100 * estimate.high:+.1f})"
    return f"**{text}**" if estimate.sign else text
