"""The engines that train a student, by name."""

from __future__ import annotations

from rayfuse.student.engines.ddp import TorchEngine

ENGINES = {"torch": TorchEngine}
"""Engine by its name in the configuration (student.engine)."""
