"""Weights of rows as they are, by their prompt and label."""

import json

import pytest

from rayfuse.consensus.make import write
from rayfuse.consensus.outcome import decide
from rayfuse.consensus.weights import PromptWeights
from rayfuse.data.rows import samples_of_row
from rayfuse.data.sample import DataCounts
from rayfuse.errors import DataError
from tests.consensus.simulated import Simulated

EXPERTS = ["expert 0", "expert 1", "expert 2"]


def sample_of(prompt, response):
    (sample,) = samples_of_row({"prompt": prompt, "response": response})
    return sample


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("consensus")
    asked, truth = Simulated(prompts=300).draw()
    outcome = decide(asked)
    write(folder, outcome, 0.5, DataCounts(rows=300), [*EXPERTS, "stored"])
    return folder, outcome, truth


def test_a_label_counts_as_it_is_right_and_a_teacher_as_its_own_answer(world):
    folder, outcome, truth = world
    weights = PromptWeights.read(folder)
    labels = [(d.candidates.prompt.sample.plain_text, d.candidates.labels[0].text) for d in outcome.decisions]
    made = weights.weighted([sample_of(prompt, label) for prompt, label in labels])
    right = [sample.weights.sample for sample, text in zip(made, truth, strict=True) if sample.response == text]
    wrong = [sample.weights.sample for sample, text in zip(made, truth, strict=True) if sample.response != text]
    assert sum(right) / len(right) > 0.95
    assert sum(wrong) / len(wrong) < 0.15
    for name in EXPERTS:
        knows = [
            {answer.source: answer.text for answer in decision.candidates.answers}[name] == text
            for decision, text in zip(outcome.decisions, truth, strict=True)
        ]
        given = [sample.weights.teacher(name) for sample in made]
        assert sum(w for w, known in zip(given, knows, strict=True) if known) / sum(knows) > 0.9
        assert sum(w for w, known in zip(given, knows, strict=True) if not known) / (300 - sum(knows)) < 0.1
    assert {sample.weights.teacher("stored") for sample in made} == {0.0}  # it says nothing of its own


def test_the_chosen_rows_carry_the_same_weights(world):
    folder, outcome, _ = world
    weights = PromptWeights.read(folder)
    rows = [json.loads(line) for line in (folder / "choices.jsonl").read_text().splitlines()]
    chosen = [decision for decision in outcome.decisions if decision.chosen() is not None]
    for row, decision in zip(rows, chosen, strict=True):
        (sample,) = samples_of_row(row)
        assert sample.weights.sample == pytest.approx(max(decision.posterior), abs=1e-6)
        (same,) = weights.weighted([sample_of(row["prompt"], decision.candidates.labels[0].text)])
        assert sample.weights.teachers == same.weights.teachers


def test_a_prompt_that_was_not_asked_is_named(world):
    folder, *_ = world
    with pytest.raises(DataError, match=r"the prompt of sample .* \('never asked'\) is not in .*candidates\.jsonl"):
        PromptWeights.read(folder).weighted([sample_of("never asked", "4")])


def test_an_outcome_that_fell_back_counts_all_alike(tmp_path):
    asked, _ = Simulated(prompts=20).draw()
    outcome = decide(asked)
    assert outcome.fell_back
    write(tmp_path, outcome, 0.5, DataCounts(rows=20), EXPERTS)
    for line in (tmp_path / "choices.jsonl").read_text().splitlines():
        (sample,) = samples_of_row(json.loads(line))
        assert sample.weights.sample == 1.0
        assert [weight for _, weight in sample.weights.teachers] == [1.0] * 3
        (same,) = PromptWeights.read(tmp_path).weighted([sample])
        assert same.weights == sample.weights
