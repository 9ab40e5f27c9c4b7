"""The EM over scores, for answers that cannot be compared."""

import math
from itertools import pairwise

import numpy as np
import pytest

from rayfuse.consensus.candidates import LABEL
from rayfuse.consensus.equivalence import exact
from rayfuse.consensus.outcome import decide
from rayfuse.consensus.reliability import Prior
from rayfuse.consensus.scored import fit_scores
from tests.consensus.simulated import Simulated, candidates


def free(world, length=1.0):
    """A simulated world in which every text is a candidate of its own, and the models' scores of all of them.

    A text of `length` times eight tokens; a model's own has its certainty per token. One that knows gives other texts a
    factor of e^-7, one that does not knows little between its own and others.
    """
    asked, truth = world.draw()
    draw = np.random.default_rng(world.seed + 100)
    made, scores = [], []
    for one in asked:
        answers = [
            (answer.source, f"{answer.text} as {answer.source} says it", answer.certainty) for answer in one.answers
        ]
        of_prompt = {}
        for answer in one.answers:
            if not answer.by_model:
                continue
            knows = answer.text.startswith("right")
            for _, text, _ in answers:
                same = text.split(" as ")[0] == answer.text
                drop = 0.0 if same else 7.0 if knows else draw.exponential(1.5)
                of_prompt[answer.source, text] = length * (8 * answer.certainty - drop - abs(draw.normal(0, 0.3)))
        made.append(candidates(one.prompt.sample.plain_text, answers, skill=one.prompt.sample.skill))
        scores.append(of_prompt)
    return made, scores, truth


def share_right(outcome, truth):
    chosen = [decision.chosen(keep=0.0) for decision in outcome.decisions]
    return np.mean([answer.text.startswith(f"{right} as") for answer, right in zip(chosen, truth, strict=True)])


@pytest.mark.parametrize(("labels", "least"), [(1.0, 0.95), (0.0, 0.93)])
def test_texts_that_differ_are_chosen_as_well_as_ones_that_are_equal(labels, least):
    made, scores, truth = free(Simulated(labels=labels))
    outcome = decide(made, equivalence="none", score=lambda _: scores)
    assert outcome.equivalence.name == "none"
    assert [finding.name for finding in outcome.findings] == (["free text"] if labels else [])
    assert share_right(outcome, truth) > least
    for decision in outcome.decisions:
        assert sum(decision.posterior) == pytest.approx(1.0)


def test_weights_say_who_knows_the_field():
    made, scores, _ = free(Simulated())
    outcome = decide(made, equivalence="none", score=lambda _: scores)
    weights = [
        decision.weights(["expert 0", "expert 1"]) for decision in outcome.decisions if decision.field == "field 0"
    ]
    assert np.mean([of["expert 0"] for of in weights]) > 0.8
    assert np.mean([of["expert 1"] for of in weights]) < 0.5


def test_a_learnt_temper_takes_the_sharpness_out_of_long_texts():
    """Texts fifty times as long: at temper 1 every source is sure of what is noise, and fewer choices are right."""
    made, scores, truth = free(Simulated(prompts=400), length=50.0)
    groupings = [exact(one) for one in made]
    clusters = [int(one.prompt.sample.skill[-1]) for one in made]

    def right(temper):
        found = fit_scores(made, groupings, scores, clusters, temper=temper)
        firsts = np.cumsum([0, *(grouping.count for grouping in groupings)])
        best = [int(found.posterior[a:b].argmax()) for a, b in pairwise(firsts)]
        texts = [
            one.answers[grouping.groups.index(b)].text for one, grouping, b in zip(made, groupings, best, strict=True)
        ]
        return np.mean([text.startswith(f"{answer} as") for text, answer in zip(texts, truth, strict=True)])

    assert right(None) > 0.93
    assert right(None) > right(1.0) + 0.04


def test_the_formula_by_hand():
    """One E step with a label, two sources and three candidates, against the formula written out."""
    asked = [candidates("q", [(LABEL, "x", None), ("a", "y", -0.05), ("b", "z", -0.3)])]
    scores = {
        ("a", "x"): -3.0,
        ("a", "y"): -1.0,
        ("a", "z"): -4.0,
        ("b", "x"): -2.0,
        ("b", "y"): -2.5,
        ("b", "z"): -2.2,
    }
    found = fit_scores(asked, [exact(asked[0])], [scores], [0], prior=Prior(rounds=0))
    by_hand = []
    for text in "xyz":
        total = math.log(0.8) if text == "x" else math.log(0.2 / 2)
        for source, certainty in (("a", -0.05), ("b", -0.3)):
            q = math.exp(scores[source, text]) / sum(math.exp(scores[source, other]) for other in "xyz")
            a = 0.95 * math.exp(certainty)
            total += math.log(a * q + (1 - a) / 3)
        by_hand.append(math.exp(total))
    assert found.posterior == pytest.approx([one / sum(by_hand) for one in by_hand])
    assert (found.reliable > 0).all()
    assert (found.reliable < 1).all()


def test_equal_answers_add_their_probabilities():
    asked = [candidates("q", [("a", "x", -0.1), ("b", " x", -0.1), ("c", "y", -0.1)])]
    scores = {(source, text): math.log(p) for source in "abc" for text, p in (("x", 0.3), (" x", 0.2), ("y", 0.5))}
    found = fit_scores(asked, [exact(asked[0])], [scores], [0], prior=Prior(rounds=0))
    assert found.posterior == pytest.approx([0.5, 0.5])


def test_a_source_that_lacks_a_score_says_nothing_there():
    asked = [candidates("q", [("a", "x", -0.1), ("b", "y", -0.01)])]
    whole = {("a", "x"): -1.0, ("a", "y"): -5.0}
    found = fit_scores(asked, [exact(asked[0])], [{**whole, ("b", "y"): -0.1}], [0], prior=Prior(rounds=0))
    assert found.posterior[0] > 0.5
    assert found.reliable[0].tolist()[found.models.index("b")] == 0.0
