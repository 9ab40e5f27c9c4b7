"""Preference pairs and teacher-written responses, made of texts written by hand."""

import json

import pytest

from rayfuse.compare.design import Condition
from rayfuse.compare.rows import training_rows
from rayfuse.compare.texts import pairs_of, responses_of

SEED = 5


def _condition(wrong: float) -> Condition:
    return Condition(title="-", rows=20, wrong=wrong, learning_rate=1e-3)


@pytest.fixture
def texts(tmp_path):
    """Every third prompt is answered rightly by all, every third by none; else by the code teacher and one sample."""
    path = tmp_path / "texts.jsonl"
    lines = []
    answers = {row["prompt"]: row["response"] for row in training_rows(_condition(0.0), SEED)}
    for number, (prompt, answer) in enumerate(sorted(answers.items())):
        for place, (writer, logp) in enumerate([("math", -2.0), ("code", -0.1), ("instruct", -3.0), ("pivot", -0.01)]):
            is_right = number % 3 == 0 or (number % 3 == 2 and writer in ("code", "pivot"))
            response = answer if is_right else f"{answer} {place}"
            lines.append({"prompt": prompt, "writer": writer, "response": response, "logp": logp})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_pairs_hold_a_right_and_a_wrong_answer(texts):
    answers = {row["prompt"]: row["response"] for row in training_rows(_condition(0.0), SEED, "second")}
    every = sorted(row["prompt"] for row in training_rows(_condition(0.0), SEED))
    pairs = pairs_of(texts, _condition(0.0), SEED)
    mixed = {p for number, p in enumerate(sorted(set(every))) if number % 3 == 2}
    assert {pair["prompt"] for pair in pairs} == mixed & set(answers)
    for pair in pairs:
        assert pair["chosen"] == answers[pair["prompt"]] != pair["rejected"]
        assert pair["chosen_pivot"] == answers[pair["prompt"]]  # the pivot is right where the code teacher is


def test_wrong_share_of_the_pairs_is_the_wrong_way_round(texts):
    answers = {row["prompt"]: row["response"] for row in training_rows(_condition(0.0), SEED, "second")}
    pairs = pairs_of(texts, _condition(0.3), SEED)
    exchanged = [pair for pair in pairs if pair["rejected"] == answers[pair["prompt"]]]
    assert len(exchanged) == round(0.3 * len(pairs)) > 0
    assert all(pair["chosen_pivot"] != pair["rejected"] for pair in pairs)
    straight = pairs_of(texts, _condition(0.0), SEED)
    assert [{pair["chosen"], pair["rejected"]} for pair in pairs] == [{p["chosen"], p["rejected"]} for p in straight]


def test_teachers_write_the_responses(texts):
    rows = training_rows(_condition(0.3), SEED)
    surest = responses_of(texts, _condition(0.3), SEED, "all", surest=True)
    drawn = responses_of(texts, _condition(0.3), SEED, "all", surest=False)
    assert [row["prompt"] for row in surest] == [row["prompt"] for row in drawn] == [row["prompt"] for row in rows]
    written = [json.loads(line) for line in texts.read_text().splitlines()]
    by_writer = {(row["prompt"], row["writer"]): row["response"] for row in written}
    assert all(row["response"] == by_writer[row["prompt"], "code"] for row in surest)  # never the pivot's
    ends = {row["response"][-2:] for row in drawn}
    assert {" 0", " 2"} <= ends  # wrong answers of teachers are learned from as they are
    assert " 3" not in ends
