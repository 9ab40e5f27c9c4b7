from collections import Counter
from random import Random

import pytest

from rayfuse.errors import DataError
from rayfuse.quickstart import skills

SKILLS = sorted(skills.SKILLS)


@pytest.mark.parametrize("skill", SKILLS)
def test_the_seed_decides_every_row(skill: str) -> None:
    assert skills.make(skill, 50, seed=1) == skills.make(skill, 50, seed=1)
    assert skills.make(skill, 50, seed=1) != skills.make(skill, 50, seed=2)


@pytest.mark.parametrize("skill", SKILLS)
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_wrong_share_is_counted_exactly_and_changes_nothing_else(skill: str, share: float) -> None:
    clean, rows = skills.make(skill, 70, seed=3), skills.make(skill, 70, seed=3, wrong_share=share)
    assert [row["prompt"] for row in rows] == [row["prompt"] for row in clean]
    differs = [row["response"] != right["response"] for row, right in zip(rows, clean, strict=True)]
    assert sum(differs) == round(70 * share)
    assert differs == [not row["correct"] for row in rows]


@pytest.mark.parametrize("skill", SKILLS)
def test_no_heldout_prompt_is_ever_in_a_training_set(skill: str) -> None:
    heldout = {row["prompt"] for row in skills.make(skill, 2000, seed=5, split="heldout")}
    for seed in range(3):
        assert heldout.isdisjoint(row["prompt"] for row in skills.make(skill, 5000, seed))


@pytest.mark.parametrize("kind", [kind for kinds in skills.SKILLS.values() for kind in kinds], ids=lambda k: k.__name__)
def test_right_and_wrong_responses_differ_and_are_never_empty(kind) -> None:
    draw = Random(0)
    for _ in range(2000):
        task = kind(draw)
        assert task.right != task.wrong
        assert task.prompt
        assert task.right
        assert task.wrong


@pytest.mark.parametrize("skill", SKILLS)
def test_one_prompt_has_one_right_response(skill: str) -> None:
    responses: dict[str, str] = {}
    for row in skills.make(skill, 5000, seed=7):
        assert responses.setdefault(row["prompt"], row["response"]) == row["response"]


def test_code_tasks_are_what_python_gives() -> None:
    for row in skills.make("code", 500, seed=11):
        value = eval(row["prompt"], {"__builtins__": {}}, {"sorted": sorted, "list": list, "range": range})
        assert row["response"] == str(value)


def test_math_answers_by_hand() -> None:
    right = {row["prompt"]: row["response"] for seed in range(5) for row in skills.make("math", 500, seed)}
    for prompt, response in right.items():
        numbers = [int("".join(filter(str.isdigit, word))) for word in prompt.split() if any(map(str.isdigit, word))]
        if prompt.startswith("Largest"):
            assert int(response) == max(numbers)
        elif prompt.startswith("Above"):
            assert response == (", ".join(str(n) for n in numbers[1:] if n > numbers[0]) or "none")
        elif prompt.startswith("Sums"):
            assert int(response.split(", ")[-1]) == sum(numbers)
        else:
            assert int(response.split(", ")[-1]) == numbers[0] - sum(numbers[1:])


@pytest.mark.parametrize("skill", SKILLS)
def test_every_kind_has_its_part(skill: str) -> None:
    kinds = skills.SKILLS[skill]
    words = Counter(row["prompt"][:4] for row in skills.make(skill, 400, seed=13))
    assert len(words) >= len(kinds)


def test_unknown_skills_and_shares_outside_the_unit_interval_are_errors() -> None:
    with pytest.raises(DataError, match="math, code, instruct"):
        skills.make("poetry", 1, seed=0)
    with pytest.raises(DataError, match="between 0 and 1"):
        skills.make("math", 1, seed=0, wrong_share=30)
