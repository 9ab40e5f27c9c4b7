"""What a run reads and keeps: training data, signals, held-out items."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from rayfuse.config.section import NewPlace, Place, Section


class Data(Section):
    """Conversations (`messages`) or pairs (`prompt`, `response`); the loss is on the assistant's turns only."""

    shorthand: ClassVar[str] = "path"

    path: Place = Field(min_length=1, description=".jsonl, .json or .parquet file, folder of a data set, or hub id")
    name: str | None = Field(None, description="configuration name of a hub data set")
    split: str = Field("train", description="split of a hub data set")
    revision: str | None = Field(None, description="branch, tag or commit of a hub data set")
    limit: int | None = Field(None, ge=1, description="read only the first rows")
    max_length: int = Field(4096, ge=8, description="student tokens of prompt and response together")
    too_long: Literal["drop", "cut"] = Field(
        "drop", description="longer samples: drop them, or cut the prompt from the left (a response is never cut)"
    )
    on_bad_row: Literal["error", "skip"] = Field("error", description="a malformed row stops the run, or is counted")
    unit_size: int = Field(8, ge=1, description="samples per unit: one teacher call and one micro-step of the student")


class Signals(Section):
    """What the teachers are asked for, and where their answers are kept."""

    k: int = Field(10, ge=2, description="top-K logits kept per position")
    store: NewPlace | None = Field(
        None, description="folder or fsspec URL of the signal store; default: OUTPUT/signals"
    )


class Benchmark(Section):
    """Held-out items: JSONL or Parquet rows of `prompt`, `response` and, where wanted, `skill`."""

    shorthand: ClassVar[str] = "path"

    path: Place = Field(min_length=1, description="rows of prompt, response and, optionally, skill")
    limit: int | None = Field(None, ge=1, description="use only the first items")
    score: Literal["exact", "number"] = Field(
        "exact", description="exact: the same text, ends stripped; number: the last number in the answer is the same"
    )
    max_new_tokens: int = Field(64, ge=1, description="longest answer generated")
    batch_size: int = Field(64, ge=1, description="items generated at a time")
    teachers: bool = Field(True, description="evaluate the teachers too, not only the pivot and the stages")
    generate: bool = Field(True, description="exact-match accuracy by greedy generation, besides bits per byte")
