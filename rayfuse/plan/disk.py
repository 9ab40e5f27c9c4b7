"""Disk space of a run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rayfuse.config import Config
from rayfuse.models.loading import (
    WEIGHT_FILES,
)

if TYPE_CHECKING:
    pass


def disk_need(config: Config, index: int) -> float:
    """Bytes of a stage: its model, and checkpoints of float32 weights with two moments."""
    folder = Path(config.student.model)
    names = [folder / config.student.gguf_file] if config.student.gguf_file else list(folder.glob(WEIGHT_FILES))
    weights = sum(path.stat().st_size for path in names if path.exists())
    stage = config.stages[index]
    checkpoints = stage.keep + 1 if stage.steps is None or stage.steps > stage.save_every else 0
    return weights * (2 + 6 * checkpoints)
