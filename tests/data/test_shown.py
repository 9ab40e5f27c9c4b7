"""What a prompt shows: parts of a conversation that a template leaves out are found by marks."""

import copy

import pytest
from transformers import AutoTokenizer

from rayfuse.data.render import Renderer
from rayfuse.data.sample import Message, Sample, canonical
from rayfuse.errors import DataError
from tests.data.test_messages import TOOL, conversation, sample_of
from tests.real_templates import DEEPSEEK, published

CHATML = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}<|assistant|>"


def only(condition):
    """A template that shows messages where a condition holds."""
    return CHATML.replace("in messages", f"in messages if {condition}")


@pytest.fixture
def renderer_of(tiny):
    tokenizer = AutoTokenizer.from_pretrained(tiny.model("instruct"))
    tokenizer.bos_token = "<s>"

    def make(text):
        copied = copy.copy(tokenizer)
        copied.chat_template = text
        return Renderer(copied)

    return make


LATER = only("m != messages[0] or messages | length < 3")
SYSTEM = Sample((Message("system", "Be short."), Message("user", "2 + 2?")), "4")


@pytest.mark.parametrize(
    ("template", "sample", "missing"),
    [
        (CHATML, SYSTEM, ()),
        (only("m.role != 'system'"), SYSTEM, ("the system message",)),
        (only("m.role != 'tool'"), sample_of(conversation(content="Look.")), ("a tool call", "the result of a tool")),
        (CHATML, sample_of(conversation(content="Look.")), ("a tool call",)),
        (CHATML, sample_of(conversation(content="Look."), tools=[TOOL]), ("a tool call", "the tools")),
        (
            LATER,
            Sample((*SYSTEM.messages, Message("user", "?")), "4"),
            ("the system message",),
        ),
        (published()["qwen2_5"], sample_of(conversation(content="Look."), tools=[TOOL]), ()),
        (published()["qwen3"], sample_of(conversation(content=None), tools=[TOOL]), ()),
        (published()["llama3_2"], sample_of(conversation(content="Look.")), ("the text beside a tool call",)),
        (published()["llama3_2"], sample_of(conversation(content=None), tools=[TOOL]), ()),
        (DEEPSEEK, sample_of(conversation(content="Look.")), ("a tool call",)),
        (DEEPSEEK, sample_of(conversation(content="")), ()),
        (None, SYSTEM, ()),
        (None, sample_of(conversation(content="Look."), tools=[TOOL]), ("a tool call", "the tools")),
    ],
)
def test_what_the_prompt_does_not_show_is_found(renderer_of, template, sample, missing):
    renderer = renderer_of(template)
    assert renderer.missing(sample) == missing
    if missing:
        with pytest.raises(DataError, match=rf"the prompt of .*instruct does not show {missing[0]}"):
            renderer.refuse_missing(sample)
    else:
        renderer.refuse_missing(sample)


def test_a_part_that_only_the_last_user_turn_shows_is_missing_after_a_result(renderer_of):
    """As in Mistral-Nemo, which writes the system message into the last message, if that is the user's."""
    template = (
        "{% set system = messages[0].content %}{% for m in messages[1:] %}"
        "{{ system + m.content if loop.last and m.role == 'user' else m.content }}</s>{% endfor %}"
    )
    renderer = renderer_of(template)
    assert renderer.missing(SYSTEM) == ()
    answered = (*SYSTEM.messages, Message("assistant", "4"), Message("tool", "7", canonical({"tool_call_id": "a"})))
    assert renderer.missing(Sample(answered, "It is 7.")) == ("the system message",)


def test_the_words_do_not_matter(renderer_of):
    renderer = renderer_of(only("m.role != 'system'"))
    for word in ("rayfuse000mark", "2 + 2?", "Be short."):
        assert renderer.missing(Sample((Message("system", word), Message("user", word)), word))
