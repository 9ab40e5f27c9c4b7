"""Which answers say the same."""

import pytest

from rayfuse.config import UnitTests
from rayfuse.consensus.candidates import Answer, Candidates
from rayfuse.consensus.equivalence import agreement, boxed, by_tests, choose, exact, final, same_final
from rayfuse.data.prompts import Prompt
from rayfuse.data.sample import Sample
from tests.consensus.simulated import candidates


def asked(*texts):
    return candidates("q", [(f"s{number}", text, None) for number, text in enumerate(texts)])


def test_the_same_text_but_for_its_ends():
    assert exact(asked("a", " a\n", "b", "A", "b ")).groups == (0, 0, 1, 2, 1)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("so it is 42", "42", True),
        ("so it is 42", "43", False),
        (r"thus \boxed{42}", "the answer is 42", True),
        (r"thus \boxed{42}, as 7 is prime", "42", True),
        (r"\boxed{\frac{1}{2}}", r"it is $\boxed{ \frac{1}{2} }$", True),
        (r"\boxed{\frac{1}{2}}", r"\boxed{\frac{1}{3}}", False),
        (r"\boxed{x+1}", r"\boxed{x + 1}", True),
        (r"\boxed{1,000}", "1000.0", True),
        ("Paris", "Paris ", True),
        ("Paris", "Rome", False),
    ],
)
def test_the_same_final_answer(one, other, same):
    assert same_final(one, other) is same
    assert same_final(other, one) is same
    assert final(asked(one, other)).groups == (0, 0 if same else 1)


@pytest.mark.parametrize(
    ("text", "inside"),
    [
        (r"\boxed{1}", "1"),
        (r"\boxed{1} and \boxed{2}", "2"),
        (r"\boxed{\frac{a}{b}}", r"\frac{a}{b}"),
        (r"\boxed{1", None),
        ("1", None),
    ],
)
def test_the_last_whole_box(text, inside):
    assert boxed(text) == inside


def test_programs_that_pass_say_the_same_and_are_right():
    prompt = Prompt(Sample((("user", "add"),), ""), tests=("assert add(1, 2) == 3",))
    texts = ["def add(a, b): return a + b", "def add(x, y):\n    return y + x", "def add(a, b): return a", "nonsense("]
    answers = tuple(Answer(f"s{number}", text) for number, text in enumerate(texts))
    from rayfuse.evaluation.judges.unit_tests import UnitTestsJudge

    judge = UnitTestsJudge(UnitTests(isolation="limits"))
    passing, failing, untested = by_tests(
        [Candidates(prompt, answers), Candidates(prompt, answers[2:]), asked("a", "a")], judge
    )
    assert (passing.groups, passing.right) == ((0, 0, 1, 2), 0)
    assert (failing.groups, failing.right) == ((0, 1), -1)
    assert (untested.groups, untested.right) == ((0, 0), None)


def test_agreement_counts_prompts_with_two_answers_or_more():
    groupings = [exact(one) for one in (asked("a", "a"), asked("a", "b"), asked("a"), asked("a", "b", "b"), asked())]
    assert agreement(groupings) == pytest.approx(2 / 3)
    assert agreement([]) == 0.0


def words(number):
    return f"It takes {number} steps of some length, and then one rests."


@pytest.mark.parametrize(
    ("prompts", "name", "reason"),
    [
        ([asked("a", "a"), asked("b", "c")], "exact", "the same text in 50% of the prompts"),
        ([asked(r"so \boxed{1}", r"hence \boxed{1}")] * 3, "final", r"100% of the answers have a \boxed{}"),
        ([asked("so 1 it is", "thus 1")] * 3, "final", "the last is the same in 100%"),
        ([asked("once upon a time", "there was a fox")] * 3, "none", "the same text in 0% of the prompts"),
        ([asked("in 3 days", "for 4 years")] * 3, "none", "the same last number in 0%"),
        (
            [Candidates(Prompt(Sample((("user", "q"),), ""), tests=("assert True",)), ())],
            "tests",
            "100% of the prompts",
        ),
    ],
)
def test_auto_says_what_it_chose_and_why(prompts, name, reason):
    chosen = choose("auto", prompts)
    assert chosen.name == name
    assert reason in chosen.reason
    assert choose("exact", prompts).name == "exact"
