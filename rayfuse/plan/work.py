"""How much a run has to do: samples, optimiser steps, tokens, and what the store will hold."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rayfuse.config import Config, Data, Stage
from rayfuse.config.data import Source
from rayfuse.data.files import kind_of
from rayfuse.errors import PlanError

HEADER = 1000
"""Bytes of a stored object beside its rows (signals/codec.py)."""
LARGEST_COUNTED = 20e9
"""Bytes of text that are read to count its lines; what is larger is not planned without --samples."""


@dataclass(frozen=True)
class Work:
    """What a stage does.

    Attributes:
        steps: optimiser steps.
        samples: prompts of its data that it reads, each counted once.
        sides: responses of each prompt.
        tokens: student tokens that go through the student, forward and backward.
        scored: student tokens whose answers the stage needs, each text once.
    """

    steps: int
    samples: int
    sides: int
    tokens: float
    scored: float


def stage_work(config: Config, stage: Stage, samples: int, length: float) -> Work:
    """What a stage does with `samples` prompts (each response `length` student tokens, its prompt included)."""
    steps = stage.steps or math.ceil((stage.epochs or 1.0) * samples / stage.batch_size)
    sides = max(1, len(stage.sides))
    read = min(samples, steps * stage.batch_size)
    return Work(steps, read, sides, steps * stage.batch_size * sides * length, read * sides * length)


def stage_data(config: Config, stage: Stage) -> Data:
    """The section that a stage reads."""
    return config.preferences if stage.uses_preferences and config.preferences is not None else config.data


def section_name(config: Config, stage: Stage) -> str:
    """The name of that section."""
    return "preferences" if stage_data(config, stage) is config.preferences else "data"


def count_samples(config: Config, stage: Stage) -> int:
    """Rows of a stage's data, weights applied: by the files where they are here, by `limit`, or what its steps read.

    Raises:
        PlanError: nothing of this says how many there are.
    """
    data = stage_data(config, stage)
    total = 0.0
    for source in data.parts:
        rows = source.limit if source.limit is not None and not _here(source) else _rows(source)
        if rows is None:
            if stage.steps is not None:
                return stage.steps * stage.batch_size
            raise PlanError(
                f"how many samples {source.label} has cannot be told from here: say so with --samples N, give the data "
                "a `limit`, or the stage its `steps`"
            )
        total += source.weight * min(rows, source.limit or rows)
    return max(1, round(total))


def _here(source: Source) -> bool:
    return all(Path(path).exists() for path in source.paths)


def _rows(source: Source) -> int | None:
    """Rows of a source's files; None where they are not on this machine, or not counted quickly."""
    count = 0
    for path in source.paths:
        files = sorted(Path(path).rglob("*")) if Path(path).is_dir() else list(_matching(path))
        if not files:
            return None
        for file in files:
            rows = _rows_of_file(file) if file.is_file() else 0
            if rows is None:
                return None
            count += rows
    return count


def _matching(path: str) -> Iterator[Path]:
    if Path(path).exists():
        yield Path(path)
    elif any(sign in path for sign in "*?["):
        place = Path(path)
        yield from sorted(place.parent.glob(place.name))


def _rows_of_file(file: Path) -> int | None:
    kind, packed = kind_of(str(file))
    if kind == ".parquet" and not packed:
        import pyarrow.parquet as pq

        return int(pq.read_metadata(file).num_rows)
    if kind not in (".jsonl", ".ndjson") or packed or file.stat().st_size > LARGEST_COUNTED:
        return None
    with file.open("rb") as lines:
        return sum(1 for line in lines if line.strip())


def store_size(k: int, samples: int, teachers: int, rows: float) -> tuple[int, float]:
    """Objects of the signal store and their bytes: `rows` positions in all of `samples` texts, for each teacher.

    A row is float16 and 3 bytes of id per rank, log-sum-exp, the next token's log-probability and a byte count.
    """
    return samples * teachers, teachers * (rows * (5 * k + 9) + samples * HEADER)
