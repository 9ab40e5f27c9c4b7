"""Data: rows of files or hub data sets -> samples.

A sample is one assistant turn: the messages before it and the response text. Every model renders the messages with its
own chat template; what all models share is the response, as UTF-8 bytes. A conversation with several assistant turns
becomes several samples, each with exactly the prompt that the model would see when it is asked for that turn.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic

from rayfuse.config import Data
from rayfuse.config.data import Source
from rayfuse.data.files import read_source
from rayfuse.data.forms import conversation_of_row, open_row
from rayfuse.data.pairs import compared
from rayfuse.data.sample import PAIR, Compared, DataCounts, Parsed, Sample, add_counts
from rayfuse.data.thoughts import Thoughts, treated
from rayfuse.data.weights import weights_of
from rayfuse.errors import DataError


@dataclass(frozen=True)
class Parse(Generic[Parsed]):
    """What one row gives.

    Attributes:
        items: its samples, pairs or prompts.
        form: the form in which it was read, in words.
        unread: columns, and keys of its messages, that hold something which is not read.
        calling_turns, context_turns: as in DataCounts.
    """

    items: Sequence[Parsed]
    form: str
    unread: frozenset[str] = frozenset()
    calling_turns: int = 0
    context_turns: int = 0


Parser = Callable[[Any, Mapping[str, str]], Parse[Parsed]]
"""Makes items of a row, under the names that `columns` gives; raises DataError on a malformed one."""


@dataclass(frozen=True)
class Part(Generic[Parsed]):
    """What one of a configuration's data sets gives.

    Attributes:
        source: the data set.
        items: its samples, pairs or prompts.
        counts: of its rows.
    """

    source: Source
    items: list[Parsed]
    counts: DataCounts


def read_samples(data: Data, *, first: int | None = None) -> tuple[list[Sample], DataCounts]:
    """Read and check conversations, or prompts and responses, in any form that rayfuse knows.

    Args:
        data: where they are, and what to do with a malformed row.
        first: read at most this many rows of each data set (a quick check), besides its `limit`.

    Raises:
        DataError: a data set cannot be read or holds no sample; or a row is malformed and `on_bad_row` is "error".
            The message names file, line (or row) and reason.
    """
    return read_parsed(data, first, parse_samples)


def read_preferences(
    data: Data, sides: Sequence[str] = PAIR, *, first: int | None = None
) -> tuple[list[Compared], DataCounts]:
    """Read and check preferences: the responses named by `sides` and their prompt; else as read_samples."""
    return read_parsed(data, first, compared_parser(sides))


def compared_parser(sides: Sequence[str]) -> Parser[Compared]:
    """Makes the responses named by `sides` of a row."""

    def parse(row: Any, columns: Mapping[str, str]) -> Parse[Compared]:
        found = compared(row, sides, columns)
        return Parse([found.samples], found.form, found.unread)

    return parse


def read_parsed(data: Data, first: int | None, parse: Parser[Parsed]) -> tuple[list[Parsed], DataCounts]:
    """What `parse` makes of each row of all data sets, of the `first` rows of each where given."""
    parts = read_parts(data, first, parse)
    return [item for part in parts for item in part.items], add_counts([part.counts for part in parts])


def read_parts(data: Data, first: int | None, parse: Parser[Parsed]) -> list[Part[Parsed]]:
    """What `parse` makes of each row, by data set.

    Raises:
        DataError: see read_samples.
    """
    parse = parse if data.thoughts == "keep" else _with_thoughts(parse, data.thoughts)
    return [_read_part(source, first, parse, on_bad_row=data.on_bad_row) for source in data.parts]


def _with_thoughts(parse: Parser[Parsed], choice: Thoughts) -> Parser[Parsed]:
    """`parse`, with the thoughts of responses treated as data.thoughts says; prompts have none."""

    def treat(item: Any) -> Any:
        if isinstance(item, Sample):
            return treated(item, choice)
        return tuple(map(treat, item)) if isinstance(item, tuple) else item

    def parse_treated(row: Any, columns: Mapping[str, str]) -> Parse[Parsed]:
        found = parse(row, columns)
        return replace(found, items=[treat(item) for item in found.items])

    return parse_treated


def _read_part(source: Source, first: int | None, parse: Parser[Parsed], *, on_bad_row: str) -> Part[Parsed]:
    limit = min(filter(None, (source.limit, first)), default=None)
    items: list[Parsed] = []
    forms: Counter[str] = Counter()
    unread: Counter[str] = Counter()
    rows = bad = calling = context = 0
    first_bad = ""
    unseen = set(source.columns.values())
    for place, row in read_source(source.model_copy(update={"limit": limit})):
        rows += 1
        try:
            if isinstance(row, DataError):
                raise row
            unseen -= row.keys() if isinstance(row, Mapping) else set()
            parsed = parse(row, source.columns)
        except DataError as error:
            fault = f"{place}: {error}"
            if on_bad_row == "error":
                raise DataError(
                    f"{fault}. Correct the row, or set data.on_bad_row: skip to leave such rows out"
                ) from None
            bad += 1
            first_bad = first_bad or fault
            continue
        items += parsed.items
        forms[parsed.form] += 1
        unread.update(parsed.unread)
        calling += parsed.calling_turns
        context += parsed.context_turns
    if unseen and rows > bad:
        raise DataError(f"no row of the data set {source.label} has the columns {sorted(unseen)} that `columns` names")
    counts = DataCounts(
        rows=rows,
        bad_rows=bad,
        samples=len(items),
        drawn=len(items),
        calling_turns=calling,
        context_turns=context,
        first_bad=first_bad,
        forms=dict(forms),
        unread=dict(unread),
    )
    if not items:
        raise DataError(f"the data set {source.label} gives no sample: {_why_nothing(counts)}")
    return Part(source, items, counts)


def _why_nothing(counts: DataCounts) -> str:
    if not counts.rows:
        return "it has no rows"
    if counts.bad_rows == counts.rows:
        return f"all {counts.rows} rows are malformed, the first: {counts.first_bad}"
    return (
        f"of its assistant turns, {counts.calling_turns} call tools and {counts.context_turns} are marked as context "
        "only; nothing is left to learn from"
    )


# --- one row ------------------------------


def samples_of_row(row: Any, columns: Mapping[str, str] | None = None) -> list[Sample]:
    """The samples of one row: one per assistant turn that is learned; see parse_samples."""
    return list(parse_samples(row, columns or {}).items)


def parse_samples(row: Any, columns: Mapping[str, str]) -> Parse[Sample]:
    """The samples of one row of any form: one per assistant turn that neither calls tools nor is marked as context.

    Raises:
        DataError: the row has no form or several; something in it is missing, empty, unknown or not of its kind.
    """
    opened = open_row(row, columns)
    weights = weights_of(opened)
    conversation = conversation_of_row(opened)
    if not conversation.answers:
        raise DataError(f"{conversation.form.rpartition(' ')[2]} has no assistant turn to learn from")
    samples = conversation.samples()
    return Parse(
        samples if weights is None else [sample.weighted(weights) for sample in samples],
        conversation.form,
        conversation.unread,
        conversation.calling_turns,
        conversation.context_turns,
    )


def compared_of_row(row: Any, sides: Sequence[str] = PAIR, columns: Mapping[str, str] | None = None) -> Compared:
    """The responses of one row; see data.pairs.compared."""
    return compared(row, sides, columns).samples
