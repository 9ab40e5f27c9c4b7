"""Rendering: the ids that a model reads are those of its own template, and the response is never anything but text."""

import copy
import logging

import numpy as np
import pytest
from tokenizers import processors
from transformers import AutoTokenizer

from rayfuse.data.render import Renderer
from rayfuse.data.sample import Sample
from rayfuse.errors import DataError, ModelError
from rayfuse.quickstart.tiny_models import STYLES
from tests.real_tokenizers import FAMILIES, qwen, smollm2, tekken

SAMPLE = Sample((("user", "List 3 primes, and say 世界."),), "2, 3, 5\n\n世界 🙂")
CHAT = Sample((("user", "Hello"), ("assistant", "Hi."), ("user", "Count to 12345")), "1, 2, ...")


def template_text(tokenizer, sample):
    """What the template writes for the whole conversation, the response as its last turn."""
    turns = sample.turns
    return tokenizer.apply_chat_template([*turns, {"role": "assistant", "content": sample.response}], tokenize=False)


@pytest.fixture
def tokenizers(tiny):
    loaded = {name: AutoTokenizer.from_pretrained(tiny.model(name)) for name in STYLES}
    return loaded | {"smollm2": smollm2(), "qwen": qwen()}


@pytest.mark.parametrize("name", [*STYLES, "smollm2", "qwen"])
@pytest.mark.parametrize("sample", [SAMPLE, CHAT], ids=["one turn", "three turns"])
def test_ids_are_what_the_template_writes_as_a_whole(tokenizers, name, sample):
    tokenizer = tokenizers[name]
    rendered = Renderer(tokenizer).render(sample)
    ids = [*rendered.prompt_ids.tolist(), *rendered.response_ids.tolist()]
    whole = tokenizer.encode(template_text(tokenizer, sample), add_special_tokens=False)
    assert ids == whole[: len(ids)]
    assert tokenizer.decode(whole[len(ids) :]).strip() == ""
    assert rendered.length == len(ids)
    assert rendered.cut == 0
    assert tokenizer.decode(rendered.response_ids[:-1]) == sample.response
    assert rendered.ends[-1] == len(sample.response.encode())
    assert len(rendered.ends) == len(rendered.response_ids) - 1


@pytest.mark.parametrize(
    ("name", "token"),
    [
        ("math", "<|end|>"),
        ("code", "<|im_end|>"),
        ("instruct", "</s>"),
        ("pivot", "<|over|>"),
        ("smollm2", "<|im_end|>"),
        ("qwen", "<|im_end|>"),
    ],
)
def test_end_of_turn_is_what_the_template_writes_after_the_response(tokenizers, name, token):
    renderer = Renderer(tokenizers[name])
    assert tokenizers[name].convert_ids_to_tokens(renderer.end_of_turn) == token
    assert renderer.render(SAMPLE).response_ids[-1] == renderer.end_of_turn


@pytest.mark.parametrize("name", ["tekken", "sentencepiece"])
def test_prompt_and_response_are_told_apart_by_every_family(name):
    tokenizer = copy.deepcopy(FAMILIES[name]())
    tokenizer.chat_template = tokenizer.chat_template or (
        "{% for m in messages %}{{ m['content'] }}" + f"{{{{ {tokenizer.eos_token!r} }}}}" + "{% endfor %}"
    )
    renderer = Renderer(tokenizer)
    rendered = renderer.render(SAMPLE)
    prompt = tokenizer.encode(renderer.prompt_text(SAMPLE), add_special_tokens=False)
    assert rendered.prompt_ids.tolist() == prompt
    assert rendered.ends[-1] == len(SAMPLE.response.encode())
    assert (np.diff(rendered.ends) >= 0).all()


# --- special tokens in the text ------------------------------


@pytest.mark.parametrize("name", [*STYLES, "smollm2", "qwen"])
def test_a_response_that_looks_like_special_tokens_stays_text(tokenizers, name):
    tokenizer = tokenizers[name]
    marks = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    assert marks
    response = "a " + " ".join(marks) + "".join(marks) + " z"
    rendered = Renderer(tokenizer).render(Sample((("user", "?"),), response))
    assert not set(rendered.response_ids[:-1].tolist()) & set(tokenizer.all_special_ids)
    assert not set(rendered.response_ids[:-1].tolist()) & {tokenizer.convert_tokens_to_ids(mark) for mark in marks}
    assert tokenizer.decode(rendered.response_ids[:-1]) == response
    assert rendered.ends[-1] == len(response.encode())


# --- without a template ------------------------------


@pytest.fixture
def plain(tiny):
    """A tokenizer with bos and eos, and no chat template."""
    tokenizer = AutoTokenizer.from_pretrained(tiny.model("instruct"))
    tokenizer.chat_template = None
    tokenizer.bos_token = "<s>"
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    return tokenizer


def test_without_a_template_prompts_are_plain_text_and_the_log_says_so(plain, caplog):
    with caplog.at_level(logging.WARNING, logger="rayfuse.data.render"):
        renderer = Renderer(plain)
    assert caplog.messages == [f"{plain.name_or_path} has no chat template: prompts are rendered as plain text"]
    assert renderer.plain
    rendered = renderer.render(CHAT)
    text = "Hello\n\nHi.\n\nCount to 12345"
    assert renderer.prompt_text(CHAT) == text
    assert rendered.prompt_ids.tolist() == [plain.bos_token_id, *plain.encode(text, add_special_tokens=False)]
    assert rendered.response_ids[-1] == plain.eos_token_id
    assert plain.decode(rendered.response_ids[:-1]) == CHAT.response


def test_bos_only_where_the_tokenizer_itself_writes_it(tiny, plain):
    without = AutoTokenizer.from_pretrained(tiny.model("instruct"))
    without.chat_template = None
    without.bos_token = "<s>"
    assert Renderer(without).render(CHAT).prompt_ids.tolist() == Renderer(plain).render(CHAT).prompt_ids.tolist()[1:]


def test_a_template_writes_its_own_bos(plain, tiny):
    plain.chat_template = AutoTokenizer.from_pretrained(tiny.model("instruct")).chat_template
    ids = Renderer(plain).render(SAMPLE).prompt_ids.tolist()
    assert ids.count(plain.bos_token_id) == 1
    assert ids[0] == plain.bos_token_id


def test_an_empty_prompt_begins_with_bos_or_eos(plain):
    empty = Sample((("user", ""),), "x")
    assert Renderer(plain).render(empty).prompt_ids.tolist() == [plain.bos_token_id]
    plain.bos_token = None
    assert Renderer(plain).render(empty).prompt_ids.tolist() == [plain.eos_token_id]


def test_no_token_ends_a_turn(plain):
    plain.eos_token = None
    with pytest.raises(ModelError, match=rf"{plain.name_or_path} has no end-of-turn token: .* no eos_token; set one"):
        Renderer(plain)


def test_eos_ends_the_turn_of_a_template_that_writes_nothing_after_it(plain):
    plain.chat_template = "{% for m in messages %}{{ m['content'] + '\n' }}{% endfor %}"
    assert Renderer(plain).end_of_turn == plain.eos_token_id


# --- lengths ------------------------------


def test_prompts_are_cut_from_the_left(tokenizers):
    renderer = Renderer(tokenizers["math"])
    whole = renderer.render(SAMPLE)
    for fewer in (1, 5, len(whole.prompt_ids) - 1):
        rendered = renderer.render(SAMPLE, whole.length - fewer)
        assert rendered.cut == fewer
        assert rendered.length == whole.length - fewer
        np.testing.assert_array_equal(rendered.prompt_ids, whole.prompt_ids[fewer:])
        np.testing.assert_array_equal(rendered.response_ids, whole.response_ids)
        np.testing.assert_array_equal(rendered.ends, whole.ends)


def test_what_fits_is_not_cut(tokenizers):
    renderer = Renderer(tokenizers["math"])
    whole = renderer.render(SAMPLE)
    for length in (whole.length, whole.length + 1, None):
        rendered = renderer.render(SAMPLE, length)
        assert rendered.cut == 0
        np.testing.assert_array_equal(rendered.prompt_ids, whole.prompt_ids)


def test_a_response_is_never_cut(tokenizers):
    renderer = Renderer(tokenizers["math"])
    n = len(renderer.render(SAMPLE).response_ids)
    assert len(renderer.render(SAMPLE, n + 1).prompt_ids) == 1
    with pytest.raises(DataError, match=rf"the response has {n} tokens under .*math, more than max_length {n} leaves"):
        renderer.render(SAMPLE, n)


# --- templates that refuse ------------------------------


def test_a_refused_role_names_the_model_and_the_roles(tokenizers):
    tokenizer = copy.deepcopy(tokenizers["code"])
    refuse = "{% for m in messages if m['role'] == 'system' %}{{ raise_exception('no system role') }}{% endfor %}"
    tokenizer.chat_template = refuse + tokenizer.chat_template
    renderer = Renderer(tokenizer)
    system = Sample((("system", "Be short."), ("user", "2 + 2?")), "4")
    with pytest.raises(
        DataError,
        match=r"the chat template of .*/code refuses a conversation with the roles \[system, user\]: no system role",
    ):
        renderer.render(system)
    assert renderer.render(SAMPLE).length > 0


def test_a_conversation_that_begins_with_the_assistant_is_refused_where_the_template_needs_a_first_message():
    with pytest.raises(DataError, match=r"refuses a conversation with the roles \[\]"):
        Renderer(smollm2()).render(Sample((), "Hello!"))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('nothing is right') }}", "the chat template cannot be used: .*code.*nothing is right"),
        ("{% for m in messages %}", "the chat template cannot be used: .*code"),
        ("{{ messages[0]['content'] }}", "the chat template of .*code leaves the assistant's text out"),
    ],
    ids=["raises", "no Jinja", "writes no response"],
)
def test_a_template_that_cannot_be_used(tokenizers, template, message):
    tokenizer = copy.deepcopy(tokenizers["code"])
    tokenizer.chat_template = template
    with pytest.raises(ModelError, match=message):
        Renderer(tokenizer)


def test_tekken_without_a_template_is_plain(caplog):
    tokenizer = copy.deepcopy(tekken())
    tokenizer.chat_template = None
    renderer = Renderer(tokenizer)
    assert renderer.plain
    assert "has no chat template" in caplog.text
    assert renderer.render(SAMPLE).response_ids[-1] == tokenizer.eos_token_id
