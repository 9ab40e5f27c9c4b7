"""What a run reads and keeps: training data, signals, held-out items."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, model_validator

from rayfuse.config.section import NewPlace, Place, Section

COLUMNS = (
    "messages",
    "prompt",
    "response",
    "input",
    "system",
    "history",
    "tools",
    "chosen",
    "chosen_pivot",
    "rejected",
    "answer",
    "tests",
    "skill",
    "trusted",
)
"""Columns that rayfuse reads, by their own names."""


def _read_once(value: dict[str, str]) -> dict[str, str]:
    for name in value:
        if name not in COLUMNS:
            raise ValueError(f"{name!r} is no column that is read; there are: {', '.join(COLUMNS)} (ours: the data's)")
    if "messages" in value and {"prompt", "response"} & value.keys():
        raise ValueError("messages, and prompt with response, are two forms of a conversation: name one")
    for column in value.values():
        if [*value.values()].count(column) > 1:
            raise ValueError(f"the column {column!r} is named twice")
    return value


PATHS = (
    ".jsonl, .json, .csv or .tsv (also .gz, .bz2, .xz, .zst), .parquet or .arrow; a glob, folder, URL or hub id; "
    "or a list of these, read one after the other"
)


def _named(value: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
    if value is not None and not (value and all(value)):
        raise ValueError(f"must name a file, folder or data set with at least 1 character (is {value!r})")
    return value


Paths = Annotated[Place | tuple[Place, ...], AfterValidator(_named)]
"""One path, hub id or URL, or several."""


Columns = Annotated[dict[str, str], AfterValidator(_read_once)]
"""Our name of a column -> the data's name of it."""


class Source(Section):
    """One of several data sets.

    With weight w, each of its samples is in an epoch floor(w) times, and a share w - floor(w) of them, drawn by the
    run's seed, once more.
    """

    shorthand: ClassVar[str] = "path"

    path: Paths = Field(description=PATHS)
    weight: float = Field(
        1.0, gt=0, le=100, description="how often its samples are in an epoch: 2 is twice, 0.5 a half"
    )
    name: str | None = Field(None, description="configuration name of a hub data set")
    split: str = Field("train", description="split of a hub data set, or of a folder that has splits")
    revision: str | None = Field(None, description="branch, tag or commit of a hub data set")
    limit: int | None = Field(None, ge=1, description="read only the first rows")
    columns: Columns = Field({}, description="other names of columns, for example {prompt: question, response: reply}")

    @property
    def paths(self) -> tuple[str, ...]:
        """The paths, one or more."""
        return (self.path,) if isinstance(self.path, str) else self.path

    @property
    def label(self) -> str:
        """What messages call it."""
        return ", ".join(self.paths)


class Data(Section):
    """Conversations, or prompts with responses; the loss is on the assistant's turns only."""

    shorthand: ClassVar[str] = "path"

    path: Paths | None = Field(None, description=PATHS)
    sources: tuple[Source, ...] = Field(
        (), description="several data sets in place of `path`, each with path, weight, columns, limit ..."
    )
    name: str | None = Field(None, description="configuration name of a hub data set")
    split: str = Field("train", description="split of a hub data set, or of a folder that has splits")
    revision: str | None = Field(None, description="branch, tag or commit of a hub data set")
    columns: Columns = Field({}, description="other names of columns, for example {prompt: question, response: reply}")
    limit: int | None = Field(None, ge=1, description="read only the first rows (of each of `sources`)")
    max_length: int = Field(4096, ge=8, description="student tokens of prompt and response together")
    too_long: Literal["drop", "cut"] = Field(
        "drop",
        description="samples longer than that, or than a teacher's context: drop them, or cut the prompt from the "
        "left (a response is never cut)",
    )
    on_bad_row: Literal["error", "skip"] = Field("error", description="a malformed row stops the run, or is counted")
    thoughts: Literal["keep", "context", "drop"] = Field(
        "keep",
        description="a response's thought (<think> ... </think>): keep: learn it; context: read it before the answer; "
        "drop: leave it out",
    )
    unit_size: int = Field(8, ge=1, description="samples per unit: one teacher call and one micro-step of the student")

    @model_validator(mode="before")
    @classmethod
    def _of_a_list(cls, value: Any) -> Any:
        """A list in place of the section: of paths, which are one data set, or of sources."""
        if isinstance(value, (list, tuple)):
            return {"path" if all(isinstance(item, str) for item in value) else "sources": value}
        return value

    @model_validator(mode="after")
    def _one_place(self) -> Data:
        if (self.path is None) == (not self.sources):
            raise ValueError("say where the data are: `path`, or `sources` with a path each (one of the two)")
        beside = {"name": self.name, "revision": self.revision, "columns": self.columns, "split": self.split != "train"}
        wrong = [key for key, value in beside.items() if value and self.sources]
        if wrong:
            raise ValueError(f"{wrong[0]} belongs into each of `sources`, not beside them")
        return self

    @property
    def parts(self) -> tuple[Source, ...]:
        """The data sets, one or more."""
        if self.path is None:
            limits = [min(filter(None, (source.limit, self.limit)), default=None) for source in self.sources]
            return tuple(s.model_copy(update={"limit": n}) for s, n in zip(self.sources, limits, strict=True))
        return (
            Source(
                path=self.path,
                name=self.name,
                split=self.split,
                revision=self.revision,
                columns=self.columns,
                limit=self.limit,
            ),
        )

    @property
    def label(self) -> str:
        """What messages call it."""
        return ", ".join(part.label for part in self.parts)

    @property
    def weighted(self) -> bool:
        """Whether some data set counts more or less than once."""
        return any(source.weight != 1 for source in self.sources)

    @property
    def file(self) -> str | None:
        """The one path; None where there are several."""
        return self.path if isinstance(self.path, str) else None


class Signals(Section):
    """What the teachers are asked for, and where their answers are kept."""

    k: int = Field(10, ge=2, description="top-K logits kept per position")
    store: NewPlace | None = Field(
        None, description="folder or fsspec URL of the signal store; default: OUTPUT/signals"
    )


class Benchmark(Section):
    """Held-out items: rows of a prompt and its response in any form, and, where wanted, `skill`."""

    shorthand: ClassVar[str] = "path"

    path: Place = Field(min_length=1, description="a file, glob, folder, URL or hub id, as `data.path`")
    columns: Columns = Field({}, description="other names of columns, as `data.columns`")
    limit: int | None = Field(None, ge=1, description="use only the first items")
    score: Literal["exact", "number"] = Field(
        "exact", description="exact: the same text, ends stripped; number: the last number in the answer is the same"
    )
    max_new_tokens: int = Field(64, ge=1, description="longest answer generated")
    batch_size: int = Field(64, ge=1, description="items generated at a time")
    teachers: bool = Field(True, description="evaluate the teachers too, not only the pivot and the stages")
    generate: bool = Field(True, description="exact-match accuracy by greedy generation, besides bits per byte")
