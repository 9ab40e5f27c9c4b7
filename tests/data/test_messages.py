"""Tool calls, tools, results and nulls: as each model's own template renders them, in the form that it reads."""

import copy
import json

import pytest
from transformers import AutoTokenizer

from rayfuse.data.render import Renderer
from rayfuse.data.sample import Message, Sample, canonical
from rayfuse.errors import DataError
from tests.real_templates import DEEPSEEK, MISTRAL_SMALL, published

PUBLISHED = published()
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "weather of a <city> & 世界",
        "parameters": {"type": "object", "properties": {"city": {"type": "string", "description": "its name"}}},
    },
}
ARGUMENTS = {"city": "Lund", "at": "12:00", "all": True}
"""Not in alphabetical order: templates write keys in the order given."""


def call(arguments=ARGUMENTS, call_id="call00001"):
    return {"id": call_id, "type": "function", "function": {"name": "get_weather", "arguments": arguments}}


def conversation(*, arguments=ARGUMENTS, content=None, call_id="call00001"):
    return [
        {"role": "user", "content": "Weather in Lund?"},
        {"role": "assistant", "content": content, "tool_calls": [call(arguments, call_id)]},
        {"role": "tool", "tool_call_id": call_id, "name": "get_weather", "content": '{"t": 7}'},
    ]


def sample_of(turns, *, tools=(), response="It is 7 degrees."):
    messages = []
    for turn in turns:
        fields = {key: value for key, value in turn.items() if key not in ("role", "content")}
        messages.append(Message(turn["role"], turn.get("content"), canonical(fields) if fields else ""))
    return Sample(tuple(messages), response, tools=canonical(list(tools)) if tools else "")


@pytest.fixture
def renderer_of(tiny):
    """A renderer with the template of a given text, or of a given name."""
    tokenizer = AutoTokenizer.from_pretrained(tiny.model("instruct"))
    tokenizer.bos_token = "<s>"

    def make(text):
        copied = copy.copy(tokenizer)
        copied.chat_template = PUBLISHED.get(text, text)
        return Renderer(copied)

    return make


def oracle(renderer, turns, tools=None):
    return renderer.tokenizer.apply_chat_template(turns, tools=tools, tokenize=False, add_generation_prompt=True)


WITH_OBJECTS = [
    "gemma4_v5",
    "glm4moe",
    "llama3_1",
    "qwen2_5",
    "qwen3",
    "qwen3_5_nothink",
    "qwen3_instruct_2507",
    "qwen3_vl",
    "nemotron_3_nano",
]


@pytest.mark.parametrize("content", ["Let me look.", ""], ids=["text beside", "no text"])
@pytest.mark.parametrize("name", WITH_OBJECTS)
def test_calls_tools_and_results_are_rendered_as_transformers_renders_them(renderer_of, name, content):
    renderer, turns = renderer_of(name), conversation(content=content)
    text = renderer.prompt_text(sample_of(turns, tools=[TOOL], response=""))
    assert text == oracle(renderer, turns, [TOOL])
    assert "get_weather" in text
    assert "Lund" in text


@pytest.mark.parametrize("name", WITH_OBJECTS)
def test_a_null_content_is_none_or_no_text_and_never_the_word_none(renderer_of, name):
    renderer = renderer_of(name)
    sample = sample_of(conversation(content=None), tools=[TOOL], response="")
    assert renderer.prompt_text(sample) == oracle(renderer, conversation(content=""), [TOOL])
    assert "None" not in renderer.prompt_text(sample)


@pytest.mark.parametrize("name", WITH_OBJECTS)
def test_arguments_as_json_text_are_rendered_as_the_object_that_they_are(renderer_of, name):
    renderer = renderer_of(name)
    text = json.dumps(ARGUMENTS)
    as_text = renderer.prompt_text(sample_of(conversation(arguments=text, content=""), response=""))
    assert as_text == oracle(renderer, conversation(content=""))


def test_arguments_as_text_that_a_template_writes_as_they_are_stay_as_they_are(renderer_of):
    renderer, turns = renderer_of("qwen3"), conversation(arguments='{"city":"Lund"}', content="")
    assert '"arguments": {"city":"Lund"}' in renderer.prompt_text(sample_of(turns, response=""))
    assert renderer.prompt_text(sample_of(turns, response="")) == oracle(renderer, turns)


def test_arguments_as_objects_become_text_where_the_template_reads_text(renderer_of):
    renderer = renderer_of(DEEPSEEK)
    for arguments in (ARGUMENTS, json.dumps(ARGUMENTS)):
        for content in (None, ""):
            text = renderer.prompt_text(sample_of(conversation(arguments=arguments, content=content)))
            assert '<｜call｜>get_weather\n{"city": "Lund", "at": "12:00", "all": true}<｜end｜>' in text


def test_arguments_that_are_not_json_name_them(renderer_of):
    sample = sample_of(conversation(arguments="{city: Lund", content=""))
    with pytest.raises(DataError, match=r"the arguments of a tool call are not JSON .*'\{city: Lund'"):
        renderer_of("qwen2_5").prompt_text(sample)
    assert "{city: Lund" in renderer_of("qwen3").prompt_text(sample)


def test_calls_without_the_outer_object_get_it(renderer_of):
    flat = [{"name": "get_weather", "arguments": ARGUMENTS}]
    turns = conversation(content="")
    turns[1]["tool_calls"] = flat
    for name in ("llama3_1", "qwen3"):
        renderer = renderer_of(name)
        assert renderer.prompt_text(sample_of(turns, response="")) == oracle(renderer, conversation(content=""))


def test_a_list_of_no_calls_is_an_answer(renderer_of):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "tool_calls": []}]
    turns += [{"role": "user", "content": "c"}]
    for name in ("llama3_1", "qwen3"):
        renderer = renderer_of(name)
        without = [{key: turn[key] for key in ("role", "content")} for turn in turns]
        assert renderer.prompt_text(sample_of(turns, response="")) == oracle(renderer, without)


# --- ids ------------------------------


def test_ids_that_a_template_takes_are_kept(renderer_of):
    text = renderer_of(MISTRAL_SMALL).prompt_text(sample_of(conversation(content="")))
    assert '"id": "call00001"}]' in text
    assert "[TOOL_RESULTS]call00001[TOOL_CONTENT]" in text


def test_ids_become_nine_letters_where_a_template_insists_and_call_and_result_keep_the_same(renderer_of):
    renderer = renderer_of(MISTRAL_SMALL)
    for call_id in ("call_8f3kZ0aPq2XwLm", "1", None):
        turns = conversation(content="", call_id=call_id)
        text = renderer.prompt_text(sample_of(turns))
        written = text.split('"id": "')[1].split('"')[0]
        assert written.isalnum()
        assert len(written) == 9
        assert f"[TOOL_RESULTS]{written}[TOOL_CONTENT]" in text
        assert text == renderer.prompt_text(sample_of(turns))


def test_results_without_an_id_take_those_of_the_calls_in_order(renderer_of):
    turns = conversation(content="")
    turns[1]["tool_calls"] = [call(call_id="first"), call({"city": "Malmö"}, call_id="second")]
    turns[2:] = [{"role": "tool", "content": "7"}, {"role": "tool", "content": "8"}]
    text = renderer_of(MISTRAL_SMALL).prompt_text(sample_of(turns))
    first, second = (part.split('"')[0] for part in text.split('"id": "')[1:])
    assert first != second
    assert f"[TOOL_RESULTS]{first}[TOOL_CONTENT]7[/TOOL_RESULTS][TOOL_RESULTS]{second}[TOOL_CONTENT]8" in text


# --- roles, thoughts, parts ------------------------------


def test_the_developer_is_the_system_where_the_template_does_not_know_the_role(renderer_of):
    def turns(role):
        return [{"role": role, "content": "Be short."}, {"role": "user", "content": "2 + 2?"}]

    for name in ("qwen2_5", "llama3_1"):
        renderer = renderer_of(name)
        assert renderer.prompt_text(sample_of(turns("developer"))) == renderer.prompt_text(sample_of(turns("system")))
        assert not renderer.template.knows_developer()
    known = renderer_of("gptoss")
    assert known.template.knows_developer()
    assert "Be short." in known.prompt_text(sample_of(turns("developer")))


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning"])
def test_a_thought_under_any_of_its_names_reaches_the_template(renderer_of, key):
    turns = conversation(content="")
    turns[1][key] = "Ask the tool."
    expected = copy.deepcopy(turns)
    expected[1]["reasoning_content"] = expected[1].pop(key)
    renderer = renderer_of("qwen3")
    text = renderer.prompt_text(sample_of(turns, response=""))
    assert "<think>\nAsk the tool.\n</think>" in text
    assert text == oracle(renderer, expected)


def test_contents_are_parts_where_the_template_shows_nothing_else(renderer_of):
    renderer = renderer_of("smolvlm")
    turns = [{"role": "user", "content": "Hello"}]
    parts = [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]
    assert renderer.prompt_text(sample_of(turns)) == oracle(renderer, parts)
    assert "Hello" in renderer.prompt_text(sample_of(turns))


def test_the_messages_given_are_not_changed(renderer_of):
    turns = conversation(arguments=json.dumps(ARGUMENTS), content=None, call_id="long-enough-to-be-changed")
    before = copy.deepcopy(turns)
    for text in ("qwen2_5", MISTRAL_SMALL, DEEPSEEK):
        renderer_of(text).template.render(turns, open_turn=True)
    assert turns == before
