"""What is done with posteriors, and what is said where there is nothing to learn reliabilities from."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from rayfuse.consensus.candidates import LABEL, Answer
from rayfuse.consensus.estimates import wilson
from rayfuse.consensus.outcome import Decision, decide
from rayfuse.evaluation.models import Accuracy
from tests.consensus.simulated import Simulated, candidates


def decision(answers, groups, posterior, **more):
    return Decision(candidates("q", answers), groups, posterior, 0.0, "", **more)


ANSWERS = [
    (LABEL, "The answer is 4.", None),
    ("a", "4", -0.1),
    ("b", "4!", -0.01),
    ("c", "5", -0.5),
    ("pivot", "6", -0.2),
]


def test_the_labels_wording_is_kept_where_it_agrees():
    found = decision(ANSWERS, (0, 0, 0, 1, 2), (0.9, 0.06, 0.04))
    assert found.chosen().text == "The answer is 4."
    assert found.weights(["a", "b", "c", "silent"]) == {"a": 0.9, "b": 0.9, "c": 0.06, "silent": 0.0}


def test_else_the_surest_models_wording_counts():
    found = decision(ANSWERS, (1, 0, 0, 2, 3), (0.9, 0.05, 0.03, 0.02))
    assert found.chosen().text == "4!"
    unreadable = [*found.candidates.answers[:2], replace(found.candidates.answers[2], fault="unreadable")]
    assert (
        replace(found, candidates=replace(found.candidates, answers=(*unreadable, *found.candidates.answers[3:])))
        .chosen()
        .text
        == "4"
    )


def test_nothing_is_kept_below_the_threshold():
    found = decision(ANSWERS, (0, 0, 0, 1, 2), (0.45, 0.3, 0.25))
    assert found.chosen() is None
    assert found.chosen(keep=0.4).source == LABEL
    assert decision([], (), ()).chosen() is None


def test_the_worst_answer_is_the_least_probable_and_the_pivots_among_equals():
    found = decision(ANSWERS, (0, 0, 0, 1, 2), (0.9, 0.06, 0.04))
    assert found.worst(found.chosen()).source == "pivot"
    equal = decision(ANSWERS, (0, 0, 0, 1, 2), (0.9, 0.05, 0.05))
    assert equal.worst(equal.chosen()).source == "pivot"
    alone = decision(ANSWERS[:3], (0, 0, 0), (1.0,))
    assert alone.worst(alone.chosen()) is None


def test_a_fallback_keeps_labels_and_counts_teachers_alike():
    found = decision(ANSWERS, (0, 1, 1, 2, 3), (0.01, 0.9, 0.05, 0.04), fallback=True)
    assert found.chosen().source == LABEL
    assert found.weights(["a", "silent"]) == {"a": 1.0, "silent": 1.0}
    assert decision(ANSWERS[1:], (0, 0, 1, 2), (0.9, 0.05, 0.05), fallback=True).chosen() is None


def names(outcome):
    return [(finding.name, finding.falls_back) for finding in outcome.findings]


def test_too_few_prompts_are_told():
    asked, _ = Simulated(prompts=30).draw()
    outcome = decide(asked)
    assert names(outcome) == [("few prompts", True)]
    assert "only 30 prompts have two answers or more; 50 are needed" in outcome.findings[0].text
    assert outcome.fell_back
    assert all(d.chosen().source == LABEL for d in outcome.decisions)


def test_one_answer_to_each_prompt_is_too_few():
    asked = [candidates(f"q {n}", [("a", f"x {n}", -0.1)]) for n in range(200)]
    assert names(decide(asked)) == [("few prompts", True)]


def test_sources_that_agree_on_nothing_are_told():
    asked = [candidates(f"q {n}", [(s, f"{s} says {n}", -0.1) for s in "abc"]) for n in range(200)]
    outcome = decide(asked, equivalence="exact")
    assert names(outcome) == [("no agreement", True)]
    assert "agree in 0.0% of the prompts (equivalence exact: asked for)" in outcome.findings[0].text


def test_free_text_without_scores_falls_back_and_says_why():
    asked = [candidates(f"q {n}", [(s, f"{s} tells a tale of {s * n}", -0.1) for s in "abc"]) for n in range(1, 100)]
    outcome = decide(asked)
    assert outcome.equivalence.name == "none"
    assert names(outcome) == [("no agreement", True)]


def test_labels_of_another_form_are_told_and_not_thrown_away():
    asked, _ = Simulated(label_right=0.0, other_right=0.5).draw()
    outcome = decide(asked)
    assert names(outcome) == [("labels wrong", True)]
    assert outcome.findings[0].number > 0.95
    assert all(d.chosen().source == LABEL for d in outcome.decisions)


def test_a_silent_source_is_named_and_the_rest_goes_its_way():
    asked, _ = Simulated().draw()
    outcome = decide(asked, silent=["stored"])
    assert names(outcome) == [("silent source", False)]
    assert "stored gives no answers of its own" in outcome.findings[0].text
    assert not outcome.fell_back
    assert sum(d.weights(["stored"])["stored"] for d in outcome.decisions) == 0.0


def test_calibration_adds_up():
    asked, _ = Simulated().draw()
    outcome = decide(asked)
    for source in ("expert 0", "pivot"):
        rows = [row for row in outcome.calibration if row.source == source]
        assert sum(row.answers for row in rows) == len(asked)
        over_all = next(one for one in outcome.estimates if one.source == source and not one.field)
        assert sum(row.answers * row.right for row in rows) / len(asked) == pytest.approx(over_all.right)
        assert [row.low for row in rows[1:]] == [row.high for row in rows[:-1]]
        assert all(a.stated < b.stated for a, b in pairwise(rows))
        assert rows[-1].right > rows[0].right


@pytest.mark.parametrize(("right", "n"), [(0, 10), (7, 10), (10, 10), (300, 1000)])
def test_the_interval_is_wilsons(right, n):
    assert wilson(right / n, n) == pytest.approx(Accuracy(right, n).interval)


def test_several_labels_of_a_prompt_are_several_opinions():
    asked, truth = Simulated(experts=2, label_right=0.7).draw()
    draw = np.random.default_rng(0)
    second = [
        one.with_answers([Answer(LABEL, right if draw.random() < 0.7 else f"other {n}")])
        for n, (one, right) in enumerate(zip(asked, truth, strict=True))
    ]
    outcome = decide(second)
    assert outcome.wrong_labels.answers == 2 * len(asked)
    assert outcome.wrong_labels.right == pytest.approx(0.3, abs=0.04)


def test_what_tests_have_found_is_believed_however_few_there_are():
    asked, _ = Simulated(prompts=10).draw()
    programs = [replace(one, prompt=replace(one.prompt, tests=("assert True",))) for one in asked]
    outcome = decide(programs, judge=lambda pairs: [float(text.startswith("right")) for _, text in pairs])
    assert outcome.equivalence.name == "tests"
    assert not outcome.findings
    for one in outcome.decisions:
        texts = [answer.text for answer in one.candidates.answers]
        kept = one.chosen()
        assert (kept is not None) == any(text.startswith("right") for text in texts)
        assert kept is None or kept.text.startswith("right")
