"""A judge without a model: scores of sampled responses are how probably they are right, by the consensus of all.

Where a source answers a prompt several times, its claim is what most of its samples say, and their share stands for
certainty:

    g_s = argmax_g n(s, g)        l_s = log( n(s, g_s) / SUM_g n(s, g) )        n(s, g): samples of source s in group g

The accuracy of a source at each share, and in each field, is learnt as ever (reliability.py). What no source says most
of the time has probability 0. (A claim for every different answer of a source was tried and is wrong: a claim that few
of its samples make counts against an answer that others give too.)
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from rayfuse.consensus.candidates import LABEL, Answer, Candidates
from rayfuse.consensus.clusters import MOST
from rayfuse.consensus.equivalence import Grouping, Judge, choose, groupings_of
from rayfuse.consensus.outcome import Outcome, decide
from rayfuse.data.prompts import Prompt
from rayfuse.errors import DataError


@dataclass(frozen=True)
class Sampled:
    """All responses to one prompt that can be learnt from.

    Attributes:
        prompt: what was asked, with its label where it has one.
        responses: (name of the model, text), every sample.
    """

    prompt: Prompt
    responses: Sequence[tuple[str, str]]


def posteriors(
    sampled: Sequence[Sampled], equivalence: str, judge: Judge | None = None, most_clusters: int = MOST
) -> tuple[list[dict[str, float]], Outcome]:
    """p(right) of each different text of each prompt, and the outcome that it comes from.

    Args:
        sampled: of each prompt.
        equivalence: exact, final, tests or auto.
        judge: runs unit tests, where the equivalence comes out as "tests".
        most_clusters: fields to find at most where the data name none.

    Raises:
        DataError: the responses cannot be compared, or too little is known to tell right from wrong; with the number.
    """
    whole = [_candidates(one) for one in sampled]
    chosen = choose(equivalence, whole)
    if chosen.name == "none":
        raise DataError(
            f"the consensus cannot judge these responses: {chosen.reason}, so that nobody can tell which say the same; "
            "set prefer.judge.equivalence, or another judge (reward_model)"
        )
    groupings = groupings_of(chosen.name, whole, judge)
    claims = [_claims(one, grouping) for one, grouping in zip(whole, groupings, strict=True)]
    outcome = decide(claims, equivalence=chosen.name, judge=judge, most_clusters=most_clusters)
    if outcome.fell_back:
        raise DataError(f"the consensus cannot judge these responses: {_reasons(outcome)}; set another prefer.judge")
    found = []
    for one, grouping, decision in zip(whole, groupings, outcome.decisions, strict=True):
        right = {answer.text: decision.right(index) for index, answer in enumerate(decision.candidates.answers)}
        first = _firsts(one, grouping)
        groups = zip(one.answers, grouping.groups, strict=True)
        found.append({answer.text: right.get(first[group], 0.0) for answer, group in groups})
    return found, outcome


def _candidates(sampled: Sampled) -> Candidates:
    label = sampled.prompt.response or sampled.prompt.answer
    answers = [Answer(LABEL, label)] if label else []
    return Candidates(sampled.prompt, (*answers, *(Answer(source, text) for source, text in sampled.responses)))


def _firsts(one: Candidates, grouping: Grouping) -> dict[int, str]:
    """The text that stands for each group: the first of it."""
    firsts: dict[int, str] = {}
    for answer, group in zip(one.answers, grouping.groups, strict=True):
        firsts.setdefault(group, answer.text)
    return firsts


def _claims(one: Candidates, grouping: Grouping) -> Candidates:
    """Each source's most frequent answer, with the log of its share as certainty; of equally frequent ones the least
    text, which depends on no order."""
    firsts = _firsts(one, grouping)
    answers = []
    for source in dict.fromkeys(answer.source for answer in one.answers):
        said = Counter(g for answer, g in zip(one.answers, grouping.groups, strict=True) if answer.source == source)
        most = min(said, key=lambda group: (-said[group], firsts[group]))
        certainty = None if source == LABEL else math.log(said[most] / said.total())
        answers.append(Answer(source, firsts[most], certainty))
    return Candidates(one.prompt, tuple(answers))


def _reasons(outcome: Outcome) -> str:
    return "; ".join(finding.text.split(": labels are")[0] for finding in outcome.findings if finding.falls_back)
