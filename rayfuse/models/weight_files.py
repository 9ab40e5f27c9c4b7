"""Which files hold a model's weights: safetensors in its own folder, and nothing else. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from rayfuse.errors import ModelError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a folder's weights, as transformers picks them: SINGLE, or else those that INDEX names.

    Raises:
        ModelError: there are none (pickled weights are refused), or the index is damaged, or names a file that is
            pickled, outside of the folder or not there.
    """
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if not (folder / INDEX).is_file():
        found = ", ".join(sorted(path.name for path in folder.iterdir())[:8])
        raise ModelError(
            f"{folder} has no *.safetensors (it has: {found}) that transformers reads, {SINGLE} or what {INDEX} names; "
            "pickled weights are refused, convert them with transformers' save_pretrained"
        )
    files = sorted(set(read_index(folder)["weight_map"].values()))
    absent = [file for file in files if not (folder / file).is_file()]
    if absent:
        raise ModelError(f"{folder} is incomplete: {INDEX} names {some_of(absent)}, which is not there")
    return [folder / file for file in files]


def read_index(folder: Path) -> dict[str, Any]:
    """The content of INDEX, whose files are safetensors of that folder."""
    try:
        index: dict[str, Any] = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        files = sorted(set(map(str, dict(index["weight_map"]).values())))
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{folder / INDEX} is damaged: {type(error).__name__}: {error}") from error
    for file in files:
        if Path(file).name != file:
            raise ModelError(f"{folder / INDEX} names the file {file!r}, which is not in that folder")
        if not file.endswith(".safetensors"):
            raise ModelError(
                f"{folder / INDEX} names the file {file!r}, which is no safetensors file; pickled weights are refused"
            )
    return index


def index_decides(folder: Path) -> bool:
    """Whether INDEX says something that the safetensors of a folder do not: a tensor that is not in one file alone.

    Raises:
        ModelError: as `weight_files`; or a file is damaged.
    """
    if (folder / SINGLE).is_file() or not (folder / INDEX).is_file():
        return False
    holders: dict[str, list[str]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="numpy") as shard:
                for name in shard.keys():  # noqa: SIM118
                    holders.setdefault(name, []).append(path.name)
        except (SafetensorError, OSError) as error:
            raise ModelError(f"cannot read {path}: {type(error).__name__}: {error}") from error
    return any(holders.get(name) != [file] for name, file in read_index(folder)["weight_map"].items())


def some_of(names: Sequence[str]) -> str:
    """The first three names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
