"""Judges: what says how good a response is, when preference data is made."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, model_validator

from rayfuse.config.models import Model
from rayfuse.config.section import Section, by_method


class Judge(Section):
    """What every judge has."""

    shorthand: ClassVar[str] = "method"
    needs: ClassVar[Literal["", "answer", "tests"]] = ""
    """What a row of prompts must hold besides the prompt."""

    method: str


class HostedJudge(Judge):
    """A judge that looks at one response after another, in processes of its own."""

    workers: int = Field(1, ge=1, description="processes that judge in parallel")
    cpus: float = Field(1.0, gt=0, description="CPU cores per process")
    gpus: float = Field(0.0, ge=0, le=1, description="GPU per process, or a share of one (a reward model's)")


class Exact(HostedJudge):
    """1 where the response is the row's `answer` (or `response`), ends stripped; else 0."""

    needs: ClassVar[Literal["answer"]] = "answer"
    method: Literal["exact"] = "exact"


class Number(HostedJudge):
    """1 where the last number of the response is the last number of the row's `answer` (or `response`); else 0."""

    needs: ClassVar[Literal["answer"]] = "answer"
    method: Literal["number"] = "number"


class UnitTests(HostedJudge):
    """1 where the response's Python code passes the row's `tests` in a sandbox; else 0. See evaluation.sandbox."""

    needs: ClassVar[Literal["tests"]] = "tests"
    method: Literal["unit_tests"] = "unit_tests"
    seconds: float = Field(10.0, gt=0, description="wall-clock time of one response's program and tests")
    memory_mb: int = Field(1024, ge=64, description="address space of each of its processes")
    processes: int = Field(16, ge=1, description="processes and threads it may have at a time")
    file_mb: int = Field(16, ge=1, description="size of the folder it may write to")
    isolation: Literal["namespaces", "limits"] = Field(
        "namespaces",
        description="namespaces: no network, nothing written outside, and an error where the machine cannot give that; "
        "limits: where it cannot, only the limits above",
    )


class RewardModel(HostedJudge, Model):
    """The score of a Hugging Face sequence-classification model, with its own chat template."""

    method: Literal["reward_model"] = "reward_model"
    batch_size: int = Field(16, ge=1, description="responses of one forward pass")
    label: int | None = Field(None, ge=0, description="output that is the score, where the model has several")

    @model_validator(mode="after")
    def _has_safetensors(self) -> RewardModel:
        if self.gguf_file is not None:
            raise ValueError("a reward model is read from safetensors, not from a GGUF file")
        return self


class Posterior(Judge):
    """How probably a response is right, by the consensus of all responses to all prompts; no model judges.

    Labels (`answer` or `response` of the rows) count as far as they turn out to be right. See docs/consensus.md.
    """

    method: Literal["consensus"] = "consensus"
    equivalence: Literal["auto", "exact", "final", "tests"] = Field(
        "auto",
        description="when two responses say the same: exact text, same final answer (boxed or number), or passing the "
        "row's tests; auto chooses by the data",
    )
    clusters: int = Field(12, ge=1, description="fields to find at most, where the rows name no `skill`")
    tests: UnitTests = Field(UnitTests(), description="the sandbox of the rows' tests")


JUDGES: dict[str, type[Judge]] = {
    "reward_model": RewardModel,
    "exact": Exact,
    "number": Number,
    "unit_tests": UnitTests,
    "consensus": Posterior,
}


if TYPE_CHECKING:
    AnyJudge = Judge
else:
    AnyJudge = by_method(JUDGES, " of a judge")
    """A judge in a configuration: a method's name, or a section with `method` and its knobs."""
