"""Teachers: which engine runs them, with how many replicas, and how much each counts."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from rayfuse.config.models import Model
from rayfuse.config.section import Section


class Replicas(Section):
    """How many copies of a teacher Ray Serve may keep; it scales between the two with the work in flight."""

    min: int = Field(0, ge=0, description="copies kept when idle; 0 frees all memory after idle_s")
    max: int = Field(1, ge=1, description="copies under load")
    idle_s: float = Field(60.0, ge=0, description="seconds without work after which a copy is given up")

    @model_validator(mode="after")
    def _ordered(self) -> Replicas:
        if self.min > self.max:
            raise ValueError(f"replicas.min ({self.min}) is larger than replicas.max ({self.max})")
        return self


class Teacher(Model):
    """A model that answers "what would you say next?"."""

    name: str = Field("", description="short name in metrics and reports; default: the last part of `model`")
    backend: Literal["transformers"] = Field("transformers", description="engine that runs the teacher")
    weight: float = Field(1.0, gt=0, description="w_s of the loss: how much this teacher counts")
    replicas: Replicas = Replicas()
    cpus: float = Field(1.0, gt=0, description="CPU cores per replica")
    gpus: float = Field(0.0, ge=0, le=1, description="GPU per replica, or a share of one; 0: on the CPU")
    batch_tokens: int = Field(16384, ge=64, description="tokens of one forward pass; lower it at out-of-memory")
    patience_s: float = Field(600.0, gt=0, description="seconds to retry a teacher that does not answer")
