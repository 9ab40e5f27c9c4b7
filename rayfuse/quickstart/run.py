"""`rayfuse quickstart`: make the small world (once), then fuse it by the same code as any other run."""

from __future__ import annotations

import shutil
import time
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from rayfuse.config import Config, parse_config
from rayfuse.errors import CheckpointError
from rayfuse.quickstart.facts_world import build_facts_world
from rayfuse.quickstart.world import World
from rayfuse.run.fuse import fuse

CACHE = Path("~/.cache/rayfuse")
MARK = ".rayfuse-quickstart"
"""Name of the file that tells a quickstart's folder from one with somebody's work in it."""


def run_quickstart(folder: Path, cache: Path | None, console: Console) -> None:
    """Make the world where it is not in the cache, and fuse it into `folder`, which is emptied first.

    Raises:
        CheckpointError: `folder` holds something that is not an earlier quickstart.
    """
    begun = time.monotonic()
    if folder.exists() and any(folder.iterdir()):
        if not (folder / MARK).is_file():
            raise CheckpointError(f"{folder} holds something that is not an earlier quickstart; give another --folder")
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARK).touch()
    console.print(
        "Three small experts, each with a field of facts and a tokenizer of its own, teach a fourth model; "
        "30% of its labels are wrong.\nThe first time they are trained here: about a minute on two cores."
    )
    world = build_facts_world((cache or CACHE).expanduser(), progress=lambda line: console.print(f"  {line}"))
    config = quickstart_config(world, folder)
    (folder / "quickstart.yaml").write_text(
        yaml.safe_dump(config.model_dump(mode="json", exclude_unset=True), sort_keys=False), encoding="utf-8"
    )
    fuse(config, console=console)
    console.print(f"quickstart took {time.monotonic() - begun:.0f} s")


def quickstart_config(world: World, folder: Path) -> Config:
    """The packaged configuration with this world's paths."""
    text = files("rayfuse.quickstart").joinpath("quickstart.yaml").read_text(encoding="utf-8")
    tree: dict[str, Any] = yaml.safe_load(text.replace("WORLD", str(world.folder)).replace("OUTPUT", str(folder)))
    return parse_config(tree, "quickstart.yaml")
