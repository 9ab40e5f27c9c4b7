"""Metrics: an append-only `metrics.jsonl` in the run folder, and the live line that reads it.

The student's first worker appends one record per optimiser step; whoever wants to know (the terminal, the report)
reads the file. So a record survives whatever dies, and nothing else has to be running.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class MetricsWriter:
    """Appends records to `metrics.jsonl`, which the students of a pairwise stage write together, from any node.

    A record is one write under a lock: lines stay whole and none is lost, on network file systems too, where
    appending alone is not atomic. A file system without locks has O_APPEND only.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = path.open("a+b", buffering=0)

    def write(self, record: dict[str, Any]) -> None:
        """Append one record, with the time."""
        line = json.dumps({**record, "time": round(time.time(), 3)}).encode() + b"\n"
        with contextlib.suppress(OSError):
            fcntl.flock(self.file, fcntl.LOCK_EX)
        try:
            self.file.write(b"\n" + line if self._torn() else line)
        finally:
            with contextlib.suppress(OSError):
                fcntl.flock(self.file, fcntl.LOCK_UN)

    def _torn(self) -> bool:
        """Whether the last line is that of a killed writer."""
        if not self.file.seek(0, os.SEEK_END):
            return False
        self.file.seek(-1, os.SEEK_END)
        return self.file.read(1) != b"\n"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All records, each step of a stage once: where it was done again after a restart, the last record of it."""
    last: dict[tuple[str, int], dict[str, Any]] = {}
    for record in _records(path):
        last[(record["stage"], record["step"])] = record
    return list(last.values())


def record_of(line: bytes) -> dict[str, Any] | None:
    """The record of a line; None where it is none: torn by a killed writer, or written by something else."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and {"stage", "step"} <= record.keys() else None


def _records(path: Path) -> Iterator[dict[str, Any]]:
    if not path.exists():
        return
    for line in path.read_bytes().splitlines():
        record = record_of(line)
        if record is not None:
            yield record
