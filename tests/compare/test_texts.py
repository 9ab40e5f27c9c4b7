"""Responses and preference pairs, made of texts written by hand."""

import pytest

from rayfuse.compare.design import Condition, Method
from rayfuse.compare.texts import pairs_for, responses_for

ROWS = [
    {
        "prompt": f"Q{number}",
        "skill": ("towns", "codes", "pets")[number % 3],
        "truth": f"A{number}",
        "response": f"A{number}" if number % 5 else f"L{number}",
    }
    for number in range(90)
]
EXPERT = {"towns": -0.01, "codes": -0.02, "pets": -0.03}


@pytest.fixture
def texts():
    """Each field's teacher is right and sure, the others guess each for itself; a sample of the pivot is right, one
    not."""
    made = {}
    for number, row in enumerate(ROWS):
        own = row["skill"]
        made[row["prompt"]] = [
            {"writer": name, "response": row["truth"], "logp": logp}
            if name == own
            else {"writer": name, "response": f"{name}{number}", "logp": -3.0}
            for name, logp in EXPERT.items()
        ]
        made[row["prompt"]] += [
            {"writer": "pivot", "response": f"P{number}", "logp": -2.0},
            {"writer": "sample", "response": row["truth"], "logp": -2.0},
            {"writer": "sample", "response": f"S{number}", "logp": -2.0},
        ]
    return made


def _method(**changes):
    return Method.model_validate({"stages": [{"method": "sft"}], **changes})


def _responses(source, texts, rows=ROWS):
    made = responses_for(_method(learns_from=source), rows, ROWS, texts, 7)
    assert all(row.keys() == {"prompt", "response", "skill"} for row in made)
    return {row["prompt"]: row["response"] for row in made}


def test_responses_come_from_where_the_method_says(texts):
    truth = {row["prompt"]: row["truth"] for row in ROWS}
    assert _responses("labels", texts) == {row["prompt"]: row["response"] for row in ROWS}
    for source in ("truth", "surest teacher", "the field's teacher", "consensus"):
        assert _responses(source, texts) == truth, source
    unlabelled = [{key: value for key, value in row.items() if key != "response"} for row in ROWS]
    assert _responses("labels", texts, unlabelled) == {}
    assert _responses("surest teacher", texts, unlabelled) == truth


def test_what_most_say_is_the_labels_where_it_agrees_with_a_teacher(texts):
    said = _responses("majority", texts)
    for number, row in enumerate(ROWS):
        assert said[row["prompt"]] == row["truth"], number  # of equals the surest: the field's teacher


def test_a_teacher_is_drawn_by_the_seed(texts):
    drawn = _responses("a teacher", texts)
    assert drawn == _responses("a teacher", texts)
    writers = {next(t["writer"] for t in texts[p] if t["response"] == said) for p, said in drawn.items()}
    assert writers == set(EXPERT)


def test_pairs_of_the_verifier_hold_a_right_and_a_wrong_answer(texts):
    condition = Condition(title="-", world="-")
    pairs = pairs_for(_method(), condition, ROWS[1::2], ROWS, texts, 5)
    truth = {row["prompt"]: row["truth"] for row in ROWS[1::2]}
    assert {pair["prompt"] for pair in pairs} == set(truth)
    for pair in pairs:
        assert pair["chosen"] == pair["chosen_pivot"] == truth[pair["prompt"]] != pair["rejected"]
    flipped = pairs_for(_method(), condition.model_copy(update={"wrong": 0.3}), ROWS[1::2], ROWS, texts, 5)
    turned = [pair for pair in flipped if pair["rejected"] == truth[pair["prompt"]]]
    assert len(turned) == round(0.3 * len(flipped)) > 0
    assert all(pair["chosen_pivot"] == pair["chosen"] for pair in turned)


def test_pairs_of_the_consensus_need_no_truth(texts):
    blind = [{**row, "truth": ""} for row in ROWS]
    pairs = pairs_for(_method(pairs_from="consensus"), Condition(title="-", world="-"), blind, blind, texts, 5)
    truth = {row["prompt"]: row["truth"] for row in ROWS}
    assert len(pairs) == len(ROWS)
    assert all(pair["chosen"] == truth[pair["prompt"]] != pair["rejected"] for pair in pairs)
