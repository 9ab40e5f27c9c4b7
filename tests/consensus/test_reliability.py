"""The EM over claims: worlds with known accuracies, another's implementation, and what must not change anything."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayfuse.consensus.candidates import LABEL
from rayfuse.consensus.equivalence import Grouping, exact
from rayfuse.consensus.outcome import decide
from rayfuse.consensus.reliability import NONE, UNKNOWN, Prior, claims_of, fit
from tests.consensus.simulated import Simulated, candidates

VECTORS = Path(__file__).parent / "crowdkit.json"


def chosen_right(outcome, truth):
    """Share of all prompts whose kept text is right."""
    kept = [decision.chosen() for decision in outcome.decisions]
    return float(
        np.mean([answer is not None and answer.text == right for answer, right in zip(kept, truth, strict=True)])
    )


def label_error(asked, truth):
    """The true share of wrong labels."""
    pairs = [(one.labels[0].text, right) for one, right in zip(asked, truth, strict=True) if one.labels]
    return float(np.mean([text != right for text, right in pairs]))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("label_right", [1.0, 0.9, 0.7, 0.5, 0.3])
def test_the_share_of_wrong_labels_is_found(label_right, seed):
    asked, truth = Simulated(label_right=label_right, seed=seed).draw()
    outcome = decide(asked)
    assert outcome.wrong_labels.right == pytest.approx(label_error(asked, truth), abs=0.03)
    assert not outcome.findings
    assert chosen_right(outcome, truth) > 0.95


@pytest.mark.parametrize(
    "world", [Simulated(labels=0.2), Simulated(labels=0.0), Simulated(labels=0.2, label_right=1.0)]
)
def test_few_labels_or_none_are_enough(world):
    asked, truth = world.draw()
    assert chosen_right(decide(asked), truth) > 0.95


def test_it_chooses_better_than_any_single_source_and_than_the_majority():
    asked, truth = Simulated().draw()
    shares = {}
    for source in {answer.source for one in asked for answer in one.answers}:
        said = [next(a.text for a in one.answers if a.source == source) for one in asked]
        shares[source] = np.mean([text == right for text, right in zip(said, truth, strict=True)])
    counts = [[sum(a.text == b.text for b in one.answers) for a in one.answers] for one in asked]
    majority = np.mean(
        [one.answers[int(np.argmax(n))].text == right for one, n, right in zip(asked, counts, truth, strict=True)]
    )
    assert chosen_right(decide(asked), truth) > max(*shares.values(), majority) + 0.05


@pytest.mark.parametrize("world", [Simulated(seed=1), Simulated(expert_right=0.8, other_right=0.5, labels=0.5, seed=2)])
def test_posteriors_are_calibrated(world):
    """Of the answers that are believed with p, the share p is right: in three broad bins, within 8 points."""
    asked, truth = world.draw()
    outcome = decide(asked)
    believed, right = [], []
    for decision, answer in zip(outcome.decisions, truth, strict=True):
        texts = [answer.text for answer in decision.candidates.answers]
        for group, p in enumerate(decision.posterior):
            believed.append(p)
            right.append(texts[decision.groups.index(group)] == answer)
    believed, right = np.array(believed), np.array(right)
    for low, high in ((0.0, 0.2), (0.2, 0.8), (0.8, 1.01)):
        inside = (believed >= low) & (believed < high)
        assert inside.sum() > 20
        assert believed[inside].mean() == pytest.approx(right[inside].mean(), abs=0.08 if high != 0.8 else 0.2)


def test_accuracies_are_found_by_source_and_field_and_intervals_cover_them():
    inside, total = 0, 0
    for seed in range(4):
        asked, truth = Simulated(seed=seed).draw()
        outcome = decide(asked)
        assert outcome.clusters == (("field 0", "field 1", "field 2"), True)
        for one in outcome.estimates:
            said = [
                answer.text == right
                for c, right in zip(asked, truth, strict=True)
                for answer in c.answers
                if answer.source == one.source and one.field in ("", c.prompt.sample.skill)
            ]
            assert one.answers == len(said)
            assert one.right == pytest.approx(np.mean(said), abs=0.06)
            true = (
                0.7
                if one.source == LABEL
                else 0.35
                if one.source == "pivot"
                else (0.96 + 2 * 0.3) / 3
                if not one.field
                else 0.96
                if one.field[-1] == one.source[-1]
                else 0.3
            )
            inside += one.low <= true <= one.high
            total += 1
    assert inside / total > 0.85


def test_shared_mistakes_are_found():
    few, many = (decide(Simulated(shared=shared).draw()[0]).shared_mistakes for shared in (0.0, 0.5))
    assert few < 0.05
    assert many > 0.2


@settings(max_examples=10)
@given(st.permutations(range(5)), st.randoms(use_true_random=False))
def test_neither_the_order_of_sources_nor_of_prompts_changes_anything(order, random):
    asked, _ = Simulated(prompts=90, seed=3).draw()
    prompts = list(range(len(asked)))
    random.shuffle(prompts)
    shuffled = [replace(asked[p], answers=tuple(asked[p].answers[i] for i in order)) for p in prompts]
    before, after = decide(asked), decide(shuffled)
    for place, p in enumerate(prompts):
        for index, source in enumerate(order):
            assert after.decisions[place].right(index) == pytest.approx(before.decisions[p].right(source), abs=1e-6)
        assert after.decisions[place].chosen() == before.decisions[p].chosen()
    assert after.wrong_labels.right == pytest.approx(before.wrong_labels.right, abs=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_more_sources_do_not_hurt(seed):
    """Each source taken away leaves no more right texts than all give, beyond one point of noise."""
    asked, truth = Simulated(seed=seed, labels=0.5).draw()
    with_all = chosen_right(decide(asked), truth)
    for source in ("label", "expert 0", "expert 1", "expert 2", "pivot"):
        without = [replace(c, answers=tuple(a for a in c.answers if a.source != source)) for c in asked]
        assert chosen_right(decide(without), truth) <= with_all + 0.01


def test_a_source_that_guesses_does_no_harm():
    asked, truth = Simulated(seed=5).draw()
    draw = np.random.default_rng(0)
    guess = candidates("", [("guesser", "", -0.001)]).answers[0]
    noisy = [one.with_answers([replace(guess, text=f"guess {draw.integers(10**9)}")]) for one in asked]
    assert chosen_right(decide(noisy), truth) > chosen_right(decide(asked), truth) - 0.01
    assert next(one for one in decide(noisy).estimates if one.source == "guesser").right < 0.1


def test_what_is_trusted_is_believed_and_teaches():
    """Two sources of which nothing tells who is right; twenty trusted rows do."""
    asked = []
    for number in range(300):
        answers = [("a", f"a {number}", -0.05), ("b", f"b {number}", -0.05)]
        trusted = number < 20
        asked.append(
            candidates(f"q {number}", [*answers, *([(LABEL, f"a {number}", None)] if trusted else [])], trusted=trusted)
        )
    claims = claims_of(asked, [exact(one) for one in asked], np.zeros(300, dtype=int))
    found = fit(claims)
    for number in range(20):
        assert found.posterior[claims.group_prompt == number].tolist() == [1.0, 0.0]
    accuracy = found.accuracy[:, 0, 4]
    assert accuracy[claims.sources.index("a")] > accuracy[claims.sources.index("b")] + 0.2
    assert (found.posterior[claims.group_prompt >= 20].reshape(-1, 2).argmax(1) == 0).all()


def test_tests_that_nobody_passes_leave_none():
    asked = [candidates("q", [("a", "x", -0.1), ("b", "y", -0.1)])]
    claims = claims_of(asked, [Grouping((0, 1), -1)], [0])
    assert claims.known.tolist() == [NONE]
    found = fit(claims)
    assert found.posterior.tolist() == [0.0, 0.0]
    assert found.none.tolist() == [1.0]


def test_a_prompt_that_nobody_answers_is_none_of_them():
    asked = [candidates("q", []), candidates("r", [("a", "x", -0.1)])]
    claims = claims_of(asked, [exact(one) for one in asked], [0, 0])
    assert claims.known.tolist() == [UNKNOWN, UNKNOWN]
    found = fit(claims)
    assert found.none[0] == 1.0
    assert found.posterior[0] + found.none[1] == pytest.approx(1.0)


def test_the_formula_by_hand():
    """One E step, three sources, two groups, against the formula written out."""
    asked = [candidates("q", [("a", "x", -0.05), ("b", "x", -0.3), ("c", "y", -0.005)])]
    claims = claims_of(asked, [exact(asked[0])], [0])
    found = fit(claims, Prior(rounds=0))
    a, b, c = (0.95 * math.exp(certainty) for certainty in (-0.05, -0.3, -0.005))
    wrong_x = math.log(1 - a) + math.log(1 - b) - math.log(50) + math.log(0.1)
    wrong_y = math.log(1 - c) - math.log(50)
    scores = [math.log(a) + math.log(b) + wrong_y, math.log(c) + wrong_x, wrong_x + wrong_y + math.log(0.2 * 50)]
    total = sum(map(math.exp, scores))
    assert [*found.posterior, found.none[0]] == pytest.approx([math.exp(score) / total for score in scores])


# --- against crowd-kit ------------------------------


def one_coin(rows, texts):
    """Posteriors by (task, label) of this package where certainties, clusters, smoothing and delta are switched off.

    A wrong source is wrong by itself (delta = 1 / M), as in the one-coin model.
    """
    tasks = sorted({task for task, _, _ in rows})
    by_task = {task: [(w, label, None) for t, w, label in rows if t == task] for task in tasks}
    asked = [candidates(task, by_task[task]) for task in tasks]
    claims = claims_of(asked, [exact(one) for one in asked], [0] * len(asked))
    prior = Prior(
        texts=texts, none=1e-9, unknown=0.7, shared=1 / texts, strength=1e-6, cluster_strength=1e-6, rounds=200
    )
    found = fit(claims, prior)
    posteriors = {}
    for task, one, first in zip(tasks, asked, np.searchsorted(claims.group_prompt, range(len(tasks))), strict=True):
        groups = exact(one).groups
        posteriors[task] = {a.text: float(found.posterior[first + g]) for a, g in zip(one.answers, groups, strict=True)}
    return posteriors, {name: found.accuracy[s, 0, -1] for s, name in enumerate(claims.sources)}


def compare(rows, texts, expected):
    """This package's posteriors against a recorded or a live answer of crowd-kit's four models."""
    posteriors, accuracy = one_coin(rows, texts)
    choices = {task: max(sorted(of), key=of.__getitem__) for task, of in posteriors.items()}
    for worker, skill in expected["one coin skills"].items():
        assert accuracy[worker] == pytest.approx(skill, abs=0.02)
    differences = [
        abs(posteriors[task][label] - p)
        for task, of in expected["one coin posteriors"].items()
        for label, p in of.items()
        if label in posteriors[task]
    ]
    assert np.mean(differences) < 0.01
    agreement = {
        name: np.mean([choices[task] == label for task, label in labels.items()])
        for name, labels in expected["choices"].items()
    }
    assert agreement["one coin"] > 0.98
    assert agreement["dawid skene"] > 0.9
    assert agreement["glad"] > 0.9
    assert agreement["mace"] > 0.9


def test_the_recorded_answers_of_crowdkit():
    """Recorded by record_crowdkit.py."""
    recorded = json.loads(VECTORS.read_text())
    compare(recorded["rows"], recorded["texts"], recorded)


@pytest.mark.slow
def test_crowdkit_as_it_is_installed():
    pytest.importorskip("crowdkit", reason="pip install crowd-kit")
    from tests.consensus.record_crowdkit import TEXTS, answers_of_crowdkit, simulated_rows

    for seed in (1, 2):
        rows = simulated_rows(seed)
        compare(rows, TEXTS, answers_of_crowdkit(rows))
