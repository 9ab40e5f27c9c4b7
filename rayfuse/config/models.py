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

    engine: Annotated[Literal["ddp"], BeforeValidator(lambda name: "ddp" if name == "torch" else name)] = Field(
        "ddp", description="what trains: plain PyTorch, data-parallel with DDP (also called torch)"
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
