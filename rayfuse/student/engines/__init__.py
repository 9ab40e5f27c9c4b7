"""The engines that train a student, by name. A new one is a file here and an entry in ENGINES."""

from __future__ import annotations

from rayfuse.student.engines.base import Engine
from rayfuse.student.engines.ddp import DDPEngine
from rayfuse.student.engines.deepspeed import DeepSpeedEngine
from rayfuse.student.engines.fsdp2 import FSDP2Engine

ENGINES: dict[str, type[Engine]] = {"ddp": DDPEngine, "deepspeed": DeepSpeedEngine, "fsdp2": FSDP2Engine}
"""Engine by its name in the configuration (student.engine)."""

__all__ = ["ENGINES", "Engine"]
