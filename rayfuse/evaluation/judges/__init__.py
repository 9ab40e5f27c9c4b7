"""Judges: how good is a response? One file each, chosen from a plain dict, each imported when it is used.

A judge is called with (prompt, response) pairs and returns a score for each, larger is better. The same pairs give the
same scores. `JudgeActor` hosts one; there are `workers` of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import ray

from rayfuse.config import Judge as JudgeConfig
from rayfuse.data.prompts import Prompt


class Judge(Protocol):
    """What a judge is."""

    def __call__(self, pairs: Sequence[tuple[Prompt, str]]) -> list[float]:
        """The score of each pair, in order."""


def _reward_model(config: Any) -> Judge:
    from rayfuse.evaluation.judges.reward_model import RewardModelJudge

    return RewardModelJudge(config)


def _verifier(config: Any) -> Judge:
    from rayfuse.evaluation.judges.verifier import VerifierJudge

    return VerifierJudge(config.method)


def _unit_tests(config: Any) -> Judge:
    from rayfuse.evaluation.judges.unit_tests import UnitTestsJudge

    return UnitTestsJudge(config)


JUDGES: dict[str, Callable[[Any], Judge]] = {
    "reward_model": _reward_model,
    "exact": _verifier,
    "number": _verifier,
    "unit_tests": _unit_tests,
}


@ray.remote
class JudgeActor:
    """A judge in a process of its own. Its calls are idempotent: a lost actor is started again, and the call too."""

    def __init__(self, config: JudgeConfig) -> None:
        self.config = config
        self.judge: Judge | None = None

    def score(self, pairs: list[tuple[Prompt, str]]) -> list[float]:
        """The score of each pair, in order. The first call loads the judge, so that its errors reach the caller."""
        if self.judge is None:
            self.judge = JUDGES[self.config.method](self.config)
        return self.judge(pairs)
