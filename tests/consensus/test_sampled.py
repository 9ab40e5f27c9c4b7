"""Scores of sampled responses without a judge: against worlds whose truth is known."""

import numpy as np
import pytest

from rayfuse.config import Prefer, parse_config
from rayfuse.consensus.sampled import Sampled, posteriors
from rayfuse.data.prompts import Prompt
from rayfuse.data.sample import Sample
from rayfuse.errors import DataError
from rayfuse.prefer.selection import Response, rows_of_prompt


def world(prompts=300, seed=0, labels=0.0):
    """Two experts of a field each (4 samples, 90% right at home, 25% elsewhere), a pivot (8 samples, 20%); 45% of
    the wrong answers to a prompt are the same one."""
    draw = np.random.default_rng(seed)
    made = []
    for number in range(prompts):
        field = number % 2

        def say(right, number=number):
            wrong = 0 if draw.random() < 0.4 else draw.integers(12)
            return f"right {number}" if draw.random() < right else f"wrong {number} {wrong}"

        responses = [(f"expert {e}", say(0.9 if e == field else 0.25)) for e in (0, 1) for _ in range(4)]
        responses += [("pivot", say(0.2)) for _ in range(8)]
        label = say(0.7) if draw.random() < labels else ""
        prompt = Prompt(Sample((("user", f"field {field} asks {number}"),), "", f"field {field}"), label)
        made.append(Sampled(prompt, responses))
    return made


@pytest.mark.parametrize("labels", [0.0, 1.0])
def test_the_most_probable_response_is_right_and_the_least_probable_wrong(labels):
    sampled = world(labels=labels)
    found, outcome = posteriors(sampled, "auto")
    assert outcome.equivalence.name == "exact"
    best = [max(of_prompt, key=of_prompt.__getitem__) for of_prompt in found]
    worst = [min(of_prompt, key=of_prompt.__getitem__) for of_prompt in found]
    assert sum(text.startswith("right") for text in best) / len(best) > 0.9
    assert sum(text.startswith("wrong") for text in worst) / len(worst) > 0.95
    majority = [max(set(texts), key=texts.count) for texts in ([t for _, t in one.responses] for one in sampled)]
    assert sum(t.startswith("right") for t in majority) / len(majority) < 0.8  # what counting hands gives


def test_every_response_has_a_score_and_equal_ones_the_same():
    sampled = [
        Sampled(one.prompt, [(source, rf"{n}: \boxed{{{text}}}") for n, (source, text) in enumerate(one.responses)])
        for one in world(100)
    ]
    found, outcome = posteriors(sampled, "auto")
    assert outcome.equivalence.name == "final"
    for one, scores in zip(sampled, found, strict=True):
        assert {text for _, text in one.responses} <= set(scores)
        by_end: dict[str, set[float]] = {}
        for text, score in scores.items():
            by_end.setdefault(text.partition("boxed")[2], set()).add(score)
        assert all(len(of_end) == 1 for of_end in by_end.values())
        assert 0 <= min(scores.values()) <= max(scores.values()) <= 1


def test_pairs_come_from_them():
    settings = Prefer.model_validate({"judge": "consensus", "output": "pairs.jsonl"})
    assert settings.least_score == 0.5
    sampled = world()
    found, _ = posteriors(sampled, "auto")
    rows = []
    for one, scores in zip(sampled, found, strict=True):
        responses = [Response(text, model, "", n, scores[text]) for n, (model, text) in enumerate(one.responses)]
        rows += rows_of_prompt(settings, one.prompt, responses)[0]
    assert len(rows) > 250
    right = sum(row["chosen"].startswith("right") and row["rejected"].startswith("wrong") for row in rows)
    assert right / len(rows) > 0.93


def test_what_cannot_be_judged_is_said_with_the_number():
    with pytest.raises(DataError, match=r"cannot judge these responses: only 20 prompts have two answers or more; 50"):
        posteriors(world(20), "exact")
    free = [Sampled(one.prompt, [(s, f"{n} {t} x") for n, (s, t) in enumerate(one.responses)]) for one in world(60)]
    lettered = [
        Sampled(one.prompt, [(s, "".join(chr(97 + int(c)) if c.isdigit() else c for c in t)) for s, t in one.responses])
        for one in free
    ]
    with pytest.raises(
        DataError, match=r"cannot judge these responses: answers have the same text in 0% .*reward_model"
    ):
        posteriors(lettered, "auto")
    with pytest.raises(DataError, match=r"cannot judge these responses: answers to a prompt agree in 0\.0%"):
        posteriors(lettered, "exact")


def test_one_key_asks_for_it():
    tree = {"student": "p", "teachers": ["a"], "data": "d.jsonl", "stages": ["infifpo"], "output": "o"}
    config = parse_config({**tree, "preferences": "pairs.jsonl", "prefer": {"judge": "consensus"}})
    assert config.prefer.judge.equivalence == "auto"
