"""Options of the vllm backend."""

from __future__ import annotations

from pydantic import Field

from rayfuse.config.section import Section


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
