"""Which token of the student stands for a teacher's token."""

import numpy as np
import pytest

from rayfuse.alignment.token_bytes import bytes_to_ids, token_bytes
from rayfuse.prepare.vocabulary import Vocabulary, counterparts
from tests.real_tokenizers import FAMILIES, qwen, sentencepiece_mistral, smollm2


def _vocabulary(tokenizer, end_of_turn):
    return Vocabulary(token_bytes(tokenizer), bytes_to_ids(tokenizer), end_of_turn)


def test_byte_level_tokens_correspond_where_their_strings_are_equal():
    """Both tokenizers write tokens in GPT-2's alphabet, so equal bytes are equal strings (which is TRL's rule)."""
    teacher, student = qwen(), smollm2()
    end = teacher.convert_tokens_to_ids("<|im_end|>")
    table = counterparts(_vocabulary(teacher, end), _vocabulary(student, 2))
    strings, special = student.get_vocab(), set(teacher.all_special_ids) | set(teacher.added_tokens_decoder)
    assert table[end] == 2
    shared = 0
    for token, index in teacher.get_vocab().items():
        if index not in special:
            expected = strings.get(token, -1)
            expected = -1 if expected in student.all_special_ids else expected
            assert table[index] == expected, token
            shared += expected >= 0
    assert 20_000 < shared < len(strings)


@pytest.mark.parametrize("teacher", ["smollm2", "sentencepiece"])
@pytest.mark.parametrize("student", ["smollm2", "sentencepiece"])
def test_counterparts_write_the_same_bytes_and_no_two_are_equal(teacher, student):
    teacher, student = (_vocabulary(FAMILIES[name](), 2) for name in (teacher, student))
    table = counterparts(teacher, student)
    there = np.flatnonzero(table >= 0)
    assert all(teacher.pieces[i] == student.pieces[table[i]] for i in there if i != 2)
    assert len(set(table[there])) == len(there)


def test_a_piece_of_its_own_stands_before_the_byte_that_writes_the_same():
    """SentencePiece writes "A" with its piece, and a byte of what it has no piece for with a fall-back id."""
    tokenizer = sentencepiece_mistral()
    ids = bytes_to_ids(tokenizer)
    assert tokenizer.convert_ids_to_tokens([ids[b"A"], ids[b"\xf0"], ids[b" the"]]) == ["A", "<0xF0>", "▁the"]
