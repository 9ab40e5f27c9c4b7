"""Teachers: which engine runs them, with how many replicas, and how much each counts."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from rayfuse.config.endpoint import Endpoint, Stored
from rayfuse.config.environment import RuntimeEnv
from rayfuse.config.models import Model
from rayfuse.config.section import Dtype, Section, named


class Parity(Section):
    """Whether a teacher's answers are compared with a plain forward of its own weights before they are used."""

    check: bool = Field(True, description="compare; false: trust the serving path as it is")
    tolerance: float | None = Field(
        None,
        gt=0,
        description="largest mean difference of log-probabilities (nats); default: by dtype, see teachers/parity.py",
    )


def _switch(value: Any) -> Any:
    return {"check": value} if isinstance(value, bool) else value


ParitySection = Annotated[Parity, BeforeValidator(_switch)]
"""A Parity section, or just true or false."""


class VLLM(Section):
    """A vLLM engine per replica. Its number format is the teacher's `dtype`."""

    tensor_parallel: int = Field(
        1, ge=1, description="GPUs that one copy is split over, equal to `gpus`; on a CPU: processes"
    )
    gpu_memory_utilization: float | None = Field(
        None,
        gt=0,
        le=0.95,
        description="share of each GPU that the engine takes; default 0.85 of what `gpus` reserves. The rest holds the "
        "logits of prompts: lower it at out-of-memory",
    )
    max_model_len: int | None = Field(
        None, ge=16, description="longest sequence in tokens; default: the model's context. Lower: less cache is needed"
    )
    batched_tokens: int | None = Field(
        None,
        ge=64,
        description="tokens of one engine step; default: as many as memory has room for the logits of, at most "
        "batch_tokens",
    )
    quantization: str | None = Field(
        None, min_length=1, description="how the engine quantises weights (fp8, bitsandbytes); default: as stored"
    )


class Replicas(Section):
    """How many copies of a teacher Ray Serve may keep; it scales between the two with the work in flight."""

    min: int = Field(0, ge=0, description="copies kept when idle while the run lives; 0 frees all memory after idle_s")
    max: int = Field(1, ge=1, description="copies under load")
    idle_s: float = Field(60.0, ge=0, description="seconds without work after which the last copy is given up")
    upscale_s: float = Field(5.0, ge=0, description="seconds of too much work after which a copy is added")
    downscale_s: float | None = Field(
        None, ge=0, description="seconds of too little work after which a copy is given up; default: idle_s"
    )

    @model_validator(mode="after")
    def _ordered(self) -> Replicas:
        if self.min > self.max:
            raise ValueError(f"replicas.min ({self.min}) is larger than replicas.max ({self.max})")
        return self


class Teacher(Model):
    """A model that answers "what would you say next?"."""

    name: str = Field("", description="short name in metrics and reports; default: the last part of `model`")
    backend: Literal["transformers", "vllm", "openai", "store"] = Field(
        "transformers",
        description="what answers: an engine here, a server elsewhere (openai), or what was answered before (store)",
    )
    autocast: Dtype | None = Field(
        None, description="number format of the forward pass over weights in `dtype` (transformers); default: `dtype`"
    )
    weight: float = Field(1.0, gt=0, description="w_s of the loss: how much this teacher counts")
    replicas: Replicas = Replicas()
    cpus: float = Field(1.0, gt=0, description="CPU cores per replica")
    gpus: float = Field(
        0.0, ge=0, description="GPU per replica, or a share of one; 0: on the CPU; more than one: with vllm only"
    )
    batch_tokens: int = Field(16384, ge=64, description="tokens of one forward pass; lower it at out-of-memory")
    patience_s: float = Field(600.0, gt=0, description="seconds to retry a teacher that does not answer")
    unit_timeout_s: float = Field(
        1800.0, gt=0, description="seconds that one unit may compute; a copy that needs longer has hung and is replaced"
    )
    parity: ParitySection = Parity()
    runtime_env: RuntimeEnv | None = Field(None, description="interpreter and packages of its own; default: the run's")
    vllm: VLLM | None = Field(None, description="options of backend vllm")
    endpoint: Endpoint | None = Field(
        None, description="backend openai: the server; `model` is then a name, and `tokenizer` where its tokenizer is"
    )
    stored: Stored | None = Field(None, description="backend store: which signals")

    @model_validator(mode="before")
    @classmethod
    def _sections_of_the_backend(cls, value: Any) -> Any:
        """Fill in the name that a server is asked for (before paths are made absolute), and a backend's section."""
        if not isinstance(value, dict):
            return value
        endpoint = named(value.get("endpoint"), "url")
        if isinstance(endpoint, dict) and not endpoint.get("model"):
            value = {**value, "endpoint": {**endpoint, "model": value.get("model", "")}}
        if value.get("backend") == "vllm" and value.get("vllm") is None:
            value = {**value, "vllm": {}}
        if value.get("backend") == "store" and value.get("stored") is None:
            value = {**value, "stored": {}}
        return value

    @model_validator(mode="after")
    def _fits_the_backend(self) -> Teacher:
        if (self.backend == "openai") != (self.endpoint is not None):
            raise ValueError(
                f"backend {self.backend} and `endpoint` do not go together: a server needs `backend: openai` and "
                "`endpoint: {url: https://...}`"
            )
        if (self.backend == "store") != (self.stored is not None):
            raise ValueError(f"backend {self.backend} has no `stored` section; it belongs to `backend: store`")
        if self.autocast is not None and self.backend != "transformers":
            raise ValueError(f"autocast is {self.autocast}: it is for backend transformers, not {self.backend}")
        if self.backend in ("openai", "store") and self.gpus:
            raise ValueError(f"backend {self.backend} runs no model here: gpus must be 0, but is {self.gpus:g}")
        if self.vllm is None and self.gpus > 1:
            raise ValueError(f"gpus is {self.gpus:g}: backend {self.backend} runs on one GPU; use backend vllm")
        if (self.backend == "vllm") != (self.vllm is not None):
            raise ValueError(f"the section vllm is for backend vllm, not {self.backend}; leave it out")
        return self

    @model_validator(mode="after")
    def _fits_vllm(self) -> Teacher:
        if self.vllm is None:
            return self
        if self.gguf_file:
            raise ValueError("backend vllm loads safetensors; for a gguf_file use backend transformers")
        split = self.vllm.tensor_parallel
        if (self.gpus > 1 or (self.gpus and split > 1)) and self.gpus != split:
            raise ValueError(f"gpus ({self.gpus:g}) and vllm.tensor_parallel ({split}) must be equal")
        share = self.vllm.gpu_memory_utilization
        if share is not None and 0 < self.gpus < 1 and share >= self.gpus:
            raise ValueError(
                f"vllm.gpu_memory_utilization ({share:g}) must be below the share of a GPU that `gpus` reserves "
                f"({self.gpus:g}): the logits of prompts need the difference"
            )
        return self
