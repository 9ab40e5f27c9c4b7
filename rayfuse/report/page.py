"""report.html: one file that shows what a run did, made from what its folder holds.

It needs no network and no JavaScript. A section whose input is missing (no evaluation, no teachers, a run that is still
under way) is left out.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

from rayfuse.config import STAGES
from rayfuse.config.public import public_name
from rayfuse.config.run import method_of_stage
from rayfuse.metrics.definitions import (
    ALIGNED,
    DISTANCE_RATIO,
    DROPPED,
    FORWARDED,
    LAM,
    ROUTER,
    SFT_PART,
    STORED,
    TOTAL,
    Metric,
)
from rayfuse.metrics.records import read_metrics
from rayfuse.report import charts
from rayfuse.report.charts import SERIES, Curve, Dot, Part
from rayfuse.report.consensus import consensus_section, doubtful_labels
from rayfuse.report.results import ALL, BITS, best, caveat, columns, headline, result_table, score

__all__ = ["result_table", "write_report"]

Record = dict[str, Any]
PANELS = 4
"""Dot panels beside each other; more skills go into further rows."""


def write_report(output: Path) -> Path:
    """Write OUTPUT/report.html from config.json, metrics.jsonl and results.json, and return its path.

    Raises:
        OSError: the run folder cannot be read or written.
        ValueError: config.json or results.json is not JSON.
    """
    config, results = _read_json(output / "config.json"), _read_json(output / "results.json")
    stages: dict[str, list[Record]] = {}
    for record in sorted(read_metrics(output / "metrics.jsonl"), key=lambda r: (r["stage"], r["step"])):
        stages.setdefault(record["stage"], []).append(record)
    models = results.get("models", [])
    name = output.resolve().name
    sections = [
        _section("Result", _result_section(models, config)),
        _section("Accuracy" if _generated(models) else "Bits per byte", _dots_section(models)),
        _section("Who is right", consensus_section(results.get("consensus", {}), doubtful_labels(output))),
        _section("Loss", _loss_section(stages)),
        _section("Where the tokens meet", _aligned_section(stages)),
        _section("What the teachers were asked", _asked_section(stages)),
        _section("Where the time went", _time_section(results.get("times", {}), stages)),
        _section("Data", _data_section(results.get("data", {}), stages)),
        _section("Data that the consensus chose", _data_section(results.get("chosen", {}), stages)),
        _section("Preference pairs", _data_section(results.get("preferences", {}), {})),
        _section("Preference triples", _data_section(results.get("triples", {}), {})),
        _section("Configuration", _config_section(config)),
    ]
    style = Path(__file__).with_name("style.html").read_text(encoding="utf-8")
    page = (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(name)} – rayfuse</title>\n{style}</head>\n<body>\n<main>\n"
        f"{_opening(name, config, models, stages)}\n{''.join(sections)}</main>\n</body>\n</html>\n"
    )
    path = output / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def _read_json(path: Path) -> Record:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _section(title: str, body: str) -> str:
    return f"<section>\n<h2>{escape(title)}</h2>\n{body}\n</section>\n" if body else ""


def _note(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>'


# --- opening ------------------------------


def _opening(name: str, config: Record, models: Sequence[Record], stages: dict[str, list[Record]]) -> str:
    first, second = headline(models)
    if not first:
        done = ", ".join(
            f"{stage} {records[-1]['step']:,} of {records[-1]['steps']:,} steps" for stage, records in stages.items()
        )
        first = (
            f"Nothing was evaluated. Trained: {done}." if done else "Nothing was evaluated, and no step is recorded."
        )
    more = caveat(models, config.get("stages", []))
    lines = [f"<h1>{escape(name)}</h1>", f'<p class="lead">{escape(first)}</p>']
    lines += [f"<p>{escape(second)} {escape(more)}</p>"] if second else []
    if config:
        teachers = [teacher["name"] for teacher in config["teachers"]]
        methods = " → ".join(stage["method"] for stage in config["stages"])
        facts = [f"student {public_name(config['student']['model'])}", f"stages {methods}", f"seed {config['seed']}"]
        facts[1:1] = [f"{'teachers' if len(teachers) > 1 else 'teacher'} {', '.join(teachers)}"] if teachers else []
        lines.append(_note(" · ".join(facts)))
    return "\n".join(lines)


# --- evaluation ------------------------------


def _generated(models: Sequence[Record]) -> bool:
    return any(model["accuracy"] for model in models)


def _result_section(models: Sequence[Record], config: Record) -> str:
    if not models:
        return ""
    names = columns(models)
    winners = {column: best(models, column) for column in names}
    head = "".join(f"<th>{escape(column)}{' ↓' if column == BITS else ''}</th>" for column in names)
    rows = []
    for index, model in enumerate(models):
        cells = []
        for column in names:
            found = score(model, column)
            css = ' class="best"' if model["name"] in winners[column] else ""
            inner = f"{found.text}<small>{found.interval}</small>" if found else "–"
            cells.append(f"<td{css}>{inner}</td>")
        role = "<small>teacher</small>" if model["role"] == "teacher" else ""
        line = ' class="first"' if index and models[index - 1]["role"] != model["role"] else ""
        rows.append(f"<tr{line}><th>{escape(model['name'])}{role}</th>{''.join(cells)}</tr>")
    total = next((m["accuracy"][ALL]["total"] for m in models if ALL in m["accuracy"]), None)
    note = f"{total:,} held-out items; right answers in per cent. " if total else ""
    note += "Small: the 95% interval. ● best of pivot and stages, by the value alone. ↓ less is better."
    absent = [teacher["name"] for teacher in config.get("teachers", []) if teacher.get("backend") == "store"]
    note += f" Not evaluated, because only stored signals are here: {', '.join(absent)}." if absent else ""
    return (
        f'<div class="wide"><table><thead><tr><th></th>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
        + _note(note)
    )


def _dots_section(models: Sequence[Record]) -> str:
    if not models:
        return ""
    shares = _generated(models)
    shown = [column for column in columns(models) if (column != BITS) == shares]
    scores = {column: [score(model, column) for model in models] for column in shown}
    top = 1.0 if shares else _round_up(max((s.high for of in scores.values() for s in of if s), default=1.0))
    panels = [
        (column, [Dot(s.value / top, s.low / top, min(1.0, s.high / top), s.text) if s else None for s in of])
        for column, of in scores.items()
    ]
    ticks = ["0%", "", "50%", "", "100%"] if shares else ["0", "", f"{top / 2:.3g}", "", f"{top:.3g}"]
    rows = [(model["name"], model["role"]) for model in models]
    grids = [charts.dot_grid(rows, panels[i : i + PANELS], ticks) for i in range(0, len(panels), PANELS)]
    what = "Right answers" if shares else "Bits per byte of the held-out responses, less is better"
    return charts.roles() + "\n".join(grids) + _note(f"{what}; the line through each dot is its 95% interval.")


def _round_up(value: float) -> float:
    return next(top for top in (10.0**p * f for p in range(-3, 7) for f in (1, 2, 4)) if top >= value)


# --- training ------------------------------


def _colors(stages: dict[str, list[Record]]) -> dict[str, str]:
    """The same colour for a teacher in every chart."""
    return {name: SERIES[1 + i % (len(SERIES) - 1)] for i, name in enumerate(_suffixes(stages, ALIGNED))}


def _suffixes(stages: dict[str, list[Record]], metric: Metric) -> list[str]:
    """The teachers of which the records hold this metric."""
    keys = (key for records in stages.values() for record in records for key in record if metric.describes(key))
    return list(dict.fromkeys(key.partition("/")[2] for key in keys))


def _loss_section(stages: dict[str, list[Record]]) -> str:
    colors, blocks = _colors(stages), []
    bad = 0
    for stage, records in stages.items():
        bad += sum(not abs(record["loss"]) < float("inf") for record in records)
        drawn = [metric for metric in _parts(stage) if any(metric.describes(key) for r in records for key in r)]
        panels = [TOTAL, *drawn]
        if drawn == [SFT_PART] and all(record["loss"] == record["loss_sft"] for record in records):
            panels = [replace(SFT_PART, title="total = sft part")]
        smooth = charts.window(len(records))
        text = f"mean over {smooth} steps, each step faintly" if smooth > 1 else "each step"
        blocks.append(f'<h3>{escape(stage)} <span class="unit">{text}; the number is the line\'s end</span></h3>')
        blocks.append(f'<div class="panels">{"".join(_panel(metric, records, colors) for metric in panels)}</div>')
        blocks += [_start_note(record) for record in records if DISTANCE_RATIO.name in record][:1]
    return "\n".join(blocks) + (_note(f"{bad:,} steps have a loss that is not a finite number.") if bad else "")


def _start_note(record: Record) -> str:
    """How strongly the distance pulls beside SFT."""
    ratio, lam = record[DISTANCE_RATIO.name], record[LAM.name]
    pull = f"{lam * ratio / (1 - lam):.2g} times as strongly as SFT" if lam < 1 else "alone"
    return _note(
        f"At the start the gradient of the distance was {ratio:.2g} times that of SFT; with lam {lam:.3g} the distance "
        f"pulls {pull}."
    )


def _parts(stage: str) -> list[Metric]:
    """What may be drawn of a stage: the parts of its method, then those of the others under names it does not use."""
    own = STAGES[method].parts if (method := method_of_stage(stage)) in STAGES else ()
    every = (*own, *(metric for kind in STAGES.values() for metric in kind.parts), ROUTER)
    named: dict[tuple[str, bool], Metric] = {}
    for metric in every:
        named.setdefault((metric.name, metric.per_teacher), metric)
    return [metric for metric in named.values() if metric.shown == "loss"]


def _panel(metric: Metric, records: Sequence[Record], colors: dict[str, str]) -> str:
    """One metric's panel, with a curve per teacher where there are several."""
    if not metric.per_teacher:
        curves = [_curve(records, metric.name, metric.curve or metric.title, SERIES[0])]
    else:
        names = _suffixes({"": list(records)}, metric)
        curves = [_curve(records, metric.key(name), name, colors.get(name, SERIES[1])) for name in names]
    return charts.curve_panel(metric.title, metric.unit, curves)


def _curve(records: Sequence[Record], key: str, name: str, color: str) -> Curve:
    kept = [record for record in records if key in record]
    return Curve(name, color, [record["step"] for record in kept], [record[key] for record in kept])


def _aligned_section(stages: dict[str, list[Record]]) -> str:
    colors, rows = _colors(stages), []
    for stage, name, records in _teacher_stages(stages, ALIGNED):
        tokens = sum(record["tokens"] for record in records)
        share = sum(record[ALIGNED.key(name)] * record["tokens"] for record in records) / max(1, tokens)
        part = Part(name, share, f"{share:.1%}", colors[name])
        rows.append((f"{stage} · {name}", [part], f"{share:.1%} of {tokens:,.0f} tokens"))
    note = "The share of the student's predicted tokens at which the teacher's tokenizer has read equally many bytes."
    return charts.bar_rows(rows, full=1.0) + _note(note) if rows else ""


def _asked_section(stages: dict[str, list[Record]]) -> str:
    rows = []
    for stage, name, records in _teacher_stages(stages, FORWARDED):
        asked = sum(record[FORWARDED.key(name)] for record in records)
        stored = sum(record.get(STORED.key(name), 0.0) for record in records)
        parts = [Part("asked", asked, f"{asked:,.0f}", SERIES[0]), Part("stored", stored, f"{stored:,.0f}", SERIES[7])]
        rows.append((f"{stage} · {name}", parts, f"{asked:,.0f} asked, {stored:,.0f} from the store"))
    if not rows:
        return ""
    full = max(sum(part.value for part in parts) for _, parts, _ in rows)
    note = (
        "Samples over all steps. A teacher always scores whole units: where one sample of a unit is missing in the "
        "store, the whole unit is asked, and the samples that were there count on both sides."
    )
    keys = [Part(FORWARDED.title, 0, "", SERIES[0]), Part(STORED.title, 0, "", SERIES[7])]
    return charts.legend(keys) + charts.bar_rows(rows, full) + _note(note) + _dropped_note(stages)


def _dropped_note(stages: dict[str, list[Record]]) -> str:
    """What was fused without some of its teachers, because they were gone; nothing where nothing was."""
    counts = {
        f"{stage} · {name}": sum(record[DROPPED.key(name)] for record in records)
        for stage, name, records in _teacher_stages(stages, DROPPED)
    }
    lost = {where: count for where, count in counts.items() if count}
    if not lost:
        return ""
    where = ", ".join(f"{where}: {count:,.0f}" for where, count in lost.items())
    return _note(
        f"{sum(lost.values()):,.0f} (sample, teacher) pairs were dropped because the teacher was gone "
        f"(serving.on_missing: drop), and the remaining teachers counted more there. {where}."
    )


def _teacher_stages(stages: dict[str, list[Record]], metric: Metric) -> Iterator[tuple[str, str, list[Record]]]:
    for stage, records in stages.items():
        for name in _suffixes({stage: records}, metric):
            yield stage, name, [record for record in records if metric.key(name) in record]


# --- time, data, configuration ------------------------------


def _time_section(times: dict[str, float], stages: dict[str, list[Record]]) -> str:
    body = ""
    if times:
        total = sum(times.values()) or 1.0
        parts = [
            Part(name, seconds, f"{duration(seconds)} ({seconds / total:.0%})", SERIES[i % len(SERIES)])
            for i, (name, seconds) in enumerate(times.items())
        ]
        body += charts.stacked_bar(parts) + charts.legend(parts)
        body += _note(f"{duration(total)} in all, as the program that drives the run measured it.")
    rows = []
    for stage, records in stages.items():
        seconds = sum(record["seconds"] for record in records)
        waited = sum(record["seconds"] * record["wait_share"] for record in records)
        share = waited / seconds if seconds else 0.0
        speed = sum(record["tokens"] for record in records) / seconds if seconds else 0.0
        parts = [Part("waiting", share, "", SERIES[7]), Part("training", 1 - share, "", SERIES[0])]
        rows.append((stage, parts, f"{share:.0%} of {duration(seconds)} waiting, {speed:,.0f} tokens/s"))
    if rows:
        keys = [Part("waiting for prepared data", 0, "", SERIES[7]), Part("training", 0, "", SERIES[0])]
        body += "<h3>Steps</h3>" + charts.legend(keys) + charts.bar_rows(rows, full=1.0)
        body += _note("Waiting: for the data and, in stages with teachers, for their answers and the alignment.")
    return body


def duration(seconds: float) -> str:
    """For example 3.2 s, 4:05 min, 2:15 h."""
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02d} min"
    return f"{whole // 3600}:{whole % 3600 // 60:02d} h"


def _data_section(data: Record, stages: dict[str, list[Record]]) -> str:
    if not data:
        return ""
    damaged = sum(record.get("damaged", 0) for records in stages.values() for record in records)
    reason = f"the first: {data['first_bad']}" if data.get("first_bad") else ""
    rows = [
        ("rows read", data["rows"], ""),
        ("malformed rows, skipped", data["bad_rows"], reason),
        ("samples too long, dropped", data["too_long"], ""),
        ("samples that a model cannot read, dropped", data.get("unreadable", 0), data.get("first_unreadable", "")),
        ("samples trained on", data["samples"], "one for each assistant turn (or pair) of a row"),
        ("of these, prompt cut from the left", data["cut"], ""),
    ]
    if damaged:
        rows.append(("damaged entries of the signal store, asked again", damaged, ""))
    cells = "".join(
        f'<tr><th>{escape(name)}</th><td>{number:,.0f}</td><td class="text">{escape(str(text))}</td></tr>'
        for name, number, text in rows
    )
    return f'<table class="counts"><tbody>{cells}</tbody></table>'


def _config_section(config: Record) -> str:
    if not config:
        return ""
    text = escape(json.dumps(config, indent=2, ensure_ascii=False))
    return f"<details><summary>All settings, defaults filled in (config.json)</summary><pre>{text}</pre></details>"
