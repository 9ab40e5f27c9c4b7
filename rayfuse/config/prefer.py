"""Preference and training data made by the models themselves (`rayfuse prefer`)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from rayfuse.config.data import Data
from rayfuse.config.judges import AnyJudge, Posterior
from rayfuse.config.section import NewPlace, Section
from rayfuse.config.teachers import Replicas


class Prefer(Section):
    """Who answers the prompts, how the answers are judged, and what is written.

    preferences: `prompt`, `chosen` (the best response of all) and `rejected` (the worst), for infifpo and dpo.
    triples: also `chosen_pivot`: `chosen` is then the teachers' best, `chosen_pivot` the pivot's own, for wrpo.
    responses: `prompt` and `response`, the teachers' best, for sft and the distillations (SeqKD). Without a judge,
    every response of every teacher.
    """

    write: Literal["preferences", "triples", "responses"] = Field("preferences", description="kind of rows to write")
    prompts: Data | None = Field(
        None, description="rows of `prompt`, or of `messages` up to a user turn; default: the prompts of `data`"
    )
    output: NewPlace | None = Field(
        None, min_length=1, description="the .jsonl file to write; default: the path of `preferences`"
    )
    judge: AnyJudge | None = Field(
        None, description="what scores a response: a reward model, a verifier, or the consensus of all responses"
    )
    per_teacher: int = Field(4, ge=0, description="responses sampled from each teacher")
    from_pivot: int | None = Field(
        None, ge=0, description="responses sampled from the pivot; default 8, and 0 when `responses` are written"
    )
    temperature: float = Field(0.8, ge=0, description="of the sampling; 0 is greedy")
    max_new_tokens: int = Field(1024, ge=1, description="longest response, in the model's own tokens")
    seed: int = Field(0, ge=0, description="of the sampling, and of choosing among equally good responses")
    min_score: float | None = Field(
        None,
        description="a chosen response has at least this score; default: 1 of a verifier, 0.5 of the consensus, any of "
        "a reward model",
    )
    min_gap: float = Field(0.0, ge=0, description="the chosen response's score is above the rejected one's by more")
    replicas: Replicas = Field(Replicas(), description="copies of the pivot, while it answers")
    in_flight: int = Field(4, ge=1, description="units of prompts that are answered at a time")
    store: NewPlace | None = Field(None, description="folder or fsspec URL that keeps answers; default: OUTPUT/answers")

    @model_validator(mode="after")
    def _consistent(self) -> Prefer:
        if self.judge is None and self.write != "responses":
            raise ValueError(f"write: {self.write} needs a `judge` to tell better from worse")
        if self.write == "responses" and self.from_pivot:
            raise ValueError(f"write: responses takes the teachers' responses; from_pivot {self.from_pivot} has no use")
        if self.write == "triples" and not (self.per_teacher and self.pivot_count):
            raise ValueError("write: triples needs responses of the teachers and of the pivot")
        if self.temperature == 0 and max(self.per_teacher, self.pivot_count) > 1:
            raise ValueError(
                "at temperature 0 all responses of a model are the same; set per_teacher and from_pivot to 1"
            )
        if self.output is not None and ("://" in self.output or not self.output.endswith(".jsonl")):
            raise ValueError(f"output must be a .jsonl file on a file system, and is {self.output!r}")
        return self

    @property
    def pivot_count(self) -> int:
        """Responses sampled from the pivot."""
        if self.from_pivot is None:
            return 0 if self.write == "responses" else 8
        return self.from_pivot

    @property
    def least_score(self) -> float:
        """The score that a chosen response must have."""
        if self.min_score is not None:
            return self.min_score
        if isinstance(self.judge, Posterior):
            return 0.5
        return 1.0 if self.judge is not None and self.judge.needs else float("-inf")
