"""What a run measures: every number's name, title and unit, how its shares add up, and where it is shown.

A record in metrics.jsonl holds numbers by their key: the metric's name, or `name/TEACHER` where there is one per
teacher. Here are those of every run. What a single method's loss measures besides (its partial losses, what to watch)
is in the `parts` of the method's configuration class.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Reduce = Literal["sum", "mean", "max"]


@dataclass(frozen=True)
class Metric:
    """One number that is measured in every optimiser step.

    Attributes:
        name: its key in a record, or what is before the teacher's name in it.
        title: of its panel or row in the report.
        unit: what the number counts.
        reduce: how the values of a step's micro-batches, of all workers, become the step's: their sum (a loss is a sum
            of shares of the global batch's mean), mean, or largest.
        per_teacher: whether there is one per teacher.
        shown: the section of the report that shows it: in "loss" it has a panel of its own, with a curve per teacher;
            "start" is measured once, in a stage's first step.
        curve: name of its curve beside the panel's title; empty: the title.
    """

    name: str
    title: str
    unit: str
    reduce: Reduce = "sum"
    per_teacher: bool = False
    shown: Literal["loss", "start", "meeting", "asked", "data"] = "loss"
    curve: str = ""

    def describes(self, key: str) -> bool:
        """Whether this is the metric of a record's key."""
        name, separator, _ = key.partition("/")
        return name == self.name and bool(separator) == self.per_teacher

    def key(self, teacher: str = "") -> str:
        """The key in a record; of one teacher, where there is one per teacher."""
        return f"{self.name}/{teacher}" if self.per_teacher else self.name


SFT_PART = Metric("loss_sft", "sft part", "nats per token", curve="sft")
TOTAL = Metric("loss", "total", "the loss that is minimised")
ROUTER = Metric("loss_router", "balance of the experts", "load-balancing loss x its coefficient")
ALIGNED = Metric("aligned_share", "where the tokens meet", "share of tokens", per_teacher=True, shown="meeting")
FORWARDED = Metric("forwarded", "asked of the teacher", "samples", per_teacher=True, shown="asked")
STORED = Metric("stored", "found in the signal store", "samples", per_teacher=True, shown="asked")
DROPPED = Metric("dropped", "dropped, because the teacher was gone", "samples", per_teacher=True, shown="asked")
CUT = Metric("cut", "prompts cut from the left", "samples", shown="data")
DAMAGED = Metric("damaged", "damaged entries of the signal store, asked again", "entries", shown="data")
DISTANCE_RATIO = Metric("distance_ratio", "gradient of the distance", "times SFT's", shown="start")
LAM = Metric("lam", "weight of the distillation term", "share", shown="start")
ROLLOUT_SHARE = Metric("rollout_share", "texts that the student wrote", "share of the samples", reduce="mean")
ROLLOUT_TOKENS = Metric("rollout_tokens", "tokens that the student wrote", "tokens, ends of turns left out")
ROLLOUT_AGE = Metric("rollout_age", "age of the rollouts", "optimiser steps, at most", reduce="max")
ROLLOUT_UNFINISHED = Metric("rollout_unfinished", "rollouts that were cut", "samples")
ROLLOUT_EMPTY = Metric("rollout_empty", "empty rollouts, learnt as the data write them", "samples")
ROLLOUT_SECONDS = Metric("rollout_seconds", "time of writing", "seconds, of all workers")
ROLLOUTS = (ROLLOUT_SHARE, ROLLOUT_TOKENS, ROLLOUT_AGE, ROLLOUT_UNFINISHED, ROLLOUT_EMPTY, ROLLOUT_SECONDS)
"""What the stages measure whose student writes texts to learn from."""

EVERY_RUN = (TOTAL, ROUTER, ALIGNED, FORWARDED, STORED, DROPPED, CUT, DAMAGED)
"""What the micro-batches of any method measure."""


def metric_of(key: str, metrics: Iterable[Metric]) -> Metric:
    """The metric that a record's key belongs to.

    Raises:
        KeyError: nobody defined it.
    """
    for metric in metrics:
        if metric.describes(key):
            return metric
    raise KeyError(f"{key!r} is measured, but no metric of this name is defined")
