"""Preferences: one prompt in many spellings, and histories that differ are named."""

import pytest

from rayfuse.data.pairs import compared
from rayfuse.data.rows import compared_of_row
from rayfuse.errors import DataError

SYSTEM = {"role": "system", "content": "Be short."}
USER = {"role": "user", "content": "2 + 2?"}
GOOD, BAD = {"role": "assistant", "content": "4"}, {"role": "assistant", "content": "5"}
EARLIER = [{"role": "user", "content": "Pick."}, {"role": "assistant", "content": "Seven."}]


def sharegpt(message):
    return {
        "from": {"user": "human", "assistant": "gpt"}.get(message["role"], message["role"]),
        "value": message["content"],
    }


def read(row, **options):
    pair = compared_of_row(row, **options)
    assert len({sample.messages for sample in pair}) == 1
    return [(m.role, m.content) for m in pair[0].messages], [sample.response for sample in pair]


ONE_TURN = {
    "texts": {"prompt": "2 + 2?", "chosen": "4", "rejected": "5"},
    "prompt as messages": {"prompt": [USER], "chosen": "4", "rejected": "5"},
    "responses as messages": {"prompt": "2 + 2?", "chosen": [GOOD], "rejected": [BAD]},
    "responses as single messages": {"prompt": [USER], "chosen": GOOD, "rejected": BAD},
    "implicit prompt": {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
    "implicit and explicit prompt": {"prompt": "2 + 2?", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
    "a text and messages": {"prompt": "2 + 2?", "chosen": "4", "rejected": [USER, BAD]},
    "question": {"question": "2 + 2?", "chosen": "4", "rejected": "5"},
    "instruction": {"instruction": "2 + 2?", "input": "", "chosen": "4", "rejected": "5"},
    "ShareGPT": {"conversations": [sharegpt(USER)], "chosen": sharegpt(GOOD), "rejected": sharegpt(BAD)},
    "UltraFeedback": {
        "prompt": "2 + 2?",
        "prompt_id": "1",
        "messages": [USER, GOOD],
        "chosen": [USER, GOOD],
        "rejected": [USER, BAD],
        "score_chosen": 9.0,
        "score_rejected": 1.0,
    },
}


@pytest.mark.parametrize("name", ONE_TURN)
def test_one_turn_in_every_spelling(name):
    assert read(ONE_TURN[name]) == ([("user", "2 + 2?")], ["4", "5"])


HISTORY = [*EARLIER, USER]
SEVERAL_TURNS = {
    "implicit prompt": {"chosen": [SYSTEM, *HISTORY, GOOD], "rejected": [SYSTEM, *HISTORY, BAD]},
    "whole prompt": {"prompt": [SYSTEM, *HISTORY], "chosen": [GOOD], "rejected": [BAD]},
    "prompt and sides": {"prompt": [SYSTEM, *HISTORY], "chosen": [SYSTEM, *HISTORY, GOOD], "rejected": "5"},
    "the first question": {"prompt": "Pick.", "chosen": [SYSTEM, *HISTORY, GOOD], "rejected": [SYSTEM, *HISTORY, BAD]},
    "system column": {"system": "Be short.", "chosen": [*HISTORY, GOOD], "rejected": [*HISTORY, BAD]},
    "system column and message": {"system": "Be short.", "prompt": [SYSTEM, *HISTORY], "chosen": "4", "rejected": "5"},
    "history column": {
        "system": "Be short.",
        "history": [["Pick.", "Seven."]],
        "prompt": "2 + 2?",
        "chosen": "4",
        "rejected": "5",
    },
    "ShareGPT": {
        "system": "Be short.",
        "conversations": [sharegpt(turn) for turn in HISTORY],
        "chosen": sharegpt(GOOD),
        "rejected": sharegpt(BAD),
    },
}


@pytest.mark.parametrize("name", SEVERAL_TURNS)
def test_several_turns_in_every_spelling(name):
    turns = [("system", "Be short."), ("user", "Pick."), ("assistant", "Seven."), ("user", "2 + 2?")]
    assert read(SEVERAL_TURNS[name]) == (turns, ["4", "5"])


def test_other_names_tools_and_what_is_not_read():
    row = {"q": "2 + 2?", "better": "4", "worse": "5", "tools": [{"name": "add"}], "margin": 3}
    found = compared(row, columns={"prompt": "q", "chosen": "better", "rejected": "worse"})
    assert [sample.response for sample in found.samples] == ["4", "5"]
    assert {sample.tools for sample in found.samples} == {'[{"type":"function","function":{"name":"add"}}]'}
    assert found.unread == {"margin"}
    assert found.form == "'prompt', 'chosen' and 'rejected'"


def test_triples_share_their_history():
    row = {
        "chosen": [*HISTORY, GOOD],
        "chosen_pivot": [*HISTORY, {**GOOD, "content": "four"}],
        "rejected": [*HISTORY, BAD],
    }
    turns, responses = read(row, sides=("chosen", "chosen_pivot", "rejected"))
    assert (len(turns), responses) == (3, ["4", "four", "5"])


OTHER = {"role": "user", "content": "3 + 3?"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"prompt": "Pick one.", "chosen": [*HISTORY, GOOD], "rejected": [*HISTORY, BAD]},
            "turn 0 of 'chosen' is not what the prompt says: user 'Pick.', and the prompt user 'Pick one.'",
        ),
        (
            {"prompt": "2 + 2?", "chosen": [USER, GOOD], "rejected": [OTHER, BAD]},
            "turn 0 of 'rejected' is not what the prompt says: user '3",
        ),
        (
            {"prompt": [SYSTEM, USER], "chosen": [USER, GOOD], "rejected": [USER, BAD]},
            "turn 0 of 'chosen' is not what the prompt says: user '2 . 2.', and the prompt system 'Be short.'",
        ),
        ({"prompt": [*HISTORY], "chosen": [USER, GOOD], "rejected": "5"}, "turn 0 of 'chosen' is not what"),
        (
            {"chosen": [*EARLIER, USER, GOOD], "rejected": [*EARLIER, OTHER, BAD]},
            "'chosen' and 'rejected' differ at turn 2, and only their last turns may: user '2 . 2.', and user '3 . 3.'",
        ),
        (
            {"chosen": [*HISTORY, GOOD], "rejected": [EARLIER[0], {**BAD, "content": "Eight."}, USER, BAD]},
            "differ at turn 1, and only their last turns may: assistant 'Seven.', and assistant 'Eight.'",
        ),
        (
            {"chosen": [SYSTEM, USER, GOOD], "rejected": [{**SYSTEM, "content": "Be long."}, USER, BAD]},
            "differ at turn 0, .*system 'Be short.', and system 'Be long.'",
        ),
        ({"chosen": [SYSTEM, USER, GOOD], "rejected": [USER, BAD]}, "differ at turn 0"),
        (
            {"chosen": [*HISTORY, GOOD], "rejected": [EARLIER[0], BAD]},
            "differ at turn 1, .* no such turn before the last",
        ),
        ({"chosen": "4", "rejected": "5"}, "'chosen' is a response alone, and the row has no prompt"),
        ({"chosen": [GOOD], "rejected": [BAD]}, "'chosen' is a response alone, and the row has no prompt"),
        ({"chosen": [USER, GOOD], "rejected": [USER, GOOD]}, "'chosen' and 'rejected' are the same: '4'"),
        ({"chosen": [USER, GOOD], "rejected": [USER]}, "'rejected' must end with an assistant turn, not user"),
        ({"prompt": "a", "question": "b", "chosen": "c", "rejected": "c"}, "are the same"),
        (
            {"question": "a", "query": "b", "chosen": "c", "rejected": "d"},
            "the row has several prompts: question, query",
        ),
        (
            {"prompt": "a", "chosen": {**GOOD, "weight": 0}, "rejected": "5"},
            "last turn of 'chosen' is marked as context",
        ),
        (
            {"prompt": "a", "chosen": [{"role": "assistant", "tool_calls": [{"name": "add"}]}], "rejected": "5"},
            "'chosen' ends in a turn that calls tools",
        ),
    ],
)
def test_rows_that_compare_answers_to_different_questions_are_refused(row, message):
    with pytest.raises(DataError, match=message):
        compared_of_row(row)
