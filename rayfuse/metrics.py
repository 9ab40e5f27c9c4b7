"""Metrics: an append-only `metrics.jsonl` in the run folder, and the live line that reads it.

The student's first worker appends one record per optimiser step; whoever wants to know (the terminal, the report)
reads the file. So a record survives whatever dies, and nothing else has to be running.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

PLAIN_EVERY_S = 10.0
"""Seconds between two lines where there is no terminal."""


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
    """All records; where steps were done again after a restart, only the last record of each step."""
    last: dict[tuple[str, int], dict[str, Any]] = {}
    for record in _records(path):
        last[(record["stage"], record["step"])] = record
    return list(last.values())


def _records(path: Path) -> Iterator[dict[str, Any]]:
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(line)
        except ValueError:  # the last line of a killed run
            continue


def line_of(record: dict[str, Any], seconds_left: float | None) -> str:
    """One record as a person reads it."""
    parts = [f"{record['stage']}  step {record['step']}/{record['steps']}", f"loss {record['loss']:.4f}"]
    parts += [f"{key.removeprefix('loss_')} {value:.3f}" for key, value in record.items() if key.startswith("loss_")]
    parts.append(f"{record['tokens_per_second']:,.0f} tokens/s")
    if seconds_left is not None:
        parts.append(f"ETA {int(seconds_left // 60)}:{int(seconds_left % 60):02d}")
    parts.append(f"waiting {record['wait_share']:.0%}")
    return "  ".join(parts)


class LiveLine:
    """Shows the newest record while a stage runs: one line that changes on a terminal, plain lines in a log."""

    def __init__(self, path: Path, console: Console) -> None:
        self.path = path
        self.console = console
        self.done = threading.Event()
        self.offset = path.stat().st_size if path.exists() else 0
        self.begun: dict[str, tuple[int, float]] = {}
        self.shown: tuple[str, int] | None = None
        self.shown_at = 0.0
        self.thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> LiveLine:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.thread.join()
        self._show(final=True)
        if self.console.is_terminal:
            self.console.print()

    def _follow(self) -> None:
        while not self.done.wait(0.5):
            self._show()

    def _newest(self) -> dict[str, Any] | None:
        if not self.path.exists():
            return None
        with self.path.open("rb") as file:
            file.seek(self.offset)
            complete = file.read().rpartition(b"\n")[0]
        return json.loads(complete.rpartition(b"\n")[2]) if complete else None

    def _show(self, *, final: bool = False) -> None:
        record = self._newest()
        if record is None or (record["stage"], record["step"]) == self.shown:
            return
        now = time.monotonic()
        first, at = self.begun.setdefault(record["stage"], (record["step"], now))
        steps = record["step"] - first
        left = (now - at) / steps * (record["steps"] - record["step"]) if steps > 0 else None
        line = line_of(record, left)
        if self.console.is_terminal:
            self.shown = (record["stage"], record["step"])
            text = Text(line, no_wrap=True, overflow="ellipsis")
            text.truncate(self.console.width - 1, pad=True)
            self.console.print(text, end="\r")
        elif final or now - self.shown_at >= PLAIN_EVERY_S:
            self.shown, self.shown_at = (record["stage"], record["step"]), now
            self.console.print(line, highlight=False, soft_wrap=True)
