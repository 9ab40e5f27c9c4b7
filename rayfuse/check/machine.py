"""Checks of where the run works: folder, store, GPUs, interpreters and serving."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from rayfuse.config import STAGES, Config
from rayfuse.errors import ConfigError
from rayfuse.signals.store import SignalStore
from rayfuse.teachers.environments import environment_fault

if TYPE_CHECKING:
    pass
from rayfuse.check.finding import Finding
from rayfuse.plan.disk import disk_need

PACKAGES = {"deepspeed": "deepspeed", "flash_attention_2": "flash_attn"}
"""What an engine or an attention of the student needs installed: its name -> the module."""


def check_output(config: Config) -> Iterator[Finding]:
    """The run folder is new or of this configuration, writable, and the disk has room for models and checkpoints."""
    folder = Path(config.output)
    if (folder / "config.json").exists():
        yield Finding(
            "output", f"{folder} already holds a run; go on with --resume, or use another folder", fault=False
        )
    existing = next(path for path in [folder, *folder.parents] if path.exists())
    if not existing.is_dir():
        yield Finding("output", f"{existing} is a file, so {folder} cannot be made; use another folder")
        return
    probe = existing / ".rayfuse-check"
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        yield Finding("output", f"{existing} is not writable: {error}")
        return
    needed = sum(disk_need(config, index) for index in range(len(config.stages)))
    free = shutil.disk_usage(existing).free
    if needed > free:
        yield Finding(
            "output",
            f"models and checkpoints need about {needed / 2**30:.1f} GiB, but {existing} has {free / 2**30:.1f} GiB "
            "free; free some, lower stages.N.keep, or use another folder",
        )


def check_store(config: Config) -> Iterator[Finding]:
    """The signal store can be written and read."""
    if config.teachers:
        store = SignalStore(config.store_url)
        root = Path(store.root)
        made = [path for path in (root, *root.parents) if not path.exists()] if store.local else []
        try:
            store.check()
        finally:
            for folder in made:  # a check leaves nothing behind
                with suppress(OSError):
                    folder.rmdir()
    yield from ()


def check_machine(config: Config) -> Iterator[Finding]:
    """The GPUs that an embedded run asks for are there."""
    import torch

    if (config.cluster.address or os.environ.get("RAY_ADDRESS") or "local") != "local":
        return
    wanted: dict[str, float] = {"student.gpus": config.student.gpus * config.student.workers}
    wanted |= {f"teachers.{i}.gpus": teacher.gpus for i, teacher in enumerate(config.teachers)}
    there = torch.cuda.device_count()
    missing = {where: gpus for where, gpus in wanted.items() if gpus > there}
    together = config.serving.mode == "online"  # otherwise teachers and student take turns
    if not missing and together and sum(wanted.values()) > there:
        missing = {"student.gpus, teachers.N.gpus": sum(wanted.values())}
    for where, gpus in missing.items():
        yield Finding(where, f"{gpus:g} GPUs are asked for, but this machine has {there}; lower it, or use a cluster")


def check_engine(config: Config) -> Iterator[Finding]:
    """What the student's engine and attention need is installed, and the engine can read the run's checkpoints."""
    student = config.student
    asked = {"student.engine": student.engine, "student.attention": student.attention}
    for where, name in asked.items():
        module = PACKAGES.get(name or "")
        if module is not None and find_spec(module) is None:
            other = "fsdp2 or ddp" if where == "student.engine" else "sdpa"
            yield Finding(where, f"{name} needs the Python package {module}, which is not installed; or use {other}")
    if student.attention == "flash_attention_2" and (not student.gpus or student.dtype == "float32"):
        yield Finding("student.attention", "flash_attention_2 computes in bfloat16 on a GPU; set both, or use sdpa")
    folder = Path(config.output)
    before = _engine_before(folder)
    if before not in (None, student.engine) and any(folder.glob("stages/**/checkpoints/step_*")):
        yield Finding(
            "student.engine",
            f"{folder} holds checkpoints of the engine {before}, which {student.engine} cannot read: use engine: "
            f"{before}, or another `output`",
        )


def _engine_before(folder: Path) -> str | None:
    """The engine of the run in a folder; None where there is none that can be read."""
    try:
        return str(json.loads((folder / "config.json").read_text(encoding="utf-8"))["student"]["engine"])
    except (OSError, ValueError, KeyError, TypeError):
        return None  # opening the folder says what is wrong with it


def check_environments(config: Config) -> Iterator[Finding]:
    """Every teacher's own interpreter runs, has the run's versions of Python and Ray, and the engine."""
    local = (config.cluster.address or os.environ.get("RAY_ADDRESS") or "local") == "local"
    for index, teacher in enumerate(config.teachers):
        try:
            fault = environment_fault(teacher, local=local)
        except ConfigError as error:
            fault = str(error)
        if fault:
            yield Finding(f"teachers.{index}.runtime_env ({teacher.name})", fault)


def check_serving(config: Config) -> Iterator[Finding]:
    """Every stage can go on without a teacher, where it may have to; and HTTP has its token."""
    from rayfuse.web.gate import read_token

    if config.serving.on_missing == "drop":
        for index, stage in enumerate(config.stages):
            if stage.uses_teachers and not stage.partial:
                able = ", ".join(name for name, kind in STAGES.items() if kind.partial)
                yield Finding(
                    "serving.on_missing",
                    f"stages.{index} ({stage.method}) cannot go on without one of its teachers; use wait or fail (drop "
                    f"works for {able})",
                )
    if config.serving.http is not None:
        read_token(config.serving.http)
