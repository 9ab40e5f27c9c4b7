"""Where models come from, and the student: the pivot that is trained."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field, JsonValue, field_validator, model_validator

from rayfuse.config.section import Dtype, LocalPath, Place, Section

OF_THE_CONVERSATION = {"messages", "tools", "add_generation_prompt", "strftime_now"}
"""Arguments of a chat template that the data and the run give."""


class Model(Section):
    """Where a model comes from, and how it is loaded."""

    shorthand: ClassVar[str] = "model"

    model: Place = Field(min_length=1, description="Hugging Face id or local folder")
    revision: str | None = Field(None, description="branch, tag or commit of a hub model; a commit pins it")
    tokenizer: Place | None = Field(None, description="id or folder of the tokenizer; default: the model's own")
    gguf_file: Annotated[str, LocalPath(inside=True)] | None = Field(
        None, description="name of a GGUF file inside `model`, loaded through transformers"
    )
    dtype: Dtype = Field("bfloat16", description="number format of the weights while they are used")
    trust_remote_code: Place | None = Field(
        None, description="repeat the model's name here to run the Python code that ships with it; never on by default"
    )
    shape: dict[str, JsonValue] | Place | None = Field(
        None,
        description="for `rayfuse plan` where the model cannot be reached: a config.json, or its sizes as that file "
        "has them, {model_type: qwen2, hidden_size: 5120, ...}",
    )
    template: dict[str, JsonValue] = Field(
        {}, description="arguments of the chat template besides the conversation, for example {enable_thinking: false}"
    )

    def __hash__(self) -> int:
        return hash(self.model_dump_json())

    @field_validator("template")
    @classmethod
    def _are_not_the_conversation(cls, value: dict[str, JsonValue]) -> dict[str, JsonValue]:
        given = sorted(OF_THE_CONVERSATION & value.keys())
        if given:
            raise ValueError(f"{', '.join(given)}: given by the data and the run; leave it out of `template`")
        return value

    @model_validator(mode="after")
    def _remote_code_is_named(self) -> Model:
        if self.trust_remote_code is not None and self.trust_remote_code != self.model:
            raise ValueError(
                f"trust_remote_code must repeat the model's name {self.model!r} to allow its code to run, "
                f"but is {self.trust_remote_code!r}"
            )
        return self


class Student(Model):
    """The pivot: the model that the teachers are fused into."""

    engine: Annotated[
        Literal["ddp", "deepspeed", "fsdp2"], BeforeValidator(lambda name: "ddp" if name == "torch" else name)
    ] = Field(
        "ddp",
        description="what trains: ddp (also called torch) holds the whole model on every worker; deepspeed (ZeRO) and "
        "fsdp2 (PyTorch's fully_shard) hold a part of it on each",
    )
    zero_stage: Literal[1, 2, 3] | None = Field(
        None,
        description="deepspeed only: 1 shares out the optimiser's moments and float32 weights, 2 the gradients too, 3 "
        "also the weights; default: 3",
    )
    offload: Literal["none", "optimizer", "all"] = Field(
        "none",
        description="what is kept in the host's memory: nothing, the optimiser (deepspeed), or optimiser and weights",
    )
    attention: Literal["sdpa", "flash_attention_2", "flex_attention"] | None = Field(
        None, description="attention of the student's forward pass; default: what transformers chooses for the model"
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="number format of the forward and backward pass (weights: float32)"
    )
    save_dtype: Dtype | None = Field(
        None,
        description="number format of the fused model's weights; default: the pivot's own. Between stages: float32",
    )
    router_loss: float | None = Field(
        None,
        ge=0,
        description="coefficient of the load-balancing loss of a mixture of experts; default: the model's own "
        "(router_aux_loss_coef); 0: none",
    )
    workers: int = Field(1, ge=1, description="data-parallel training processes")
    cpus: float = Field(1.0, gt=0, description="CPU cores per worker")
    gpus: Literal[0, 1] = Field(0, description="GPUs per worker; 0: on the CPU")
    gradient_checkpointing: bool = Field(False, description="recompute activations: less memory, about 30% slower")
    prefetch: int = Field(4, ge=1, description="units each worker keeps in preparation ahead of its step")
    max_failures: int = Field(3, ge=0, description="restarts from the last checkpoint before the run gives up")

    @model_validator(mode="after")
    def _engine_is_possible(self) -> Student:
        if self.zero_stage is not None and self.engine != "deepspeed":
            raise ValueError(
                f"zero_stage is {self.zero_stage}, but engine is {self.engine}: use engine: deepspeed, or leave it out"
            )
        if self.offload == "none":
            if self.engine != "ddp" and self.workers == 1:
                raise ValueError(
                    f"engine: {self.engine} shares the model out over its workers, and there is 1: raise workers, use "
                    "engine: ddp, or keep the optimiser on the host (offload)"
                )
            return self
        if self.engine == "ddp" or (self.engine == "fsdp2" and self.offload == "optimizer"):
            able = "engine: deepspeed or fsdp2" if self.engine == "ddp" else "offload: all, or engine: deepspeed"
            raise ValueError(f"engine: {self.engine} has no offload: {self.offload}; use {able}")
        if self.offload == "all" and self.engine == "deepspeed" and self.shards_weights is False:
            raise ValueError(f"offload: all moves the weights, which zero_stage {self.zero_stage} keeps whole; use 3")
        if not self.gpus:
            raise ValueError(f"offload is {self.offload}, but gpus is 0: all is in the host's memory; leave it out")
        return self

    @property
    def shards_weights(self) -> bool:
        """Whether no worker holds the whole model."""
        return self.engine == "fsdp2" or (self.engine == "deepspeed" and self.zero_stage in (None, 3))
