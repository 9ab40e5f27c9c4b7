"""Checkpoints: written completely or not at all.

`checkpoints/step_N/` holds safetensors files, of which every rank writes its own, and, written last, `MANIFEST.json`
with the size and sha256 of each, the data cursor and the identity of the run. The folder gets its name by a rename when
all of it is on disk. Whoever resumes takes the newest folder whose manifest holds; `checkpoints.jsonl` only tells
people the history.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from rayfuse.errors import CheckpointError
from rayfuse.files import sync_folder, write_whole

log = logging.getLogger(__name__)
State = Mapping[str, Mapping[str, torch.Tensor]]
"""Name of a file without suffix -> its tensors."""
RANDOM = "rng-"
"""Files of the ranks' random states begin so; all others are the engine's."""


class Tensors(Mapping[str, torch.Tensor]):
    """The tensors of a safetensors file, each read when it is asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with safe_open(path, framework="pt") as file:
            self.names = list(file.keys())

    def __getitem__(self, name: str) -> torch.Tensor:
        with safe_open(self.path, framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


class Files(State):
    """The engine's files of a checkpoint by their names without suffix; nothing is read before it is asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        names = sorted(path.stem for path in folder.glob("*.safetensors"))
        self.names = [name for name in names if not name.startswith(RANDOM)]

    def __getitem__(self, name: str) -> Tensors:
        if name not in self.names:
            raise KeyError(name)
        return Tensors(self.folder / f"{name}.safetensors")

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


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

    @property
    def state(self) -> State:
        """What the engines of all ranks wrote."""
        return Files(self.folder)


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
    """Write `checkpoints/step_N` together: every rank its part and its random state, then rank 0 the manifest.

    Args:
        stage_folder: folder of the stage, on a file system that every rank sees.
        step: optimiser steps done; also the data cursor, for the order of the units depends on seed and step alone.
        identity: hash of everything the run's result depends on; a checkpoint of another run is refused.
        state: file name -> tensors of this rank's part; no two ranks have a file of the same name.
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
    save_file(_random_state(), half / f"{RANDOM}{rank}.safetensors")
    for name, tensors in state.items():
        path = half / f"{name}.safetensors"
        if name.startswith(RANDOM) or path.exists():
            raise CheckpointError(f"two ranks, or an engine and its random state, write the file {path.name}")
        save_file(dict(tensors), path)
    barrier()
    if rank == 0:
        files = {path.name: describe(path) for path in sorted(half.iterdir())}
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
                if describe(folder / name) != described:
                    raise ValueError(f"{name} is not what the manifest describes")
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("checkpoint %s is damaged and is passed over: %s", folder, error)
            continue
        if manifest["identity"] != identity:
            raise CheckpointError(
                f"{folder} belongs to another run: data, models, engine or stage changed since. "
                "Use another `output`, or undo the change"
            )
        return Checkpoint(step, folder)
    return None


def restore_random_state(checkpoint: Checkpoint, rank: int) -> None:
    """Set this worker's random state to that of the checkpoint; a rank that it does not have keeps its own."""
    if not (checkpoint.folder / f"{RANDOM}{rank}.safetensors").exists():
        return
    tensors = checkpoint.load(f"{RANDOM}{rank}")
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


def describe(path: Path) -> dict[str, int | str]:
    """Size and sha256 of a file, as a manifest holds them; the file is on the disk then."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        os.fsync(file.fileno())
    return {"size": path.stat().st_size, "sha256": digest}
