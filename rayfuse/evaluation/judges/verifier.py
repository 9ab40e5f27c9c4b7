"""Verifiers: 1 where a response agrees with the reference answer, by one of the scores of evaluation; else 0."""

from __future__ import annotations

from collections.abc import Sequence

from rayfuse.data.prompts import Prompt
from rayfuse.evaluation.scores import SCORES


class VerifierJudge:
    """Compares with `answer` of the prompt."""

    def __init__(self, name: str) -> None:
        self.agrees = SCORES[name]

    def __call__(self, pairs: Sequence[tuple[Prompt, str]]) -> list[float]:
        """The score of each pair, in order."""
        return [float(self.agrees(response, prompt.answer)) for prompt, response in pairs]
