"""The view of `rayfuse inspect align`, on real tokenizers and on hand-made ones."""

import re

import numpy as np
import pytest
from rich.cells import cell_len
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rayfuse.alignment.inspection import KINDS, alignment_view, shared_share, unshared_tokens
from rayfuse.alignment.token_bytes import encode_response, token_bytes
from rayfuse.errors import AlignmentError
from tests.real_tokenizers import qwen, sentencepiece_mistral, smollm2, tekken

TEXT = 'def f(a):\n    """Sum of 1234 + 中文註釋 👨‍👩‍👧."""\n    return a  # naïve\r\n' + "x" * 150


def byte_level(*words: str) -> PreTrainedTokenizerFast:
    """Bytes, and the given words as whole tokens."""
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *words]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, [], ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(" ", "merged_with_next"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def printed(renderable, width: int = 100, color: bool = False) -> list[str]:
    console = Console(
        width=width, force_terminal=color, color_system="truecolor" if color else None, legacy_windows=False
    )
    with console.capture() as capture:
        console.print(renderable)
    return capture.get().splitlines()


def test_the_view_of_a_hand_made_pair():
    student, teacher = byte_level("ab", "Ġcd"), byte_level("Ġcd")
    lines = printed(alignment_view(student, {"teacher": teacher}, "ab cd\nx y"))
    assert lines[:5] == [
        "student a b┃·┃c┃d┃⏎┃",
        "teacher a╎b┃·┃c┃d┃⏎┃",
        "",
        "student x┃·┃y┃",
        "teacher x┃·┃y┃",
    ]
    text = "\n".join(lines)
    assert "student tokens that no teacher has: 1 of 258 (0.4%)" in text
    assert any(line.split() == ["│", "words", "in", "Latin", "letters", "│", "1", "│", "ab", "│"] for line in lines)
    assert any("│ teacher │" in line and "100.0%" in line for line in lines)


def test_a_boundary_that_the_student_shares_with_some_teachers_is_marked_on_their_lines():
    student, first, second = byte_level(), byte_level("ab"), byte_level()
    lines = printed(alignment_view(student, {"first": first, "second": second}, "ab"))
    assert lines[:3] == ["student a╎b┃", "first   a b┃", "second  a┃b┃"]


@pytest.mark.parametrize("width", [60, 100])
def test_every_line_fits_and_holds_the_text(width):
    teachers = {"smollm2": smollm2(), "tekken": tekken(), "sentencepiece": sentencepiece_mistral()}
    lines = printed(alignment_view(qwen(), teachers, TEXT), width)
    assert max(cell_len(line) for line in lines) <= width
    legend = next(number for number, line in enumerate(lines) if line.startswith("boundary of tokens"))
    for name in ("student", *teachers):
        rows = [line for line in lines[:legend] if line.startswith(name)]
        cells = re.sub("[ ┃╎]", "", "".join(row[14:] for row in rows))
        for visible, character in {"·": " ", "⏎": "\n", "␍": "\r", "\\u200d": "\u200d"}.items():
            cells = cells.replace(visible, character)
        parts = re.split(r"\\x([0-9a-f]{2})", cells)
        assert b"".join(bytes.fromhex(p) if i % 2 else p.encode() for i, p in enumerate(parts)).decode() == TEXT
    for kind in ("Chinese, Japanese, Korean", "white space", "words in Latin letters", "punctuation and symbols"):
        assert any(kind in line for line in lines[legend:])


def test_colour_tells_tokens_apart():
    text = "\n".join(printed(alignment_view(smollm2(), {"qwen": qwen()}, "a b"), color=True))
    assert "\x1b[48;5;237ma" in text
    assert "\x1b[48;5;240m·b" in text


def test_the_share_counts_the_tokens_and_not_the_end():
    assert shared_share(np.array([1, 2, 3]), np.array([3])) == pytest.approx(1 / 3)
    assert shared_share(np.array([1, 2, 3]), np.array([1, 3])) == pytest.approx(2 / 3)
    assert shared_share(np.array([3]), np.array([1, 2, 3])) == 1.0
    assert shared_share(np.array([], dtype=np.int64), np.array([], dtype=np.int64)) == 1.0
    with pytest.raises(AlignmentError):
        shared_share(np.array([1]), np.array([2]))


def test_the_share_of_a_real_pair_is_the_naive_one():
    student, teacher = encode_response(smollm2(), TEXT)[1], encode_response(sentencepiece_mistral(), TEXT)[1]
    starts, other = [0, *student[:-1].tolist()], {0, *teacher.tolist()}
    assert shared_share(student, teacher) == sum(start in other for start in starts) / len(starts)


@pytest.mark.parametrize(
    ("token", "kind"),
    [
        ("Ġ2024", "multi-digit numerals"),
        ("ĠĠĠ", "white space"),
        ("ĠĊ", "white space"),
        ("Ġword", "words in Latin letters"),
        ("naÃ¯ve", "words in Latin letters"),
        ("ä¸Ńæĸĩ", "Chinese, Japanese, Korean"),
        ("ÐĶÐ°", "words in other scripts"),
        ("ä¸", "parts of characters"),
        ("Ġ==", "punctuation and symbols"),
        ("x86", "letters with digits"),
        (".append", "letters or digits with signs"),
    ],
)
def test_the_kind_of_a_token(token, kind):
    unshared = unshared_tokens(byte_level(token), {"bytes": byte_level()})
    assert {name: len(tokens) for name, tokens in unshared.items()} == {name: int(name == kind) for name in KINDS}


def test_no_token_is_lost_between_the_kinds():
    unshared = unshared_tokens(qwen(), {"smollm2": smollm2(), "tekken": tekken()})
    known = set(token_bytes(smollm2())) | set(token_bytes(tekken()))
    assert sum(map(len, unshared.values())) == sum(piece not in known for piece in token_bytes(qwen()) if piece)
    assert not any(unshared_tokens(qwen(), {"itself": qwen()}).values())


def test_a_text_that_one_tokenizer_changes_is_refused():
    with pytest.raises(AlignmentError, match="NFC"):
        alignment_view(smollm2(), {"qwen": qwen()}, "cafe\u0301")
