"""The run folder: whose run it holds, and how long each part took."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rayfuse.config import Config, config_json
from rayfuse.errors import CheckpointError
from rayfuse.files import write_whole


def open_run_folder(config: Config, resume: bool) -> None:
    """Create the run folder with config.json, or make sure that the one there is of this configuration.

    Raises:
        CheckpointError: there is a run and `resume` was not asked for, or it is another run's.
    """
    folder = Path(config.output)
    there = folder / "config.json"
    text = config_json(config)
    if there.exists() and (folder / "stages").exists():  # a run that trained nothing has nothing to lose
        if not resume:
            raise CheckpointError(f"{folder} already holds a run: go on with --resume, or use another `output`")
        before, now = json.loads(there.read_text(encoding="utf-8")), json.loads(text)
        changed = sorted(key for key in now if before.get(key) != now[key] and key not in NOT_THE_RESULT)
        if changed:
            raise CheckpointError(
                f"{folder} holds a run with another configuration ({', '.join(changed)} changed): use another `output`"
            )
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(there, text)


NOT_THE_RESULT = ("evaluate", "cluster", "prefer", "serving")
"""Sections that a resumed run may change."""


class Stopwatch:
    """Seconds of each part of a run, kept in `times.json`, so that those of a resumed run add up."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seconds: dict[str, float] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Measure what runs inside."""
        begun = time.monotonic()
        try:
            yield
        finally:
            self.seconds[part] = round(self.seconds.get(part, 0.0) + time.monotonic() - begun, 2)
            write_whole(self.path, json.dumps(self.seconds, indent=2) + "\n")
