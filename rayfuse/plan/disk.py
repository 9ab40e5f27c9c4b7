"""Disk space of a run."""

from __future__ import annotations

import math
from pathlib import Path

from rayfuse.config import Config
from rayfuse.errors import ModelError
from rayfuse.models.loading import stored_dtype
from rayfuse.models.shards import FLOATS, Shards

FLOAT32 = 4
MOMENTS = 2
"""AdamW's moments, in float32 as the weights in training are."""


def disk_need(config: Config, index: int) -> float:
    """Bytes of a stage: its float32 model, and checkpoints of float32 weights with two moments.

    A pairwise stage has them for every student, and the merged model besides; the last stage has the fused model in its
    own number format too. 0 where the weights are not on this machine.
    """
    parameters = _parameters(config)
    stage = config.stages[index]
    checkpoints = stage.keep + 1 if stage.steps is None or stage.steps > stage.save_every else 0
    trained = parameters * FLOAT32 * (1 + (1 + MOMENTS) * checkpoints)
    if stage.pairwise is not None:
        trained = len(config.teachers) * trained + parameters * FLOAT32
    if index < len(config.stages) - 1 or not parameters:
        return trained
    dtype = config.student.save_dtype or stored_dtype(config.student)
    return trained + parameters * (FLOAT32 if dtype == "float32" else 2)


def _parameters(config: Config) -> int:
    """Weights of the pivot, by the headers of its files."""
    folder = Path(config.student.model)
    if not folder.is_dir():
        return 0
    if config.student.gguf_file:
        return _in_gguf(folder / config.student.gguf_file)
    try:
        kinds = Shards.open(folder).kinds.values()
    except ModelError:  # the check of models says what is wrong with them
        return 0
    return sum(math.prod(kind.shape) for kind in kinds if kind.dtype in FLOATS)


def _in_gguf(path: Path) -> int:
    try:
        from gguf import GGUFReader
    except ImportError:  # transformers needs it too: the check of models says so
        return 0
    return sum(int(tensor.n_elements) for tensor in GGUFReader(path).tensors) if path.exists() else 0
