"""The data of a run with a consensus: what is probably right, in place of what the rows say."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from rayfuse.config import Config, Consensus, Data
from rayfuse.consensus.make import FOLDER, make_consensus
from rayfuse.errors import DataError
from rayfuse.signals.store import SignalStore
from rayfuse.teachers.identity import identify, live
from rayfuse.teachers.parity.check import check_parity


def with_consensus(config: Config, settings: Consensus, console: Console) -> Config:
    """Find out who is right, unless that is done; returns the configuration that learns from it.

    Where stages learn from pairs and the configuration names none, they learn from those of the consensus.

    Raises:
        RayfuseError: a model cannot answer, or there is nothing to learn from.
    """
    folder = Path(config.output) / FOLDER
    choices = folder / "choices.jsonl"
    if choices.exists() and (Path(config.output) / "stages").exists():  # else the configuration may have changed
        console.print(f"who is right is known already: {folder}", highlight=False)
    else:
        asked = live(identify(config.teachers, config.signals.k))
        models = [config.student, *config.teachers]
        check_parity(asked, config.signals.k, SignalStore(config.store_url), console, models)
        make_consensus(config, settings, console)
    return config.model_copy(update={"data": made_rows(config.data, choices), **preferences_of(config, folder)})


def preferences_of(config: Config, folder: Path) -> dict[str, Data]:
    """The key `preferences`, where stages learn from pairs or triples and the configuration names none.

    Stages on pairs beside one on triples learn from the triples: a row of three sides holds a pair.

    Raises:
        DataError: the consensus found none.
    """
    sides = [stage.sides for stage in config.stages if stage.uses_preferences]
    if config.preferences is not None or not sides:
        return {}
    three = any(len(names) > 2 for names in sides)
    path = folder / ("triples.jsonl" if three else "pairs.jsonl")
    if not path.stat().st_size:
        lacks = "that a teacher and the pivot answer right, and another answer wrong" if three else ""
        raise DataError(
            f"the consensus found no prompt {lacks or 'with a right answer and a wrong one'}: {path} is empty, and no "
            "stage can learn from it. Name `preferences`, or leave the stages on preferences out"
        )
    return {"preferences": made_rows(config.data, path)}


def made_rows(data: Data, path: Path) -> Data:
    """Rows that were made from `data`, read by the same rules."""
    return Data(path=str(path), **data.model_dump(include={"max_length", "too_long", "on_bad_row", "unit_size"}))
