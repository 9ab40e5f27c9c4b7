"""What of the sampled tokens is text."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from rayfuse.alignment.token_bytes import bytes_to_ids
from rayfuse.config import Student
from rayfuse.data.render import Renderer
from rayfuse.data.rollout import Rollout, prompt_ids, render_rollout, text_of_tokens
from rayfuse.data.sample import Sample

E_ACUTE = "é".encode()


@pytest.fixture(scope="module")
def renderer(tiny):
    return Renderer.of(Student(model=tiny.model("pivot")))


def _byte(renderer, value):
    """The id that writes one byte."""
    return bytes_to_ids(renderer.tokenizer)[bytes([value])]


def test_text_ends_with_the_turn_and_its_tokens_are_kept_as_they_were_sampled(renderer):
    letters = [_byte(renderer, value) for value in b"red"]
    end = renderer.end_of_turn
    assert len(renderer.tokenizer.encode("red", add_special_tokens=False)) < 3, "the tokenizer writes it otherwise"
    text = text_of_tokens(renderer.tokenizer, [*letters, end, letters[0]], end)
    assert text == ("red", tuple(letters), (1, 2, 3), True)
    assert text_of_tokens(renderer.tokenizer, letters, end) == ("red", tuple(letters), (1, 2, 3), False)


def test_text_ends_before_a_special_token_and_before_a_broken_character(renderer):
    a, end = _byte(renderer, ord("a")), renderer.end_of_turn
    special = renderer.tokenizer.convert_tokens_to_ids("<|role|>")
    assert special != end
    assert text_of_tokens(renderer.tokenizer, [a, special, a, end], end) == ("a", (a,), (1,), False)
    first, second = (_byte(renderer, value) for value in E_ACUTE)
    assert text_of_tokens(renderer.tokenizer, [a, first, second, end], end).text == "aé"
    assert text_of_tokens(renderer.tokenizer, [a, first, a, end], end) == ("a", (a,), (1,), False)
    assert text_of_tokens(renderer.tokenizer, [second, end], end) == ("", (), (), False)
    assert text_of_tokens(renderer.tokenizer, [end], end) == ("", (), (), True)


def test_the_student_reads_the_prompt_that_it_was_asked_with(renderer):
    sample = Sample((("user", "Say red."),), "red")
    letters = tuple(_byte(renderer, value) for value in b"red")
    rollout = Rollout(sample.messages, "red", token_ids=letters, ends=(1, 2, 3), written=sample)
    asked, cut = prompt_ids(renderer, sample, 100)
    assert cut == 0
    rendered = render_rollout(renderer, rollout, 100)
    assert rendered.prompt_ids.tolist() == asked.tolist()
    assert rendered.response_ids.tolist() == [*letters, renderer.end_of_turn]
    assert rendered.ends.tolist() == [1, 2, 3]
    assert renderer.tokenizer.decode(asked).endswith("<|role|>assistant<|text|>")
    short, cut = prompt_ids(renderer, sample, 4)
    assert short.tolist() == asked[-4:].tolist()
    assert cut == len(asked) - 4
    assert rollout.key == sample.key, "teachers read the text, not the tokens"


def test_a_text_that_a_tokenizer_changes_is_not_readable_for_it(renderer):
    composed = Rollout((("user", "?"),), "e\u0301", token_ids=(1,), ends=(3,))
    assert composed.readable_for([renderer.tokenizer])
    nfc = AutoTokenizer.from_pretrained(renderer.tokenizer.name_or_path)
    nfc.backend_tokenizer.normalizer = normalizers.NFC()
    assert not composed.readable_for([renderer.tokenizer, nfc])
    assert not Rollout((("user", "?"),), "").readable_for([])


def test_a_tokenizer_with_a_space_of_its_own_before_a_text():
    """SentencePiece: the first piece holds a space that is no part of the text."""
    tokenizer = _spaced()
    ids = tokenizer.encode("red cat", add_special_tokens=False)
    text = text_of_tokens(tokenizer, ids, 0)
    assert text.text == "red cat"
    assert text.ends[-1] == 7


def _spaced():
    words = {"<end>": 0, "▁red": 1, "▁cat": 2, "▁": 3}
    letters = {letter: number for number, letter in enumerate("redcat", start=4)}
    made = Tokenizer(models.Unigram([(word, -1.0) for word in {**words, **letters}], unk_id=None))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    made.decoder = decoders.Metaspace(prepend_scheme="first")
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>")
