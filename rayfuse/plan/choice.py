"""Which engine, ZeRO stage and unit size a student should be trained with, so that it fits and is fast."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from rayfuse.config import Config, Stage
from rayfuse.plan.hardware import Hardware
from rayfuse.plan.memory import Memory, Setup, student_activations, student_memory, with_batch
from rayfuse.plan.roofline import step_time
from rayfuse.plan.shapes import Shape
from rayfuse.plan.work import section_name, stage_data

WITHIN = 1.03
"""Of settings whose times differ by less than this, the simpler one is taken."""
HEADROOM = 0.95
"""Of a device's memory what a choice may use: the plan is exact to about as much."""
ENGINES = (("ddp", 0), ("deepspeed", 1), ("deepspeed", 2), ("deepspeed", 3), ("fsdp2", 3))
"""Engines and their stages, the simplest first."""


def configured(config: Config, stage: Stage) -> Setup:
    """How the configuration trains a stage."""
    student, data = config.student, stage_data(config, stage)
    stages = {"ddp": 0, "deepspeed": student.zero_stage or 3, "fsdp2": 3}
    sides = max(1, len(stage.sides))
    return Setup(
        engine=student.engine,
        zero_stage=stages[student.engine],
        workers=student.workers,
        dtype=student.dtype,
        checkpointing=student.gradient_checkpointing,
        batch=data.unit_size * sides,
        length=data.max_length,
        micro_steps=max(1, stage.batch_size // data.unit_size // student.workers),
        lse_gradient=bool(stage.lse_gradient) or stage.uses_preferences,
        offload=student.offload,
    )


def candidates(setup: Setup, sides: int, *, offload: bool, fixed: bool = False) -> Iterator[Setup]:
    """Every engine, with and without recomputation, in units as large as asked for or smaller; simple ones first.

    Args:
        setup: what is asked for.
        sides: sequences that belong together in a unit.
        offload: only settings with the optimiser, or all, in the host's memory; otherwise only those without.
        fixed: only other sizes of the units.
    """
    own = (setup.engine, setup.zero_stage, setup.offload)
    ways = [(engine, stage, "none") for engine, stage in ENGINES if setup.workers > 1 or engine == "ddp"]
    if offload:
        ways = [("deepspeed", 3, "optimizer"), ("deepspeed", 3, "all")]
    ways = [own] if fixed else sorted(ways, key=lambda way: way != own)
    for engine, zero_stage, place in ways:
        for checkpointing in (setup.checkpointing,) if fixed else (setup.checkpointing, not setup.checkpointing):
            changed = replace(setup, engine=engine, zero_stage=zero_stage, offload=place, checkpointing=checkpointing)
            batch = setup.batch
            yield changed
            while not batch // sides % 2:
                batch //= 2
                yield with_batch(changed, batch)


def choose(
    shape: Shape, setup: Setup, hardware: Hardware, sides: int, length: float, *, fixed: bool = False
) -> tuple[Setup, Memory] | None:
    """The fastest setting that fits, the configured one where it is about as fast; None where none fits.

    The host's memory is used only where nothing else fits. For the arguments see `candidates`.
    """
    for offload in (False,) if fixed or not hardware.device.cuda else (False, True):
        best: tuple[float, Setup, Memory] | None = None
        for candidate in candidates(setup, sides, offload=offload, fixed=fixed):
            memory = student_memory(shape, candidate, hardware.device)
            if memory.total > HEADROOM * memory.room:
                continue
            acts = student_activations(shape, candidate)
            seconds = step_time(shape, candidate, hardware, acts, length=length).seconds
            if best is None or seconds * WITHIN < best[0]:
                best = (seconds, candidate, memory)
        if best is not None:
            return best[1:]
    return None


def changes(config: Config, stage: Stage, chosen: Setup) -> dict[str, Any]:
    """Keys of the configuration, as overrides have them, whose values the choice changes."""
    current = configured(config, stage)
    keys: dict[str, Any] = {}
    if chosen.engine != current.engine:
        keys["student.engine"] = chosen.engine
    if chosen.engine == "deepspeed" and (chosen.engine, chosen.zero_stage) != (current.engine, current.zero_stage):
        keys["student.zero_stage"] = chosen.zero_stage
    elif current.engine == "deepspeed" and chosen.engine != "deepspeed" and config.student.zero_stage is not None:
        keys["student.zero_stage"] = None
    if chosen.offload != current.offload:
        keys["student.offload"] = chosen.offload
    if chosen.checkpointing != current.checkpointing:
        keys["student.gradient_checkpointing"] = chosen.checkpointing
    if chosen.batch != current.batch:
        keys[f"{section_name(config, stage)}.unit_size"] = chosen.batch // max(1, len(stage.sides))
    return keys
