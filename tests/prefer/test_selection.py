"""Which responses become rows."""

from collections import Counter

import pytest

from rayfuse.config import Prefer
from rayfuse.data.prompts import Prompt
from rayfuse.data.rows import compared_of_row, samples_of_row
from rayfuse.data.sample import Sample, canonical
from rayfuse.prefer.selection import Response, rows_of_prompt

PROMPT = Prompt(Sample((("user", "2 + 2?"),), "", "sums"), "4")


def response(text, model="math", index=0, score=0.0, fault=""):
    return Response(text, model, f"print-of-{model}", index, score, fault)


RESPONSES = [
    response("5", "math", 0, 0.2),
    response("4", "math", 1, 0.9),
    response("four", "code", 0, 0.7),
    response("4!", "pivot", 0, 0.8),
    response("fish", "pivot", 1, -0.5),
    response("", "code", 1, fault="empty"),
]


def prefer(**changes):
    return Prefer.model_validate({"judge": {"method": "reward_model", "model": "r"}, "output": "a.jsonl", **changes})


def test_best_and_worst_with_their_provenance():
    ((row,), reason) = rows_of_prompt(prefer(seed=3), PROMPT, RESPONSES)
    assert reason == ""
    assert (row["prompt"], row["chosen"], row["rejected"], row["skill"]) == ("2 + 2?", "4", "fish", "sums")
    assert row["provenance"] == {
        "prompt": PROMPT.sample.key,
        "seed": 3,
        "chosen": {"model": "math", "sample": 1, "score": 0.9, "fingerprint": "print-of-math"},
        "rejected": {"model": "pivot", "sample": 1, "score": -0.5, "fingerprint": "print-of-pivot"},
    }
    assert [sample.response for sample in compared_of_row(row)] == ["4", "fish"]


def test_triples_take_the_best_of_both_sides():
    ((row,), _) = rows_of_prompt(prefer(write="triples"), PROMPT, RESPONSES)
    assert [row[side] for side in ("chosen", "chosen_pivot", "rejected")] == ["4", "4!", "fish"]
    sides = ("chosen", "chosen_pivot", "rejected")
    assert [sample.response for sample in compared_of_row(row, sides)] == ["4", "4!", "fish"]
    # The pivot's own best is the worst of all: there is nothing to prefer it to.
    worse = [r for r in RESPONSES if r.text != "4!"]
    assert rows_of_prompt(prefer(write="triples"), PROMPT, worse) == ([], "tied")
    teachers = [r for r in RESPONSES if r.model != "pivot"]
    assert rows_of_prompt(prefer(write="triples"), PROMPT, teachers) == ([], "below min_score")


def test_training_responses_come_from_teachers():
    better_pivot = [*RESPONSES, response("best", "pivot", 2, 2.0)]
    ((row,), _) = rows_of_prompt(prefer(write="responses"), PROMPT, better_pivot)
    assert row["response"] == "4"
    assert samples_of_row(row)[0] == Sample(PROMPT.sample.messages, "4", "sums")


def test_without_a_judge_every_different_response_is_a_row():
    twice = [*RESPONSES[:3], response("4", "code", 2)]
    rows, _ = rows_of_prompt(prefer(write="responses", judge=None), PROMPT, twice)
    assert [row["response"] for row in rows] == ["5", "4", "four"]
    assert "score" not in rows[0]["provenance"]["response"]


@pytest.mark.parametrize(
    ("responses", "changes", "reason"),
    [
        ([], {}, "no response"),
        ([RESPONSES[-1]], {}, "no response"),
        ([response("a"), response("b", index=1)], {}, "tied"),
        ([response("a"), response("a", index=1)], {}, "tied"),
        (RESPONSES, {"min_gap": 1.4}, "tied"),
        (RESPONSES, {"min_score": 0.95}, "below min_score"),
        ([response("a", score=0.0), response("b", score=0.0)], {"judge": "exact"}, "below min_score"),
        ([response("a", score=1.0), response("b", score=1.0)], {"judge": "exact"}, "tied"),
    ],
)
def test_what_gives_no_row(responses, changes, reason):
    assert rows_of_prompt(prefer(**changes), PROMPT, responses) == ([], reason)


def test_a_gap_is_just_wide_enough():
    assert rows_of_prompt(prefer(min_gap=1.39), PROMPT, RESPONSES)[0]


def test_among_equals_a_lot_decides_that_only_seed_and_content_change():
    def winner(key, seed, order):
        prompt = Prompt(Sample((("user", key),), ""))
        right = [response(f"right {model}", model, 0, 1.0) for model in ("math", "code", "pivot")]
        ((row,), _) = rows_of_prompt(prefer(judge="exact", seed=seed), prompt, [*right, response("no")][::order])
        return row["provenance"]["chosen"]["model"]

    winners = [winner(str(n), 0, 1) for n in range(300)]
    assert winners == [winner(str(n), 0, -1) for n in range(300)]
    assert winners != [winner(str(n), 1, 1) for n in range(300)]
    assert all(70 < count < 130 for count in Counter(winners).values())


def test_a_longer_conversation_stays_messages():
    prompt = Prompt(Sample((("system", "Be short."), ("user", "2 + 2?")), ""))
    ((row,), _) = rows_of_prompt(prefer(), prompt, RESPONSES)
    assert row["prompt"][0] == {"role": "system", "content": "Be short."}
    assert compared_of_row(row)[0].messages == prompt.sample.messages


def test_the_tools_of_a_prompt_are_written_with_its_answers():
    tools = [{"type": "function", "function": {"name": "add"}}]
    prompt = Prompt(Sample((("user", "2 + 2?"),), "", tools=canonical(tools)))
    ((row,), _) = rows_of_prompt(prefer(), prompt, RESPONSES)
    assert row["tools"] == tools
    assert {sample.tools for sample in compared_of_row(row)} == {prompt.sample.tools}
