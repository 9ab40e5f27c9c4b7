"""From judged responses to rows: the best and the worst of each prompt, and where they came from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rayfuse.config import Prefer
from rayfuse.data.prompts import Prompt


@dataclass(frozen=True)
class Response:
    """One response and who wrote it.

    Attributes:
        text: as written.
        model: name of the teacher, or "pivot".
        fingerprint: of that model.
        index: which of its samples.
        score: of the judge; 0 without one.
        fault: why it cannot be used: "empty", "unreadable" (a model does not read it exactly) or "too long".
    """

    text: str
    model: str
    fingerprint: str
    index: int
    score: float = 0.0
    fault: str = ""

    @property
    def by_pivot(self) -> bool:
        """Whether the pivot wrote it."""
        return self.model == "pivot"


Rows = list[dict[str, Any]]


def rows_of_prompt(prefer: Prefer, prompt: Prompt, responses: Sequence[Response]) -> tuple[Rows, str]:
    """The rows that one prompt gives, and why it gives none: "no response", "below min_score" or "tied".

    Among equally good (or bad) responses a hash of prompt, response, writer and seed chooses: no teacher is preferred
    for standing first, and nothing depends on the order in which answers came.
    """
    usable = [response for response in responses if not response.fault]
    if not usable:
        return [], "no response"
    if prefer.judge is None:
        texts = dict.fromkeys(response.text for response in usable)
        first = [next(response for response in usable if response.text == text) for text in texts]
        return [_row(prefer, prompt, {"response": response}) for response in first], ""

    def pick(among: Sequence[Response], worst: bool = False) -> Response:
        sign = -1 if worst else 1
        return max(among, key=lambda r: (sign * r.score, _lot(prefer.seed, prompt, r)))

    good = [response for response in usable if response.score >= prefer.least_score]
    teachers = [response for response in good if not response.by_pivot]
    pivots = [response for response in good if response.by_pivot]
    kinds = {"preferences": [good], "triples": [teachers, pivots], "responses": [teachers]}[prefer.write]
    if not all(kinds):
        return [], "below min_score"
    best = [pick(kind) for kind in kinds]
    if prefer.write == "responses":
        return [_row(prefer, prompt, {"response": best[0]})], ""
    worst = pick(usable, worst=True)
    if not all(one.score > worst.score and one.score - worst.score > prefer.min_gap for one in best):
        return [], "tied"
    names = ("chosen", "chosen_pivot")[: len(best)]
    return [_row(prefer, prompt, {**dict(zip(names, best, strict=True)), "rejected": worst})], ""


def _lot(seed: int, prompt: Prompt, response: Response) -> str:
    lot = json.dumps([seed, prompt.sample.key, response.text, response.fingerprint, response.index])
    return hashlib.sha256(lot.encode()).hexdigest()


def _row(prefer: Prefer, prompt: Prompt, sides: dict[str, Response]) -> dict[str, Any]:
    messages = prompt.sample.messages
    alone = len(messages) == 1 and messages[0].role == "user" and not messages[0].fields
    row: dict[str, Any] = {
        "prompt": messages[0].content if alone else prompt.sample.turns,
        **{side: response.text for side, response in sides.items()},
    }
    if prompt.sample.tools:
        row["tools"] = json.loads(prompt.sample.tools)
    if prompt.sample.skill:
        row["skill"] = prompt.sample.skill
    judged = prefer.judge is not None
    row["provenance"] = {
        "prompt": prompt.sample.key,
        "seed": prefer.seed,
        **{
            side: {
                "model": response.model,
                "sample": response.index,
                **({"score": response.score} if judged else {}),
                "fingerprint": response.fingerprint,
            }
            for side, response in sides.items()
        },
    }
    return row
