"""On-policy distillation: the student writes, and the teachers say what they would have said at each place."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from rayfuse.config.stages.base import Stage
from rayfuse.metrics.definitions import ROLLOUTS, SFT_PART, Metric


class OnPolicy(Stage):
    """On-policy distillation across tokenizers: what the teachers would have said in the student's own texts."""

    uses_teachers: ClassVar[bool] = True
    targets: ClassVar[tuple[str, ...]] = ("routed",)
    lse_gradient: ClassVar[bool] = True
    partial: ClassVar[bool] = True
    writes: ClassVar[bool] = True
    parts: ClassVar[tuple[Metric, ...]] = (
        Metric(SFT_PART.name, "cross-entropy on the written texts", SFT_PART.unit, curve=SFT_PART.curve),
        Metric("loss_divergence", "distance to the teachers on the student's texts", "nats per token of the step"),
        Metric("loss_advantage", "chunk advantages", "nats per token of the step"),
        Metric("taught_by_advantage", "own tokens without a distribution", "share of the tokens"),
        Metric("routed", "own tokens by teacher", "share of the tokens", per_teacher=True),
        *ROLLOUTS,
    )

    method: Literal["onpolicy"] = "onpolicy"
    share: float = Field(
        0.5, gt=0, le=1, description="share of the samples that the student writes itself; the others are learnt as sft"
    )
    divergence: Literal["jsd", "reverse", "forward", "advantage"] = Field(
        "jsd",
        description="distance to the teachers at each token: Jensen-Shannon, KL(student || teachers), KL(teachers || "
        "student), or only the advantage of the written chunks (REINFORCE)",
    )
    bound: float = Field(10.0, gt=0, description="largest loss of a token, and largest advantage of a chunk, nats")
    width: int = Field(16, ge=2, description="student tokens kept per position in the teachers' target")
    likely: int = Field(
        8,
        ge=0,
        description="of its own likeliest tokens at each position, so many count for the teachers' token that they "
        "begin with",
    )
    teacher_weights: Literal["uniform", "consensus"] = Field(
        "uniform",
        description="how much a teacher counts in a sample, known before the student writes: uniform: as its `weight` "
        "says; consensus: times its weight in the row (column teacher_weights, or teacher: NAME)",
    )
    budget: Literal["tokens", "teachers"] = Field(
        "tokens",
        description="own tokens count alike, or those of each teacher's field (where it weighs most) together alike",
    )
    prefix: float = Field(
        1.0,
        gt=0,
        le=1,
        description="the student writes at first this share of max_new_tokens, and linearly more up to all at the end",
    )
    max_new_tokens: int = Field(256, ge=1, description="longest text that the student writes, in its tokens")
    temperature: float = Field(1.0, gt=0, description="of the student's sampling")
    max_age: int = Field(
        1,
        ge=0,
        description="optimiser steps between the student that writes a text and the one that learns from it: 0 waits "
        "for the teachers, 1 trains while they read",
    )

    @model_validator(mode="after")
    def _fields_are_known(self) -> OnPolicy:
        if self.budget == "teachers" and self.teacher_weights == "uniform":
            raise ValueError(
                "budget: teachers needs teacher_weights: consensus: where all teachers count alike, no text belongs to "
                "the field of one"
            )
        return self

    def writing_fault(self, max_length: int) -> str:
        """What is wrong with the texts that the student writes, and what to do; empty where nothing is."""
        if self.room(max_length) < 1:
            return (
                f"max_new_tokens {self.max_new_tokens} leaves no room for a prompt in data.max_length {max_length}; "
                f"lower the one (at most {max_length - 2}), or raise the other"
            )
        return ""

    def room(self, max_length: int) -> int:
        """Tokens of a prompt that the student reads before it writes, of `max_length` in all."""
        return max_length - self.max_new_tokens - 1

    def longest(self, step: int, steps: int) -> int:
        """Tokens that the student writes at most for optimiser step `step` (from 1) of `steps`."""
        done = (step - 1) / max(1, steps - 1)
        return math.ceil(self.max_new_tokens * (self.prefix + (1 - self.prefix) * done))

    def text(self, signals_k: int) -> str:
        """The method's sentence in the model card."""
        distance = {
            "jsd": "Jensen-Shannon divergence from",
            "reverse": "KL divergence (student || teachers) from",
            "forward": "KL divergence (teachers || student) from",
            "advantage": "advantage, chunk by chunk, under",
        }[self.divergence]
        routed = "weighted by prompt" if self.teacher_weights == "consensus" else "all alike"
        return (
            f"`onpolicy` (on-policy distillation across tokenizers, after "
            f"[arXiv 2306.13649](https://arxiv.org/abs/2306.13649)): on {self.share:.0%} of the samples the student's "
            f"own text (at most {self.max_new_tokens} tokens, temperature {self.temperature:g}, at most {self.max_age} "
            f"steps old), by the {distance} the teachers' top-{signals_k} probabilities, carried byte by byte onto the "
            f"student's tokens ({routed}); on the others cross-entropy."
        )
