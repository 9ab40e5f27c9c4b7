"""Checkpoints: written completely or not at all.

`checkpoints/step_N/` holds safetensors files and, written last, `MANIFEST.json` with the size and sha256 of each, the
data cursor and the identity of the run. The folder gets its name by a rename when all of it is on disk. Whoever
resumes takes the newest folder whose manifest holds; `checkpoints.jsonl` only tells people the history.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from rayfuse.errors import CheckpointError
from rayfuse.files import sync_folder, write_whole

log = logging.getLogger(__name__)
State = dict[str, dict[str, torch.Tensor]]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that holds.

    Attributes:
        step: optimiser steps done.
        folder: where it is.
    """

    step: int
    folder: Path

    def load(self, name: str) -> dict[str, torch.Tensor]:
        """The tensors of one file, by its name without suffix."""
        return load_file(self.folder / f"{name}.safetensors")


def save_checkpoint(
    stage_folder: Path,
    step: int,
    identity: str,
    state: State,
    *,
    rank: int = 0,
    world: int = 1,
    barrier: Callable[[], None] = lambda: None,
    keep: int = 2,
) -> None:
    """Write `checkpoints/step_N` together: rank 0 the state, every rank its random state, rank 0 the manifest last.

    Args:
        stage_folder: folder of the stage, on a file system that every rank sees.
        step: optimiser steps done; also the data cursor, for the order of the units depends on seed and step alone.
        identity: hash of everything the run's result depends on; a checkpoint of another run is refused.
        state: file name -> tensors; used on rank 0.
        rank, world, barrier: this worker among all.
        keep: older checkpoints beyond this many are removed.
    """
    root = stage_folder / "checkpoints"
    half = root / f".step_{step}.half"
    final = root / f"step_{step}"
    if rank == 0:
        shutil.rmtree(half, ignore_errors=True)
        half.mkdir(parents=True)
    barrier()
    save_file(_random_state(), half / f"rng-{rank}.safetensors")
    if rank == 0:
        for name, tensors in state.items():
            save_file(tensors, half / f"{name}.safetensors")
    barrier()
    if rank == 0:
        files = {path.name: _describe(path) for path in sorted(half.iterdir())}
        manifest = {"step": step, "world": world, "identity": identity, "files": files}
        write_whole(half / "MANIFEST.json", json.dumps(manifest, indent=2))
        shutil.rmtree(final, ignore_errors=True)
        half.rename(final)
        sync_folder(root)
        with (stage_folder / "checkpoints.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "folder": final.name, "time": time.time()}) + "\n")
        for old in sorted(_steps(root))[:-keep]:
            shutil.rmtree(root / f"step_{old}", ignore_errors=True)
    barrier()


def latest_checkpoint(stage_folder: Path, identity: str) -> Checkpoint | None:
    """The newest checkpoint that holds, or None. A damaged one is passed over with a warning.

    Raises:
        CheckpointError: the newest that holds belongs to another run.
    """
    root = stage_folder / "checkpoints"
    for step in sorted(_steps(root), reverse=True):
        folder = root / f"step_{step}"
        try:
            manifest = json.loads((folder / "MANIFEST.json").read_text(encoding="utf-8"))
            for name, described in manifest["files"].items():
                if _describe(folder / name) != described:
                    raise ValueError(f"{name} is not what the manifest describes")
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("checkpoint %s is damaged and is passed over: %s", folder, error)
            continue
        if manifest["identity"] != identity:
            raise CheckpointError(
                f"{folder} belongs to another run: data, models, stage or number of workers changed since. "
                "Use another `output`, or undo the change"
            )
        return Checkpoint(step, folder)
    return None


def restore_random_state(checkpoint: Checkpoint, rank: int) -> None:
    """Set this worker's random state to that of the checkpoint."""
    tensors = checkpoint.load(f"rng-{rank}")
    torch.set_rng_state(tensors["cpu"])
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"])


def _random_state() -> dict[str, torch.Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _steps(root: Path) -> list[int]:
    return [int(path.name[5:]) for path in root.glob("step_*") if path.name[5:].isdigit()]


def _describe(path: Path) -> dict[str, int | str]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        os.fsync(file.fileno())
    return {"size": path.stat().st_size, "sha256": digest}
