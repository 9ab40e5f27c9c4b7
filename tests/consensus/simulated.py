"""Simulated worlds of sources with known accuracies, for the tests of who is right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rayfuse.consensus.candidates import LABEL, PIVOT, Answer, Candidates
from rayfuse.data.prompts import Prompt
from rayfuse.data.sample import Sample


def candidates(text: str, answers: Sequence[tuple[str, str, float | None]], *, skill: str = "", trusted: bool = False):
    """A prompt with (source, text, certainty) answers."""
    made = tuple(Answer(source, said, certainty) for source, said, certainty in answers)
    return Candidates(Prompt(Sample((("user", text),), "", skill)), made, trusted)


@dataclass(frozen=True)
class Simulated:
    """A world: experts of one field each, a pivot, labels.

    Attributes:
        prompts: of all fields together; the fields take turns.
        labels: share of the prompts with a label.
        label_right, expert_right, other_right, pivot_right: accuracies; an expert's in its own field and elsewhere.
        experts: how many, and so how many fields.
        shared: rate at which a wrong source says the prompt's popular mistake.
        texts: wrong texts of a prompt.
    """

    prompts: int = 1200
    labels: float = 1.0
    label_right: float = 0.7
    expert_right: float = 0.96
    other_right: float = 0.3
    pivot_right: float = 0.35
    experts: int = 3
    shared: float = 0.1
    texts: int = 50
    seed: int = 0

    def draw(self) -> tuple[list[Candidates], list[str]]:
        """The prompts with their answers, and the right text of each. A right answer is surer than a wrong one."""
        draw = np.random.default_rng(self.seed)
        asked, truth = [], []
        for number in range(self.prompts):
            field = number % self.experts

            def say(right: float, number: int = number) -> str:
                if draw.random() < right:
                    return f"right {number}"
                wrong = 0 if draw.random() < self.shared else int(draw.integers(self.texts))
                return f"wrong {number} {wrong}"

            def sure(text: str, number: int = number) -> float:
                return -float(draw.exponential(0.02 if text == f"right {number}" else 0.25))

            answers: list[tuple[str, str, float | None]] = []
            if draw.random() < self.labels:
                answers.append((LABEL, say(self.label_right), None))
            for expert in range(self.experts):
                text = say(self.expert_right if expert == field else self.other_right)
                answers.append((f"expert {expert}", text, sure(text)))
            text = say(self.pivot_right)
            answers.append((PIVOT, text, sure(text)))
            asked.append(candidates(f"field {field} asks {number}", answers, skill=f"field {field}"))
            truth.append(f"right {number}")
        return asked, truth
