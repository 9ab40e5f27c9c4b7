"""Thoughts: the prompt opens exactly one before a response that has one, and leaves none open before another."""

import copy
import json

import pytest
from transformers import AutoTokenizer

from rayfuse.config import Data
from rayfuse.data.render import Renderer
from rayfuse.data.rows import read_preferences, read_samples
from rayfuse.data.sample import Message, Sample
from rayfuse.data.thoughts import thought_kind, treated
from rayfuse.errors import DataError
from tests.real_templates import DEEPSEEK, SMOLLM3, published

PUBLISHED = published()
QUESTION = (Message("user", "2+2?"),)
WITH = Sample(QUESTION, "<think>\n2 and 2 are 4.\n</think>\n\nIt is 4.")
WITHOUT = Sample(QUESTION, "It is 4.")
BEGUN = Sample(QUESTION, "2 and 2 are 4.\n</think>\n\nIt is 4.")
EVERY = {**PUBLISHED, "smollm3": SMOLLM3, "deepseek": DEEPSEEK}
OPENING = ["deepseek", "deepseek_r1_distill", "deepseekv3", "nemotron_3_nano", "qwen3_5_think", "qwen3_6", "qwen3_8"]


@pytest.fixture
def renderer_of(tiny):
    """A renderer with a template, and its arguments."""
    tokenizer = AutoTokenizer.from_pretrained(tiny.model("instruct"))
    tokenizer.bos_token = "<s>"

    def make(text, **arguments):
        copied = copy.copy(tokenizer)
        copied.chat_template = EVERY.get(text, text)
        return Renderer(copied, arguments)

    return make


@pytest.mark.parametrize("name", OPENING)
def test_templates_that_open_a_thought_are_seen(renderer_of, name):
    assert renderer_of(name).opens_thought


@pytest.mark.parametrize("name", EVERY)
def test_one_thought_is_opened_and_it_is_closed(renderer_of, name):
    renderer = renderer_of(name)
    for sample in (WITH, BEGUN):
        whole = renderer.prompt_text(sample) + sample.response
        thought = whole[whole.index("2+2?") :]
        assert thought.count("<think>") == thought.count("</think>") == 1
        assert thought.index("<think>") < thought.index("2 and 2") < thought.index("</think>")
    thought = renderer.prompt_text(WITHOUT).partition("2+2?")[2]
    assert thought.count("<think>") in (0, thought.count("</think>"))


@pytest.mark.parametrize("name", ["qwen3_5_think", "qwen3_6", "qwen3_8", "nemotron_3_nano"])
@pytest.mark.parametrize("sample", [WITH, WITHOUT], ids=["thought", "no thought"])
def test_prompt_and_response_are_the_closed_conversation(renderer_of, name, sample):
    """The template itself is the oracle: what it makes of the whole conversation."""
    renderer = renderer_of(name)
    thought = {"reasoning_content": "2 and 2 are 4."} if sample is WITH else {}
    turns = [*sample.turns, {"role": "assistant", "content": "It is 4.", **thought}]
    closed = renderer.tokenizer.apply_chat_template(turns, tokenize=False)
    whole = renderer.prompt_text(sample) + sample.response
    assert "".join(closed.split()).startswith("".join(whole.split()))
    if name.startswith("qwen"):
        assert closed.startswith(whole)


@pytest.mark.parametrize("name", EVERY)
def test_thoughts_of_earlier_turns_are_opened_once_at_most(renderer_of, name):
    messages = (*QUESTION, Message("assistant", WITH.response), Message("user", "And 3+3?"))
    text = renderer_of(name).prompt_text(Sample(messages, WITH.response)).partition("2+2?")[2]
    earlier = text.partition("It is 4.")[0]
    assert earlier.count("<think>") == earlier.count("</think>") <= 1
    assert "It is 4." in text


def test_before_an_answer_without_a_thought_r1_opens_none(renderer_of):
    assert renderer_of("deepseek_r1_distill").prompt_text(WITHOUT).endswith("2+2?<｜Assistant｜>")
    assert renderer_of("deepseek_r1_distill").prompt_text(WITH).endswith("2+2?<｜Assistant｜>")


def test_before_an_answer_without_a_thought_qwen_closes_an_empty_one(renderer_of):
    end = "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert renderer_of("qwen3_6").prompt_text(WITHOUT).endswith(end)
    assert renderer_of("qwen3_6").prompt_text(WITH).endswith("<|im_start|>assistant\n")


def test_a_prompt_without_a_response_is_what_the_model_is_asked_with(renderer_of):
    for name in OPENING:
        renderer = renderer_of(name)
        turns = [message.as_dict() for message in QUESTION]
        asked = renderer.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        assert renderer.prompt_text(Sample(QUESTION, "")) == asked
        assert asked.rstrip().endswith("<think>")


def test_an_empty_thought_of_an_argument_gives_way_to_the_responses_own(renderer_of):
    renderer = renderer_of("qwen3", enable_thinking=False)
    assert renderer.prompt_text(WITHOUT).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert renderer.prompt_text(WITH).endswith("<|im_start|>assistant\n")
    assert renderer_of("qwen3").prompt_text(WITHOUT).endswith("<|im_start|>assistant\n")


@pytest.mark.parametrize("sample", [WITH, WITHOUT, BEGUN])
def test_all_models_share_the_bytes_of_the_response(renderer_of, sample):
    for name in (*OPENING, "qwen3", "llama3_2", "gptoss"):
        rendered = renderer_of(name).render(sample)
        assert rendered.ends[-1] == len(sample.response.encode())


def test_a_channel_is_named_as_the_template_names_it(renderer_of):
    assert renderer_of("gptoss").prompt_text(WITHOUT).endswith("<|start|>assistant<|channel|>final<|message|>")
    assert renderer_of("gptoss").prompt_text(Sample(QUESTION, "")).endswith("<|start|>assistant")


def test_a_template_that_knows_no_opened_turn_still_begins_the_answer(renderer_of):
    text = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}"
    assert renderer_of(text).prompt_text(WITHOUT) == "<|user|>2+2?</s><|assistant|>"


def test_a_template_that_leaves_its_thought_open_is_named(renderer_of):
    text = (
        "{% for m in messages %}{% if m.role == 'assistant' %}A: <think>\n{% endif %}{{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}A: <think>\n{% endif %}"
    )
    renderer = renderer_of(text)
    with pytest.raises(DataError, match=r"the chat template of .*instruct opens a thought before every response, and"):
        renderer.prompt_text(WITHOUT)
    assert renderer.prompt_text(WITH) == "2+2?</s>A: "


def test_a_response_that_never_closes_its_thought_is_refused(renderer_of):
    with pytest.raises(DataError, match="opens a thought with <think> that it never closes: '<think>"):
        renderer_of("qwen3").render(Sample(QUESTION, "<think>\n2 and 2"))


@pytest.mark.parametrize(
    ("response", "kind"),
    [
        ("It is 4.", "none"),
        ("<think>\n\n</think>\n\nIt is 4.", "whole"),
        ("\n<think>a</think>b", "whole"),
        ("a</think>b", "begun"),
        ("Write <think>a</think> around a thought.", "none"),
        ("Write <think> first.", "none"),
        ("", "none"),
    ],
)
def test_kinds_of_responses(response, kind):
    assert thought_kind(response) == kind


# --- what is learned of a thought ------------------------------


def test_a_thought_is_learned_read_or_left_out():
    assert treated(WITH, "keep") == WITH
    assert treated(WITH, "drop") == WITHOUT
    context = treated(WITH, "context")
    assert (context.thought, context.response) == ("<think>\n2 and 2 are 4.\n</think>\n\n", "It is 4.")
    begun = treated(BEGUN, "context")
    assert (begun.thought, begun.response) == (context.thought, "It is 4.")
    assert treated(BEGUN, "drop") == WITHOUT
    for choice in ("keep", "context", "drop"):
        assert treated(WITHOUT, choice) == WITHOUT


def test_a_thought_that_is_read_is_in_the_prompt_and_in_the_key(renderer_of):
    context = treated(WITH, "context")
    assert len({context.key, WITH.key, WITHOUT.key}) == 3
    for name in (*OPENING, "qwen3", "qwen2_5"):
        renderer = renderer_of(name)
        assert renderer.prompt_text(context) + context.response == renderer.prompt_text(WITH) + WITH.response


@pytest.mark.parametrize("choice", ["context", "drop"])
def test_a_thought_and_nothing_else_cannot_be_left_out(choice):
    with pytest.raises(DataError, match=f"a thought and nothing else, and data.thoughts is {choice}"):
        treated(Sample(QUESTION, "<think>\na\n</think>\n\n"), choice)


@pytest.mark.parametrize(("choice", "thought"), [("keep", ""), ("context", "<think>\na\n</think>\n\n"), ("drop", "")])
def test_data_are_read_with_the_thoughts_that_the_configuration_wants(tmp_path, choice, thought):
    path = tmp_path / "data.jsonl"
    sides = {"chosen": "<think>\na\n</think>\n\nyes", "rejected": "<think>\na\n</think>\n\nno"}
    path.write_text(json.dumps({"prompt": "2+2?", **sides}) + "\n" + json.dumps({"prompt": "?", **sides}) + "\n")
    ((chosen, rejected), _), _ = read_preferences(Data(path=str(path), thoughts=choice))
    assert (chosen.thought, rejected.thought) == (thought, thought)
    if choice == "keep":
        assert chosen.response == sides["chosen"]
    else:
        assert (chosen.response, rejected.response) == ("yes", "no")
    path.write_text(json.dumps({"prompt": "2+2?", "response": sides["chosen"]}) + "\n")
    (sample,), _ = read_samples(Data(path=str(path), thoughts=choice))
    assert (sample.thought, sample.response) == (thought, chosen.response)
