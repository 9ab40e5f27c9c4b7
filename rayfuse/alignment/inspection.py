"""`rayfuse inspect align`: how the teachers' tokens meet the student's, on one text and over the whole vocabulary.

Pure: takes tokenizers and a text, returns things that rich can print. The text is cut at every boundary that any model
has; a line of the student's tokens stands above a line per teacher, in the same columns, so that the boundary marks are
under each other. White space is made visible and a part of a character is shown as its bytes, because a boundary can
fall inside a character.
"""

from __future__ import annotations

import itertools
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.style import Style
from rich.table import Table
from rich.text import Text

from rayfuse.alignment.pairs import align
from rayfuse.alignment.token_bytes import encode_response, token_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

VISIBLE = {" ": "·", "\n": "⏎", "\r": "␍", "\t": "→"}
SHARED, ALONE = "┃", "╎"
TOKEN_STYLES = (Style(bgcolor="grey23"), Style(bgcolor="grey35"))
MARK_STYLES = {SHARED: Style(color="green", bold=True), ALONE: Style(color="red")}
KINDS = (
    "parts of characters",
    "white space",
    "multi-digit numerals",
    "single digits",
    "Chinese, Japanese, Korean",
    "words in Latin letters",
    "words in other scripts",
    "punctuation and symbols",
    "letters with digits",
    "letters or digits with signs",
)


class Segment(NamedTuple):
    """A piece of the text that no model cuts: the byte it ends at, its visible form, false if it goes on elsewhere."""

    end: int
    shown: str
    closed: bool


@dataclass(frozen=True, slots=True)
class TokenLines:
    """One text cut by several models: `ends` maps a model's name to its byte ends, the student first."""

    text: bytes
    ends: Mapping[str, NDArray[np.int64]]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        label_width = max(cell_len(name) for name in self.ends) + 1
        room = max(options.max_width - label_width - 1, 16)
        for number, block in enumerate(_blocks(_segments(self.text, self.ends, room), room)):
            if number:
                yield Text("")
            for name, ends in self.ends.items():
                yield self._line(name.ljust(label_width), block, ends)

    def _line(self, label: str, block: list[Segment], ends: NDArray[np.int64]) -> Text:
        student, *teachers = self.ends.values()
        own = set(ends.tolist())
        others = teachers if ends is student else [student]
        shared = own.intersection(*(set(other.tolist()) for other in others))
        line = Text(no_wrap=True, overflow="crop").append(label, "bold")
        for segment in block:
            token_style = TOKEN_STYLES[int(np.searchsorted(ends, segment.end)) % 2]
            line.append(segment.shown, token_style)
            if segment.closed and segment.end in own:
                mark = SHARED if segment.end in shared else ALONE
                line.append(mark, MARK_STYLES[mark])
            else:
                line.append(" ", token_style)
        return line


def alignment_view(
    student_tokenizer: PreTrainedTokenizerBase,
    teacher_tokenizers: Mapping[str, PreTrainedTokenizerBase],
    text: str,
) -> Group:
    """What `rayfuse inspect align` prints: the text under every tokenizer, the shared positions, the unshared tokens.

    Raises AlignmentError where one of the tokenizers changes the text.
    """
    student_ends = encode_response(student_tokenizer, text)[1]
    teacher_ends = {name: encode_response(tokenizer, text)[1] for name, tokenizer in teacher_tokenizers.items()}
    legend = Text("boundary of tokens: ").append(SHARED, MARK_STYLES[SHARED]).append(" shared with the student ")
    legend.append("(student: with every teacher)  ").append(ALONE, MARK_STYLES[ALONE]).append(" not shared")
    return Group(
        TokenLines(text.encode(), {"student": student_ends, **teacher_ends}),
        Text(""),
        legend,
        Text(""),
        *_share_table(student_ends, teacher_ends),
        Text(""),
        *_vocabulary_table(student_tokenizer, teacher_tokenizers),
    )


def shared_share(student_ends: NDArray[np.int64], teacher_ends: NDArray[np.int64]) -> float:
    """The share, 0..1, of the student's tokens that are predicted at a position where the teacher predicts too.

    Row i predicts token i; the end-of-turn, which always has a counterpart, is not counted. An empty text has share 1.
    """
    if len(student_ends) == 0:
        return 1.0
    shared_rows = align(student_ends, teacher_ends).student
    return int((shared_rows < len(student_ends)).sum()) / len(student_ends)


def unshared_tokens(
    student_tokenizer: PreTrainedTokenizerBase, teacher_tokenizers: Mapping[str, PreTrainedTokenizerBase]
) -> dict[str, list[str]]:
    """The student's tokens whose bytes no teacher has as one token, by kind (every kind of KINDS), in order of id."""
    known: set[bytes] = {b""}.union(*(token_bytes(tokenizer) for tokenizer in teacher_tokenizers.values()))
    unshared: dict[str, list[str]] = {kind: [] for kind in KINDS}
    for piece in token_bytes(student_tokenizer):
        if piece not in known:
            unshared[_kind(piece)].append("".join(_characters(piece)))
    return unshared


def _segments(text: bytes, ends: Mapping[str, NDArray[np.int64]], room: int) -> Iterator[Segment]:
    """The text between the boundaries of all models; what is wider than a line is cut."""
    cuts = np.unique(np.concatenate([[0, len(text)], *ends.values()])).tolist()
    for start, end in itertools.pairwise(cuts):
        shown = ""
        for character in _characters(text[start:end]):
            if cell_len(shown + character) >= room:
                yield Segment(end, shown, closed=False)
                shown = ""
            shown += character
        yield Segment(end, shown, closed=True)


def _blocks(segments: Iterable[Segment], room: int) -> Iterator[list[Segment]]:
    """The segments of each block of lines: a block ends with a line of the text, or where the terminal is full."""
    block: list[Segment] = []
    used = 0
    for segment in segments:
        width = cell_len(segment.shown) + 1
        if block and used + width > room:
            yield block
            block, used = [], 0
        block.append(segment)
        used += width
        if segment.shown.endswith(VISIBLE["\n"]):
            yield block
            block, used = [], 0
    if block:
        yield block


def _characters(piece: bytes) -> Iterator[str]:
    """What to show for each character of a piece of text, bytes of a cut character as \\xNN."""
    for place, character in enumerate(piece.decode("utf-8", "surrogateescape")):
        code = ord(character)
        if character in VISIBLE:
            yield VISIBLE[character]
        elif 0xDC80 <= code <= 0xDCFF:
            yield f"\\x{code - 0xDC00:02x}"
        elif not character.isprintable():
            yield f"\\u{code:04x}"
        else:
            yield "◌" + character if place == 0 and cell_len(character) == 0 else character


def _kind(piece: bytes) -> str:
    """The kind (of KINDS) of a token."""
    try:
        word = piece.decode().strip()
    except UnicodeDecodeError:
        return "parts of characters"
    if not word:
        return "white space"
    if word.isdigit():
        return "multi-digit numerals" if len(word) > 1 else "single digits"
    scripts = {_script(character) for character in word}
    if "CJK" in scripts:
        return "Chinese, Japanese, Korean"
    if scripts == {"sign"}:
        return "punctuation and symbols"
    if "sign" in scripts:
        return "letters or digits with signs"
    if "digit" in scripts:
        return "letters with digits"
    return "words in Latin letters" if scripts == {"LATIN"} else "words in other scripts"


def _script(character: str) -> str:
    if character.isdigit():
        return "digit"
    if character.isascii():
        return "LATIN" if character.isalpha() else "sign"
    if unicodedata.category(character)[0] not in "LM":
        return "sign"
    name = unicodedata.name(character, "")
    if name.startswith(("CJK", "HIRAGANA", "KATAKANA", "HANGUL")):
        return "CJK"
    return "LATIN" if name.startswith("LATIN") else "other"


def _share_table(student_ends: NDArray[np.int64], teacher_ends: Mapping[str, NDArray[np.int64]]) -> tuple[Text, Table]:
    title = Text(f"where the teachers meet the student's {len(student_ends):,} tokens", style="bold")
    table = Table()
    table.add_column("teacher")
    table.add_column("its tokens", justify="right")
    table.add_column("student tokens with a counterpart", justify="right")
    for name, ends in teacher_ends.items():
        table.add_row(name, f"{len(ends):,}", f"{shared_share(student_ends, ends):.1%}")
    return title, table


def _vocabulary_table(
    student_tokenizer: PreTrainedTokenizerBase, teacher_tokenizers: Mapping[str, PreTrainedTokenizerBase]
) -> tuple[Text, Table]:
    unshared = unshared_tokens(student_tokenizer, teacher_tokenizers)
    vocabulary = sum(1 for piece in token_bytes(student_tokenizer) if piece)
    total = sum(map(len, unshared.values()))
    share = total / max(vocabulary, 1)
    title = Text(f"student tokens that no teacher has: {total:,} of {vocabulary:,} ({share:.1%})", style="bold")
    table = Table()
    table.add_column("kind", no_wrap=True)
    table.add_column("tokens", justify="right")
    table.add_column("for example")
    for kind, tokens in sorted(unshared.items(), key=lambda item: -len(item[1])):
        if tokens:
            table.add_row(kind, f"{len(tokens):,}", Text(_examples(tokens), no_wrap=True, overflow="ellipsis"))
    return title, table


def _examples(tokens: list[str], count: int = 6) -> str:
    """Some of the tokens, from all over the vocabulary, none longer than 16 characters."""
    short = [token for token in tokens if len(token) <= 16] or [token[:15] + "…" for token in tokens]
    return "  ".join(short[:: max(1, len(short) // count)][:count])
