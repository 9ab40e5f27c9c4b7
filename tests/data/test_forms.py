"""Forms: a conversation gives the same samples however it is written, and what is not read is refused or said."""

import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayfuse.data.forms import CONVERSATIONS, PAIRS
from rayfuse.data.rows import parse_samples, samples_of_row
from rayfuse.data.sample import Message, Sample
from rayfuse.data.turns import MARK_KEYS, THOUGHT_KEYS
from rayfuse.errors import DataError

USER = {"role": "user", "content": "2 + 2?"}
ANSWER = {"role": "assistant", "content": "4"}
EXPECTED = [Sample((("user", "2 + 2?"),), "4")]
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Lund", "at": 1}}}
RESULT = {"role": "tool", "tool_call_id": "c1", "name": "weather", "content": "7"}


def plain(sample):
    return [(m.role, m.content) for m in sample.messages], sample.response


def refused(row, message, columns=None):
    with pytest.raises(DataError, match=message):
        samples_of_row(row, columns)


# --- one conversation, many spellings ------------------------------

texts = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=6).filter(str.strip)
rounds = st.lists(st.tuples(texts, texts), min_size=1, max_size=4)


def as_messages(pairs, system):
    turns = [{"role": r, "content": t} for pair in pairs for r, t in zip(("user", "assistant"), pair, strict=True)]
    return ([{"role": "system", "content": system}] if system else []) + turns


def sharegpt(messages, names):
    return [{"from": names.get(m["role"], m["role"]), "value": m["content"]} for m in messages]


def spellings(pairs, system):
    """The conversation in every form that can say it."""
    whole, turns = as_messages(pairs, system), as_messages(pairs, "")
    beside = {"system": system} if system else {}
    for column in CONVERSATIONS:
        yield {column: whole}
        yield {column: turns, **beside}
        yield {column: json.dumps(whole)}
        yield {column: sharegpt(whole, {"user": "human", "assistant": "gpt"})}
    yield {"messages": [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in whole]}
    *earlier, (question, answer) = pairs
    history = {"history": [list(pair) for pair in earlier]} if earlier else {}
    for prompt, responses in PAIRS.items():
        for response in responses:
            yield {prompt: question, response: answer, **history, **beside}
            yield {prompt: question, response: [{"role": "assistant", "content": answer}], **history, **beside}
            yield {prompt: question, response: answer, "system_prompt": system, **history, "id": 3}
    yield {
        "instruction": question,
        "input": "",
        "output": answer,
        "history": json.dumps([*map(list, earlier)]),
        **beside,
    }


@settings(max_examples=20)
@given(rounds, st.sampled_from(["", "Be short."]))
def test_a_conversation_in_any_form_gives_the_same_samples(pairs, system):
    expected = samples_of_row({"messages": as_messages(pairs, system)})
    assert [sample.response for sample in expected] == [answer for _, answer in pairs]
    for row in spellings(pairs, system):
        found = samples_of_row(row)
        assert found == expected, row
        assert [s.key for s in found] == [s.key for s in expected]


@given(rounds, st.sampled_from(["", "Be short."]), st.booleans())
def test_the_keys_of_a_conversation_are_those_of_its_samples_alone(pairs, system, with_tools):
    """The hash that runs along a conversation is the hash of every sample by itself."""
    row = {"messages": as_messages(pairs, system)} | ({"tools": [TOOL]} if with_tools else {})
    for sample in samples_of_row(row):
        assert sample.key == Sample(sample.messages, sample.response, sample.skill, sample.tools).key


def test_the_parts_of_an_instruction_are_one_message():
    for about in ("input", "context"):
        row = {"instruction": "Add.", about: "2 and 3", "output": "5"}
        assert samples_of_row(row) == [Sample((("user", "Add.\n2 and 3"),), "5")]
    row = {"question": "How old?", "context": "Ann is 5.", "answer": "5"}
    assert samples_of_row(row) == [Sample((("user", "How old?\nAnn is 5."),), "5")]


def test_only_the_response_is_learned_where_the_prompt_is_a_conversation():
    chat = as_messages([("a", "b")], "")
    for response in ("response", "completion"):
        for answer in ("4", ANSWER, [ANSWER]):
            (sample,) = samples_of_row({"prompt": [*chat, USER], response: answer})
            assert plain(sample) == ([("user", "a"), ("assistant", "b"), ("user", "2 + 2?")], "4")


@pytest.mark.parametrize(
    ("other", "role"),
    [("human", "user"), ("prompter", "user"), ("observation", "tool"), ("function", "tool"), ("ipython", "tool")]
    + [(role, role) for role in ("system", "developer", "user", "tool")],
)
def test_roles_by_their_other_names(other, role):
    for message in ({"role": other, "content": "a"}, {"from": other, "value": "a"}):
        (sample,) = samples_of_row({"messages": [message, ANSWER]})
        assert sample.messages == (Message(role, "a"),)
    for other in ("gpt", "model", "chatgpt"):
        assert samples_of_row({"messages": [USER, {"from": other, "value": "4"}]}) == EXPECTED


# --- exactly one form ------------------------------


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"messages": [USER, ANSWER], "prompt": "a", "response": "b"},
            "2 forms at once: messages and prompt . response",
        ),
        ({"messages": [USER, ANSWER], "conversations": [USER, ANSWER]}, "2 forms at once: messages and conversations"),
        (
            {"prompt": "a", "response": "b", "completion": "c"},
            "prompt . response and prompt . completion; .* columns: ",
        ),
        ({"question": "a", "answer": "b", "prompt": "c", "response": "d"}, "3 forms at once"),
        ({"text": "a b"}, "a row needs .* A plain text does not say which part a model wrote"),
        ({"chosen": "a", "rejected": "b", "prompt": "c"}, "This is a row of `preferences`"),
        ({"ask": "a", "say": "b"}, r"it has \['ask', 'say'\]. Forms that are read: .* columns: \{prompt: "),
        ({"prompt": "a", "answer": "b"}, "a row needs"),
        ({"input_ids": [1, 2]}, "'input_ids' holds token ids of one tokenizer"),
        ({"prompt": "a", "response": "b", "images": ["x.png"]}, "the column 'images' holds images"),
        ({"messages": [USER, ANSWER], "chat_template_kwargs": {"a": 1}}, "'chat_template_kwargs' holds arguments"),
        ({"prompt": "a", "completion": "b", "label": False}, "'label' marks the response as good or bad .KTO."),
        ({"prompt": "a", "response": "b", "system": 4}, "'system' must be text, not int"),
        ({"prompt": "a", "response": "b", "system": "c", "system_prompt": "d"}, "both hold the system message"),
        ({"messages": as_messages([("a", "b")], "x"), "system": "y"}, "'system' says 'y' and the conversation begins"),
        ({"prompt": "a", "response": "b", "history": [["c"]]}, r"history\[0\] must be \[question, answer\]"),
        ({"prompt": "a", "response": "b", "history": "c"}, "'history' must be JSON, not 'c'"),
        ({"prompt": "a", "response": "b", "weight": 0.5}, "must be 1 or true .learned., 0 or false .context., not 0.5"),
        ({"prompt": "a", "response": [USER]}, "'response' must end with an assistant turn, not user"),
        ({"prompt": "a", "response": []}, "'response' must be a non-empty list of messages"),
    ],
)
def test_rows_without_exactly_one_form_and_columns_that_are_not_read_are_refused(row, message):
    refused(row, message)


def test_columns_map_other_names_and_choose_among_several():
    row = {"q": "2 + 2?", "a": "4", "prompt": "x", "completion": "y", "messages": [USER]}
    assert samples_of_row(row, {"prompt": "q", "response": "a"}) == EXPECTED
    assert samples_of_row({"log": [USER, ANSWER], "prompt": "x", "response": "y"}, {"messages": "log"}) == EXPECTED
    assert samples_of_row({"prompt": "2 + 2?", "a": "4"}, {"response": "a"}) == EXPECTED
    named = samples_of_row({"prompt": "2 + 2?", "response": "4", "kind": "sums"}, {"skill": "kind"})
    assert named == [Sample(EXPECTED[0].messages, "4", "sums")]
    swapped = samples_of_row({"prompt": "4", "response": "2 + 2?"}, {"prompt": "response", "response": "prompt"})
    assert swapped == EXPECTED
    refused({"q": "a"}, r"columns.response is 'a', which the row does not have; it has \['q'\]", {"response": "a"})


def test_columns_and_keys_that_say_nothing_are_counted_as_not_read():
    parsed = parse_samples(
        {"messages": [{**USER, "id": 3, "model": None}, {**ANSWER, "score": 0.5}], "source": "x", "note": ""}, {}
    )
    assert parsed.items == EXPECTED
    assert parsed.unread == {"source", "id (of messages)", "score (of messages)"}
    assert parsed.form == "messages (role, content) in 'messages'"


# --- what a message holds ------------------------------


def fields(message):
    return json.loads(message.fields) if message.fields else {}


CALLING = [
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "assistant", "tool_calls": [CALL]},
    {"role": "assistant", "content": "Let me look.", "tool_calls": [CALL]},
    {"role": "assistant", "tool_calls": json.dumps([CALL])},
    {"role": "assistant", "tool_calls": [{"id": "c1", **CALL["function"]}]},
    {
        "role": "assistant",
        "tool_calls": [{"id": "c1", "function": {"name": "weather", "arguments": '{"city": "Lund", "at": 1}'}}],
    },
]


@pytest.mark.parametrize("calling", CALLING)
@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL]), [TOOL["function"]], [json.dumps(TOOL)]])
def test_tools_calls_and_results_are_kept_and_a_calling_turn_is_context(calling, tools):
    parsed = parse_samples({"messages": [USER, calling, RESULT, ANSWER], "tools": tools}, {})
    (sample,) = parsed.items
    assert sample.response == "4"
    assert json.loads(sample.tools) == [TOOL]
    _, call, result = sample.messages
    assert call.content == calling.get("content")
    assert fields(call) == {"tool_calls": [CALL]}
    assert list(fields(call)["tool_calls"][0]["function"]["arguments"]) == ["city", "at"], "in the order given"
    assert result == Message("tool", "7", '{"tool_call_id":"c1","name":"weather"}')
    assert (parsed.calling_turns, parsed.context_turns) == (1, 0)


@pytest.mark.parametrize(
    "messages",
    [
        [
            {"from": "function_call", "value": json.dumps(CALL["function"])},
            {"from": "observation", "value": "7"},
        ],
        [
            {"role": "assistant", "content": None, "function_call": CALL["function"]},
            {"role": "function", "name": "weather", "content": "7"},
        ],
    ],
)
def test_calls_of_old_forms(messages):
    (sample,) = samples_of_row({"messages": [USER, *messages, ANSWER]})
    _, call, result = sample.messages
    assert call.role == "assistant"
    assert call.content is None
    assert fields(call) == {"tool_calls": [{key: CALL[key] for key in ("type", "function")}]}
    assert (result.role, result.content) == ("tool", "7")


@pytest.mark.parametrize("key", THOUGHT_KEYS)
def test_a_thought_is_kept_in_an_earlier_turn_and_leads_the_response_of_a_learned_one(key):
    thinking = {**ANSWER, key: "2 and 2"}
    first, second = samples_of_row({"messages": [USER, thinking, USER, ANSWER]})
    assert first.response == "<think>\n2 and 2\n</think>\n\n4"
    assert fields(second.messages[1]) == {"reasoning_content": "2 and 2"}
    assert second.messages[1].content == "4"
    parts = {
        "role": "assistant",
        "content": [{"type": "thinking", "thinking": "2 and 2"}, {"type": "text", "text": "4"}],
    }
    assert samples_of_row({"messages": [USER, parts]}) == [first]


def test_text_parts_are_joined():
    parts = [{"type": "text", "text": "2 +"}, " 2", {"type": "text", "text": "?", "cache_control": {"type": "x"}}]
    assert samples_of_row({"messages": [{"role": "user", "content": parts}, ANSWER]}) == EXPECTED


@pytest.mark.parametrize("key", MARK_KEYS)
@pytest.mark.parametrize("no", [0, False, 0.0])
def test_a_turn_marked_as_context_is_not_learned_and_is_counted(key, no):
    wrong = {"role": "assistant", "content": "WRONG", key: no}
    right = {**ANSWER, key: type(no)(1)}
    parsed = parse_samples({"messages": [{**USER, key: no}, wrong, USER, right]}, {})
    assert [plain(sample) for sample in parsed.items] == [
        ([("user", "2 + 2?"), ("assistant", "WRONG"), ("user", "2 + 2?")], "4")
    ]
    assert parsed.context_turns == 1
    for value in (2, -1, 0.5, "0", "false", [0]):
        refused({"messages": [USER, {**ANSWER, key: value}]}, r"messages\[1\]: the mark .* must be 1 or true")


def test_a_row_of_weight_0_is_read_and_not_learned():
    parsed = parse_samples({"prompt": "a", "response": "b", "weight": 0}, {})
    assert (list(parsed.items), parsed.context_turns) == ([], 1)
    assert len(samples_of_row({"prompt": "a", "response": "b", "weight": 1.0})) == 1


def test_null_and_empty_keys_say_nothing():
    message = {**ANSWER, "tool_calls": None, "refusal": None, "audio": None, "function_call": None, "annotations": []}
    assert samples_of_row({"messages": [USER, {**message, "tool_calls": [], "name": ""}]}) == EXPECTED


PARTS = [
    {"type": kind, kind: {"url": "x"}} for kind in ("image", "image_url", "audio", "input_audio", "video", "file")
] + [{"type": "tool_use", "name": "a", "input": {}}, {"type": "text", "text": "a", "image": "b"}]


@pytest.mark.parametrize("part", PARTS)
def test_parts_that_are_not_text_are_refused_by_name(part):
    content = [{"type": "text", "text": "a"}, part]
    message = rf"messages\[0\]: part 1 of the content is of type '{part['type']}' .* text only: take such parts out"
    refused({"messages": [{"role": "user", "content": content}, ANSWER]}, message)


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ({**ANSWER, "refusal": "no"}, r"messages\[1\] has the key 'refusal', which is not read"),
        ({**ANSWER, "prefix": True}, "has the key 'prefix', which is not read"),
        ({**ANSWER, "weight": 0, "train": True}, "'weight' and 'train' say different things"),
        ({**ANSWER, "thinking": "a", "reasoning": "b"}, "'reasoning' and 'thinking' say different things"),
        ({**ANSWER, "content": "<think>a</think>4", "thinking": "a"}, "has its thought twice"),
        ({**ANSWER, "value": "5"}, "'content' and 'value' say different things"),
        ({"role": "assistant", "content": None}, r"messages\[1\]: content must be text, not NoneType"),
        ({"role": "assistant", "content": {"a": 1}}, "content must be text, not dict"),
        ({"role": "assistant", "tool_calls": [{"function": {}}]}, "tool call 0: the function's name must be text"),
        ({"role": "assistant", "tool_calls": [{"name": "a", "arguments": "b"}]}, "its arguments must be JSON, not 'b'"),
        (
            {"role": "assistant", "tool_calls": [{"name": "a", "arguments": "[1]"}]},
            r"arguments must be an object .* \[1\]",
        ),
        (
            {"role": "assistant", "tool_calls": [{"type": "custom", "name": "a"}]},
            "only calls of functions .* not custom",
        ),
        (
            {"role": "assistant", "tool_calls": [CALL], "function_call": {"name": "a"}},
            "has tool_calls and function_call",
        ),
        ({"from": "function_call", "value": "look it up"}, r"messages\[1\]: a call must be JSON"),
        ({**USER, "tool_calls": [CALL]}, "is a user turn with tool_calls"),
        ({**USER, "thinking": "a"}, "is a user turn with a thought"),
        ({**USER, "weight": 1}, "is a user turn marked to be learned"),
        ({**ANSWER, "name": "\ud800"}, "is not valid Unicode"),
    ],
)
def test_what_a_message_says_that_is_not_read_is_refused(message, text):
    refused({"messages": [USER, message, ANSWER]}, text)


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        ("weather", "'tools' must be JSON, not 'weather'"),
        ({"name": "a"}, "'tools' must be a list of tools"),
        (["weather"], r"tools\[0\] must be JSON"),
        ([{"type": "web_search"}], r"tools\[0\] must be a function with a name"),
        ([4], r"tools\[0\] must be an object"),
    ],
)
def test_malformed_tools_are_refused(tools, message):
    refused({"messages": [USER, ANSWER], "tools": tools}, message)


def test_many_turns_are_read_in_a_fraction_of_the_time_of_hashing_every_prompt():
    turns = as_messages([(f"{i} " + "x" * 80, "y" * 80) for i in range(2000)], "")
    begun = time.process_time()
    samples = samples_of_row({"messages": turns})
    spent = time.process_time() - begun
    assert len({sample.key for sample in samples}) == 2000
    begun = time.process_time()
    alone = [Sample(sample.messages, sample.response).key for sample in samples[::100]]
    each = 100 * (time.process_time() - begun)
    assert alone == [sample.key for sample in samples[::100]]
    assert spent < each / 2
