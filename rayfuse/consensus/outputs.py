"""What stages take from an outcome: responses to learn from, weights of teachers, pairs; and labels to look at.

Rows have the form that `rayfuse prefer` writes and that `data` and `preferences` read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rayfuse.consensus.candidates import LABEL, PIVOT, Answer
from rayfuse.consensus.outcome import KEEP, Decision, Outcome
from rayfuse.data.prompts import Prompt
from rayfuse.data.weights import SAMPLE, TEACHERS

Row = dict[str, Any]


def responses(outcome: Outcome, keep: float = KEEP, teachers: Sequence[str] = ()) -> list[Row]:
    """`prompt` and `response` of every prompt with an answer that is right with at least `keep`, and their weights.

    Raises nothing where no prompt has one: the list is then empty.

    Args:
        outcome: of `decide`.
        keep: least p(right) of an answer to learn from.
        teachers: whose weights the rows carry.
    """
    return [
        _row(decision, {"response": answer})
        | {
            SAMPLE: round(decision.weight(decision.candidates.answers.index(answer)), 6),
            TEACHERS: {name: round(weight, 6) for name, weight in decision.weights(teachers).items()},
        }
        for decision in outcome.decisions
        if (answer := decision.chosen(keep)) is not None
    ]


def pairs(outcome: Outcome, keep: float = KEEP, gap: float = KEEP) -> list[Row]:
    """`prompt`, `chosen` and `rejected`: the chosen response against the one that is least probably right.

    Args:
        outcome: of `decide`; one that fell back gives no pairs, for it knows of no answer that it is wrong.
        keep: see `responses`.
        gap: p(right) of the chosen one is above that of the rejected one by at least this.
    """
    rows = []
    for decision in outcome.decisions if not outcome.fell_back else ():
        best = decision.chosen(keep)
        worst = decision.worst(best) if best is not None else None
        if best is None or worst is None or best.text.strip() == worst.text.strip():
            continue
        if _right(decision, best) - _right(decision, worst) >= gap:
            rows.append(_row(decision, {"chosen": best, "rejected": worst}))
    return rows


def triples(outcome: Outcome, keep: float = KEEP, gap: float = KEEP) -> list[Row]:
    """`prompt`, `chosen`, `chosen_pivot` and `rejected`, where a teacher and the pivot both are right.

    Chosen is the answer of the surest teacher that says what is right, chosen_pivot the pivot's own; see `pairs`.
    """
    rows = []
    for decision in outcome.decisions if not outcome.fell_back else ():
        best = decision.chosen(keep)
        if best is None:
            continue
        right = decision.said_like(best)
        own = next((answer for answer in right if answer.source == PIVOT), None)
        teachers = [answer for answer in right if answer.source not in (PIVOT, LABEL)]
        worst = decision.worst(best)
        if own is None or not teachers or worst is None or _right(decision, best) - _right(decision, worst) < gap:
            continue
        if worst.text.strip() not in (own.text.strip(), teachers[0].text.strip()):
            rows.append(_row(decision, {"chosen": teachers[0], "chosen_pivot": own, "rejected": worst}))
    return rows


def teacher_weights(outcome: Outcome, teachers: Sequence[str]) -> dict[str, dict[str, float]]:
    """By the prompt's key, the weight of each teacher in a distillation loss: p(its own answer is right).

    The papers' sum is 1 for each (what an outcome that fell back gives). The sum over teachers of a prompt that one
    expert knows is near 1, of one that all know near their number; of one that nobody knows near 0.
    """
    return {decision.candidates.prompt.sample.key: decision.weights(teachers) for decision in outcome.decisions}


@dataclass(frozen=True)
class DoubtfulLabel:
    """A label that is probably wrong.

    Attributes:
        prompt: whose.
        label: as it stands in the data.
        right: p(it is right).
        better: what is believed instead; None where no answer is believed.
        sources: who says so.
        field: of the prompt.
    """

    prompt: Prompt
    label: str
    right: float
    better: str | None
    sources: tuple[str, ...]
    field: str


def doubtful_labels(outcome: Outcome, below: float = 0.5) -> list[DoubtfulLabel]:
    """Labels that are right with less than `below`, the most doubtful first."""
    found = []
    for decision in outcome.decisions:
        answers = decision.candidates.answers
        for index, answer in enumerate(answers):
            if answer.source != LABEL or decision.right(index) >= below:
                continue
            best = max(range(len(decision.posterior)), key=decision.posterior.__getitem__)
            believed = decision.posterior[best] >= KEEP
            saying = [a for a, group in zip(answers, decision.groups, strict=True) if group == best] if believed else []
            found.append(
                DoubtfulLabel(
                    decision.candidates.prompt,
                    answer.text,
                    decision.right(index),
                    saying[0].text if saying else None,
                    tuple(a.source for a in saying),
                    decision.field,
                )
            )
    return sorted(found, key=lambda one: (one.right, one.prompt.sample.key))


def _right(decision: Decision, answer: Answer) -> float:
    return decision.right(decision.candidates.answers.index(answer))


def _row(decision: Decision, sides: dict[str, Answer]) -> Row:
    sample = decision.candidates.prompt.sample
    messages = sample.messages
    alone = len(messages) == 1 and messages[0].role == "user" and not messages[0].fields
    row: Row = {
        "prompt": messages[0].content if alone else sample.turns,
        **{side: answer.text for side, answer in sides.items()},
    }
    if sample.skill:
        row["skill"] = sample.skill
    row["provenance"] = {
        "prompt": sample.key,
        **{
            side: {
                "source": answer.source,
                "right": round(_right(decision, answer), 6),
                **({"fingerprint": answer.fingerprint} if answer.fingerprint else {}),
            }
            for side, answer in sides.items()
        },
    }
    return row
