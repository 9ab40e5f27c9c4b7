"""Training rows and held-out items of a comparison."""

from rayfuse.compare.design import Condition, Plan
from rayfuse.compare.rows import heldout_items, training_rows
from rayfuse.quickstart.skills import make, write_rows
from rayfuse.quickstart.world import EXPERTS, World


def _condition(rows: int, wrong: float = 0.0) -> Condition:
    return Condition(title="-", rows=rows, wrong=wrong, learning_rate=1e-3)


def _prompts(rows: list[dict]) -> list[str]:
    return [row["prompt"] for row in rows]


def test_conditions_of_a_seed_share_their_prompts():
    clean, wrong, few = (training_rows(c, 3) for c in (_condition(50), _condition(50, 0.3), _condition(10)))
    assert _prompts(clean) == _prompts(wrong)
    assert all(row["correct"] for row in clean)
    for skill in EXPERTS:
        assert sum(not row["correct"] for row in wrong if row["skill"] == skill) == 15
    assert set(_prompts(few)) <= set(_prompts(clean))
    assert set(_prompts(training_rows(_condition(50), 4))) != set(_prompts(clean))


def test_halves_share_out_the_rows():
    condition = _condition(9, 0.3)
    halves = [training_rows(condition, 1, half) for half in ("first", "second")]
    key = lambda row: (row["skill"], row["prompt"], row["response"])  # noqa: E731
    assert sorted(map(key, [*halves[0], *halves[1]])) == sorted(map(key, training_rows(condition, 1)))
    few = training_rows(_condition(4, 0.0), 1, "second")
    assert set(_prompts(few)) <= set(_prompts(halves[1]))


def test_tuning_sees_no_test_item(tmp_path):
    sizes = {"steps": 1, "batch_size": 1, "unit_size": 1, "test": 20, "validation": 20}
    plan = Plan.model_validate(
        {
            "sizes": sizes,
            "seeds": [1],
            "tuning_seed": 0,
            "tuning_condition": "clean",
            "conditions": {"clean": _condition(5)},
            "cost_condition": "clean",
            "methods": {"sft": {"stages": [{"method": "sft"}]}},
        }
    )
    world = World(tmp_path)
    write_rows([row for skill in EXPERTS for row in make(skill, 30, 1000, split="heldout")], world.evaluation)
    test, validation = (heldout_items(plan, world, split) for split in ("test", "validation"))
    assert len(test) == len(validation) == 60
    assert not {item.messages for item in test} & {item.messages for item in validation}
    assert [item.skill for item in test] == [skill for skill in EXPERTS for _ in range(20)]
