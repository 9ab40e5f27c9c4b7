"""The report's section on who is right: accuracy of each source by field, wrong labels, examples."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

EXAMPLES = 12
"""Doubtful labels that the report shows; all of them are in consensus/labels.jsonl."""


def doubtful_labels(output: Path) -> list[dict[str, Any]]:
    """Labels of a run that are probably wrong, the most doubtful first; none where it has no consensus."""
    path = output / "consensus" / "labels.jsonl"
    return (
        [json.loads(line) for line in path.read_text(encoding="utf-8", errors="replace").splitlines()]
        if path.exists()
        else []
    )


def consensus_section(found: dict[str, Any], doubtful: Sequence[dict[str, Any]]) -> str:
    """HTML of a run's consensus; empty where the run has none.

    Args:
        found: `consensus` of results.json, see consensus.make.summary_of.
        doubtful: rows of consensus/labels.jsonl, the most doubtful first.
    """
    if not found:
        return ""
    return _opening(found) + _findings(found) + _sources(found) + _examples(doubtful)


def _opening(found: dict[str, Any]) -> str:
    wrong = found["wrong labels"]
    labels = (
        "no prompt has a label"
        if wrong is None
        else f"{wrong['right']:.1%} of {wrong['answers']:,} labels are estimated to be wrong "
        f"({wrong['low']:.1%} to {wrong['high']:.1%})"
    )
    wording = ", ".join(f"{name} {count:,}" for name, count in found["wording of"].items())
    return (
        f"<p>{escape(labels)}; {found['kept']:,} of {found['prompts']:,} prompts have an answer to learn from, in the "
        f"words of: {escape(wording)}. Answers were compared by {escape(found['equivalence']['name'])} "
        f"({escape(found['equivalence']['reason'])}).</p>"
    )


def _findings(found: dict[str, Any]) -> str:
    return "".join(f'<p class="note">{escape(finding["text"])}</p>' for finding in found["findings"])


def _sources(found: dict[str, Any]) -> str:
    """Estimated accuracies: a row per source, a column over all and one per field."""
    fields = list(dict.fromkeys(one["field"] for one in found["sources"]))
    of = {(one["source"], one["field"]): one for one in found["sources"]}
    head = "".join(f"<th>{escape(field or 'all')}</th>" for field in fields)
    rows = "".join(
        f"<tr><th>{escape(source)}</th>{''.join(_cell(of.get((source, field))) for field in fields)}</tr>"
        for source in dict.fromkeys(one["source"] for one in found["sources"])
    )
    origin = "fields as the data name them" if found["fields"]["given"] else "groups of similar prompts, found"
    note = f"Estimated share of right answers, without any known to be right, with its 95% interval; {origin}."
    return f"<table><thead><tr><th></th>{head}</tr></thead><tbody>{rows}</tbody></table><p class='note'>{note}</p>"


def _cell(one: dict[str, Any] | None) -> str:
    if one is None:
        return "<td></td>"
    return f"<td>{one['right']:.0%} <small>{one['low']:.0%}–{one['high']:.0%}</small></td>"


def _examples(doubtful: Sequence[dict[str, Any]]) -> str:
    if not doubtful:
        return ""
    rows = "".join(
        f'<tr><td class="text">{escape(_short(row["prompt"]))}</td><td class="text">{escape(_short(row["label"]))}</td>'
        f'<td class="text">{escape(_short(row["better"] or "nothing"))}</td>'
        f'<td class="text">{escape(", ".join(row["sources"]))}</td><td>{row["right"]:.1%}</td></tr>'
        for row in doubtful[:EXAMPLES]
    )
    head = "<tr><th>prompt</th><th>label</th><th>believed instead</th><th>said by</th><th>p(label is right)</th></tr>"
    note = f"The most doubtful of {len(doubtful):,} labels that are probably wrong; all: rayfuse inspect labels."
    return f"<table><thead>{head}</thead><tbody>{rows}</tbody></table><p class='note'>{note}</p>"


def _short(text: str) -> str:
    return text if len(text) <= 120 else f"{text[:117]}..."
