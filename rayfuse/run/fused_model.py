"""The model that a run ends with: that of the last stage, in the number format that was asked for."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from rayfuse.config import Config
from rayfuse.models.folder import save_model, write_in_format
from rayfuse.models.loading import load_causal_lm, model_folder, stored_dtype
from rayfuse.models.shards import FLOATS, Shards

KEPT_ENOUGH = 0.99
"""A rounding that keeps less of the update than this is warned of in colour."""


@dataclass(frozen=True)
class Saved:
    """How the fused model was written.

    Attributes:
        dtype: number format of its weights.
        update_kept: share of the training's update that survived the rounding to it; None: nothing was rounded, or
            nothing was trained.
    """

    dtype: str
    update_kept: float | None

    def as_dict(self) -> dict[str, Any]:
        """For results.json."""
        return asdict(self)


def write_fused(config: Config, folder: Path, console: Console) -> Saved:
    """Write the last stage's model into the empty `folder`, and say how much of the training the rounding keeps.

    Raises:
        ModelError: a value leaves the range of the number format; the stages' models stay.
    """
    student = config.student
    dtype = student.save_dtype or stored_dtype(student)
    last = config.stage_folder(len(config.stages) - 1) / "model"
    if dtype == "float32":
        shutil.copytree(last, folder, dirs_exist_ok=True)
        return Saved(dtype, None)
    with _start(config, Shards.open(last)) as start:
        kept = write_in_format(last, folder, dtype, start)
    if kept is not None:
        color = "yellow" if kept < KEPT_ENOUGH else "default"
        asked = "student.save_dtype" if student.save_dtype else "the pivot's own format; see student.save_dtype"
        console.print(
            f"[{color}]the fused model is in {dtype} ({asked}): {kept:.1%} of the training's update survives this "
            f"rounding[/]; all of it, in float32, is in {last}",
            highlight=False,
            soft_wrap=True,
        )
    return Saved(dtype, kept)


@contextmanager
def _start(config: Config, last: Shards) -> Iterator[Shards]:
    """The weights that the run began with, under the names that a stage's model has."""
    student = config.student
    if student.gguf_file is None:
        start = Shards.open(model_folder(student, student.model))
        shapes = {name: kind.shape for name, kind in start.kinds.items() if kind.dtype in FLOATS}
        if all(shapes.get(name) == kind.shape for name, kind in last.kinds.items() if kind.dtype in FLOATS):
            yield start
            return
    # Another format, or older names: as transformers reads and writes them.
    with tempfile.TemporaryDirectory(dir=config.output, prefix=".start.") as folder:
        begun = load_causal_lm(student, dtype="float32")
        save_model(begun, begun.state_dict(), Path(folder))
        yield Shards.open(Path(folder))
