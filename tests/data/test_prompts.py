"""Prompts: what rows may look like, and what a judge needs of them."""

import json

import pytest

from rayfuse.config import Data
from rayfuse.data.prompts import prompts_of_row, read_prompts
from rayfuse.errors import DataError

USER = {"role": "user", "content": "2 + 2?"}
SYSTEM = {"role": "system", "content": "Be short."}
ANSWER = {"role": "assistant", "content": "4"}
MORE = {"role": "user", "content": "and 3?"}


def of(row, needs=""):
    return [([(m.role, m.content) for m in p.sample.messages], p.answer, p.tests) for p in prompts_of_row(row, needs)]


def test_rows_of_every_form():
    alone = [("user", "2 + 2?")]
    assert of({"prompt": "2 + 2?"}) == [(alone, "", ())]
    assert of({"prompt": [SYSTEM, USER]}) == [([("system", "Be short."), *alone], "", ())]
    assert of({"messages": [USER]}) == [(alone, "", ())]
    assert of({"prompt": "2 + 2?", "response": "4"}) == [(alone, "4", ())]
    assert of({"prompt": "2 + 2?", "response": "long", "answer": "4"}) == [(alone, "4", ())]
    assert of({"prompt": "2 + 2?", "tests": "assert f()"}, "tests") == [(alone, "", ("assert f()",))]
    assert of({"prompt": "2 + 2?", "tests": ["a", "b"]}) == [(alone, "", ("a", "b"))]
    # A conversation is a prompt for each of its assistant turns, as in training; one that ends with the user is one.
    assert of({"messages": [USER, ANSWER]}) == [(alone, "4", ())]
    assert of({"messages": [USER, ANSWER, MORE]}) == [([*alone, ("assistant", "4"), ("user", "and 3?")], "", ())]
    assert [p[1] for p in of({"messages": [USER, ANSWER, MORE, {**ANSWER, "content": "7"}]})] == ["4", "7"]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "2 + 2?", "answer": "4"},
        {"prompt": [USER], "ground_truth": "4"},
        {"prompt": [USER], "reward_model": {"style": "rule", "ground_truth": "4"}, "data_source": "sums"},
        {"prompt": [USER], "reward_model": '{"ground_truth": "4"}'},
        {"question": "2 + 2?", "answer": "4"},
        {"problem": "2 + 2?", "solution": "4"},
        {"problem": "2 + 2?", "solution": "2 and 2 are 4", "answer": "4"},
        {"instruction": "2 + 2?", "input": "", "output": "long", "answer": "4"},
        {"prompt": "2 + 2?", "completion": "4"},
        {"prompt": "2 + 2?", "response": "", "ground_truth": "4"},
        {"prompt": [USER], "response": [ANSWER]},
        {"conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]},
    ],
)
def test_prompts_with_their_answer_in_the_forms_of_reinforcement_learning_and_others(row):
    assert of(row, "answer") == [([("user", "2 + 2?")], "4", ())]


def test_prompts_by_other_names_with_tools_and_a_system_message():
    row = {"q": "2 + 2?", "gold": "4", "system": "Be short.", "tools": [{"name": "add"}]}
    (prompt,) = prompts_of_row(row, "answer", {"prompt": "q", "answer": "gold"})
    assert [(m.role, m.content) for m in prompt.sample.messages] == [("system", "Be short."), ("user", "2 + 2?")]
    assert prompt.answer == "4"
    assert json.loads(prompt.sample.tools) == [{"type": "function", "function": {"name": "add"}}]


def test_the_key_names_the_prompt_alone():
    (one,), (other,) = prompts_of_row({"prompt": "a", "answer": "1"}), prompts_of_row({"prompt": "a", "answer": "2"})
    assert one.sample.key == other.sample.key
    assert one.answered("x").key != one.sample.key


@pytest.mark.parametrize(
    ("row", "needs", "message"),
    [
        ([], "", "must be an object with keys, not list"),
        ({"question": "a", "problem": "b"}, "", "the row has several prompts: question, problem; say which"),
        ({"prompt": "a", "answer": "1", "ground_truth": "2"}, "", "'answer' and 'ground_truth' both hold the answer"),
        ({"text": "a"}, "", r"needs 'prompt' or 'messages'; it has \['text'\]"),
        ({"prompt": 5}, "", "'prompt' must be a non-empty list of messages, not 5"),
        ({"messages": [{"role": "user"}]}, "", r"messages\[0\]: content must be text"),
        ({"prompt": "a", "answer": 4}, "", "'answer' must be text, not int"),
        ({"prompt": "a", "skill": 4}, "", "'skill' must be text, not int"),
        ({"prompt": "a", "tests": 4}, "", "'tests' must be text or a list of texts, not int"),
        ({"prompt": "a", "tests": [4]}, "", "'tests' must be text, not int"),
        ({"prompt": "a"}, "answer", r"compares with a row's 'answer' or 'response'; it has \['prompt'\]"),
        ({"prompt": "a", "tests": []}, "tests", r"runs a row's 'tests'; it has \['prompt', 'tests'\]"),
    ],
)
def test_malformed_rows_are_refused(row, needs, message):
    with pytest.raises(DataError, match=message):
        prompts_of_row(row, needs)


def test_a_bad_row_is_named_by_its_line(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [{"prompt": "a", "answer": "b"}, {"prompt": "c"}]))
    with pytest.raises(DataError, match=r"p.jsonl:2: the judge compares"):
        read_prompts(Data(path=str(path)), "answer")
    prompts, counts = read_prompts(Data(path=str(path), on_bad_row="skip"), "answer")
    assert (len(prompts), counts.rows, counts.bad_rows) == (1, 2, 1)
