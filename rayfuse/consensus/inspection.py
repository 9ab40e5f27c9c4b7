"""`rayfuse inspect labels`: which labels of a run's data are probably wrong, and what is believed instead."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table
from rich.text import Text

from rayfuse.consensus.make import summary
from rayfuse.report.consensus import doubtful_labels


def labels_table(run: Path, first: int) -> Table:
    """The doubtful labels of a run, the most doubtful first.

    Args:
        run: its folder.
        first: how many at most; 0: all.

    Raises:
        DataError: the run has no consensus.
    """
    found = summary(run)
    doubtful = doubtful_labels(run)
    shown = doubtful[:first] if first else doubtful
    wrong = found["wrong labels"]
    share = "the data have no labels" if wrong is None else f"{wrong['right']:.1%} of {wrong['answers']:,} are wrong"
    table = Table(title=f"{len(shown):,} of {len(doubtful):,} doubtful labels; estimated: {share}", show_lines=True)
    for name in ("prompt", "label", "believed instead", "said by"):
        table.add_column(name, overflow="fold")
    table.add_column("p(right)", justify="right")
    for row in shown:
        texts = [row["prompt"], row["label"], row["better"] or "nothing", ", ".join(row["sources"])]
        table.add_row(*(Text(text) for text in texts), f"{row['right']:.1%}")
    table.caption = "; ".join(finding["text"] for finding in found["findings"]) or None
    return table
