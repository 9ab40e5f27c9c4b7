"""What the evaluation in results.json says: the scores with their intervals, the best, and the result in words.

The report, the model card and the command line all read it through these functions, so they cannot disagree.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.table import Table

BITS = "bits per byte"
ALL = "all"


@dataclass(frozen=True)
class Score:
    """One number of the result table with its 95% interval."""

    value: float
    low: float
    high: float
    is_share: bool

    @property
    def text(self) -> str:
        """As a person reads it."""
        return f"{self.value:.1%}" if self.is_share else f"{self.value:.3f}"

    @property
    def interval(self) -> str:
        """The 95% interval as a person reads it, in the unit of `text`."""
        return f"{100 * self.low:.1f}–{100 * self.high:.1f}" if self.is_share else f"{self.low:.3f}–{self.high:.3f}"


def columns(models: Sequence[dict[str, Any]]) -> list[str]:
    """The result table's columns: skills, all of them together, bits per byte. A single skill is "all" already."""
    skills = list(dict.fromkeys(skill for model in models for skill in model["accuracy"] if skill != ALL))
    shares = [*(skills if len(skills) > 1 else []), ALL] if any(model["accuracy"] for model in models) else []
    return [*shares, BITS] if models else []


def score(model: dict[str, Any], column: str) -> Score | None:
    """A model's number in a column; None where it was not measured, or is not a number."""
    if column == BITS:
        value, (low, high) = model["bits_per_byte"], model["bits_per_byte_interval"]
    elif column in model["accuracy"]:
        value, (low, high) = model["accuracy"][column]["share"], model["accuracy"][column]["interval"]
    else:
        return None
    return Score(value, low, high, column != BITS) if all(map(math.isfinite, (value, low, high))) else None


def best(models: Sequence[dict[str, Any]], column: str) -> set[str]:
    """Names of the pivot or stages with the best value in a column (ties: all of them); empty if nothing competes."""
    scores = {m["name"]: s.value for m in models if m["role"] != "teacher" and (s := score(m, column))}
    if len(scores) < 2:
        return set()
    top = min(scores.values()) if column == BITS else max(scores.values())
    return {name for name, value in scores.items() if value == top}


def difference(one: Score, other: Score) -> Score:
    """`one` minus `other` with a 95% interval from those of the two (Newcombe 1998, method 10).

    It takes the two as independent. They answer the same items, which as a rule makes the true interval narrower.
    """
    gap = one.value - other.value
    below = math.hypot(one.value - one.low, other.high - other.value)
    above = math.hypot(one.high - one.value, other.value - other.low)
    return Score(gap, gap - below, gap + above, one.is_share)


def fused_and_baseline(
    models: Sequence[dict[str, Any]],
) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """The last stage's model, and what it has to beat: SFT alone where the run has it, otherwise the pivot."""
    stages = [model for model in models if model["role"] == "stage"]
    if not stages:
        return None, None
    sft = [model for model in stages[:-1] if re.fullmatch(r"(\d+-)?sft", model["name"])]
    pivot = [model for model in models if model["role"] == "pivot"]
    is_sft = re.fullmatch(r"(\d+-)?sft", stages[-1]["name"]) is not None
    return stages[-1], next(reversed(pivot if is_sft else pivot + sft), None)


def headline(models: Sequence[dict[str, Any]]) -> tuple[str, str]:
    """The result as one plain sentence, and one on whether the difference to the baseline is real.

    Both are empty where nothing was evaluated.
    """
    fused, baseline = fused_and_baseline(models)
    if fused is None:
        return "", ""
    column = ALL if ALL in fused["accuracy"] else BITS
    own = score(fused, column)
    if own is None:
        return "", ""
    others = [(_called(m, baseline), s) for m in _compared(models, fused, baseline, column) if (s := score(m, column))]
    shown = _round([own, *(s for _, s in others)])
    rest = ", ".join(f"{name} {text}" for (name, _), text in zip(others, shown[1:], strict=True))
    if column == ALL:
        first = f"{fused['name']} answers {shown[0]} of {fused['accuracy'][ALL]['total']:,} held-out items"
    else:
        first = f"{fused['name']} needs {shown[0]} bits per byte of the held-out responses (less is better)"
    first += f"; {rest}." if rest else "."
    against = None if baseline is None else score(baseline, column)
    if baseline is None or against is None:
        return first, ""
    return first, _verdict(fused["name"], _called(baseline, baseline), difference(own, against))


def caveat(models: Sequence[dict[str, Any]], stages: Sequence[dict[str, Any]]) -> str:
    """What to know about the comparison: that the fused model goes on from the SFT model it is compared with.

    Args:
        models: the evaluation.
        stages: the `stages` of the resolved configuration.
    """
    names = [model["name"] for model in models if model["role"] == "stage"]
    if len(stages) < 2 or len(names) != len(stages) or stages[-1]["method"] == "sft":
        return ""
    if stages[-2]["method"] != "sft" or stages[-1]["start_from"] != "previous":
        return ""
    return f"{names[-1]} starts from {names[-2]}'s model, so it has also trained for longer."


def _compared(
    models: Sequence[dict[str, Any]], fused: dict[str, Any], baseline: dict[str, Any] | None, column: str
) -> list[dict[str, Any]]:
    """The models that the sentence names beside the fused one: baseline, pivot and the best teacher."""
    pivot = next((m for m in models if m["role"] == "pivot"), None)
    taught = [(s.value, m) for m in models if m["role"] == "teacher" and (s := score(m, column))]
    choose = min if column == BITS else max
    teacher = choose(taught, key=lambda pair: pair[0])[1] if taught else None
    named = [m for m in (baseline, pivot, teacher) if m is not None and m is not fused]
    return [m for index, m in enumerate(named) if m not in named[:index]]


def _called(model: dict[str, Any], baseline: dict[str, Any] | None) -> str:
    if model["role"] == "teacher":
        return f"the best teacher ({model['name']})"
    if model["role"] == "pivot":
        return "the pivot"
    return f"{model['name']} alone" if model is baseline else str(model["name"])


def _round(scores: Sequence[Score]) -> list[str]:
    """Whole per cents, unless that makes different values look equal."""
    if not scores[0].is_share:
        return [s.text for s in scores]
    whole = [f"{s.value:.0%}" for s in scores]
    return whole if len(set(whole)) == len({s.value for s in scores}) else [s.text for s in scores]


def _verdict(fused: str, baseline: str, gap: Score) -> str:
    if gap.is_share:
        size, interval = f"{100 * gap.value:+.1f} points", f"{100 * gap.low:+.1f} to {100 * gap.high:+.1f}"
    else:
        size, interval = f"{gap.value:+.3f} bits per byte", f"{gap.low:+.3f} to {gap.high:+.3f}"
    if gap.low <= 0 <= gap.high:
        return (
            f"This does not show that {fused} is better than {baseline}: "
            f"the difference is {size} (95% interval {interval}, zero included)."
        )
    better = (gap.value > 0) == gap.is_share
    word = "better" if better else "worse"
    return f"{fused} is {word} than {baseline}: the difference is {size} (95% interval {interval})."


def result_table(results: dict[str, Any]) -> Table:
    """The evaluation in results.json as a table for the terminal; the best non-teacher value of a column is bold."""
    models = results["models"]
    table = Table(title="Held-out items, with 95% intervals", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("model", overflow="fold")
    for column in columns(models):
        table.add_column(_title(column), justify="right", no_wrap=True)
    winners = {column: best(models, column) for column in columns(models)}
    previous = None
    for model in models:
        if previous not in (None, model["role"]):
            table.add_section()
        previous = model["role"]
        cells = []
        for column in columns(models):
            found = score(model, column)
            mark = ("[bold green]", "[/]") if model["name"] in winners[column] else ("", "")
            cells.append(f"{mark[0]}{found.text}{mark[1]}\n[dim]{found.interval}[/]" if found else "–")
        table.add_row(_plain(label(model)), *cells)
    return table


def label(model: dict[str, Any]) -> str:
    """A model's name in a table's first column."""
    return f"{model['name']} (teacher)" if model["role"] == "teacher" else str(model["name"])


def _title(column: str) -> str:
    return "bits/byte ↓" if column == BITS else _plain(column)


def _plain(text: str) -> str:
    """Text that rich shows as it is."""
    return text.replace("[", r"\[")
