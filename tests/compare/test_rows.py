"""Training rows and held-out items of a comparison."""

from rayfuse.compare.design import Plan
from rayfuse.compare.rows import heldout_items, training_rows
from rayfuse.quickstart.facts import FIELDS, facts, rows

PLAN = Plan.model_validate(
    {
        "worlds": {"one": {"title": "-", "tuned_in": "clean"}},
        "sizes": {"steps": 1, "batch_size": 1, "unit_size": 1, "learning_rate": 1e-3, "test": 120, "validation": 80},
        "seeds": [1],
        "tuning_seeds": [0],
        "conditions": {
            "clean": {"title": "-", "world": "one"},
            "wrong": {"title": "-", "world": "one", "wrong": 0.3},
            "few": {"title": "-", "world": "one", "per_field": 10},
            "none": {"title": "-", "world": "one", "per_field": 0},
        },
        "cost_condition": "clean",
        "methods": {"sft": {"stages": [{"method": "sft"}]}},
    }
)


def test_conditions_of_a_seed_share_their_prompts_and_their_order():
    of = {name: training_rows(PLAN, name, 3) for name in PLAN.conditions}
    prompts = [row["prompt"] for row in of["clean"]]
    assert all([row["prompt"] for row in made] == prompts for made in of.values())
    truth = {row["prompt"]: row["response"] for row in rows(facts(0), "train")}
    assert {row["prompt"]: row["truth"] for row in of["wrong"]} == truth
    assert all(row["response"] == row["truth"] for row in of["clean"])
    wrong = sum(row["response"] != row["truth"] for row in of["wrong"]) / len(prompts)
    assert abs(wrong - 0.3) < 0.04
    assert [sum("response" in row and row["skill"] == field for row in of["few"]) for field in FIELDS] == [10] * 3
    assert not any("response" in row for row in of["none"])


def test_another_seed_has_other_wrong_labels_in_another_order():
    one, other = (training_rows(PLAN, "wrong", seed) for seed in (1, 2))
    assert [row["prompt"] for row in one] != [row["prompt"] for row in other]
    assert {row["prompt"] for row in one} == {row["prompt"] for row in other}
    labels = [{row["prompt"]: row["response"] for row in made} for made in (one, other)]
    assert labels[0] != labels[1]


def test_halves_share_out_the_rows():
    first, second = (training_rows(PLAN, "wrong", 1, half) for half in ("first", "second"))
    every = training_rows(PLAN, "wrong", 1)
    assert len(first) + len(second) == len(every)
    assert sorted(row["prompt"] for row in (*first, *second)) == sorted(row["prompt"] for row in every)


def test_tuning_sees_no_fact_of_the_test_items():
    test, validation = (heldout_items(PLAN, "one", split) for split in ("test", "validation"))
    assert [len(test), len(validation)] == [360, 240]
    assert not {item.messages for item in test} & {item.messages for item in validation}
    assert [item.skill for item in test] == [field for field in FIELDS for _ in range(120)]
