"""The line on the terminal that tells of the step in progress."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from rayfuse.metrics.records import record_of

PLAIN_EVERY_S = 10.0
"""Seconds between two lines where there is no terminal."""


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
        return record_of(complete.rpartition(b"\n")[2]) if complete else None

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
