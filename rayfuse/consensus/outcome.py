"""Outcome: the posterior of every prompt, and what it says of sources and data, with its faults named.

`decide` is the way from candidates to an outcome: groups of equal answers, clusters of prompts, EM, estimates.
Where the data cannot carry a reliability model the outcome says so with the number (`findings`), and falls back to what
was configured: labels as they are, teachers' own weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rayfuse.consensus.candidates import LABEL, PIVOT, Answer, Candidates
from rayfuse.consensus.clusters import MOST, Clusters, clusters_of
from rayfuse.consensus.equivalence import Chosen, Grouping, Judge, agreement, choose, groupings_of
from rayfuse.consensus.estimates import CalibrationRow, Estimate, calibration_of, estimates_of, wrong_labels
from rayfuse.consensus.reliability import Claims, Fit, Prior, claims_of, fit
from rayfuse.consensus.scored import ScoredFit, Scores, fit_scores

KEEP = 0.5
"""An answer is learnt from where it is right with at least this probability."""
LEAST_PROMPTS = 50
"""Fewer prompts with two answers or more teach nothing of the sources."""
LEAST_AGREEMENT = 0.05
"""Sources that agree in fewer prompts than this share do not answer the same questions, or cannot be compared."""
LEAST_RIGHT_LABELS = 0.1
"""Labels that are right less often than this are of another form than the answers, or wrong altogether."""


@dataclass(frozen=True)
class Finding:
    """Something that a reader of the result must know.

    Attributes:
        name: for programs, for example "few prompts".
        text: for people: what is so, with the number, and what is done about it.
        number: that number.
        falls_back: whether the reliability model is not used for it.
    """

    name: str
    text: str
    number: float
    falls_back: bool = False


@dataclass(frozen=True)
class Decision:
    """What is believed of one prompt.

    Attributes:
        candidates: the prompt and its answers.
        groups: of each answer: equal answers share one.
        posterior: p(right) of each group.
        none: p(no answer is right).
        field: the cluster's name.
        fallback: whether labels count as right and sources alike, whatever the posterior says.
        reliable: by source p(it knows what is right here), where sources score candidates; None where they claim.
    """

    candidates: Candidates
    groups: tuple[int, ...]
    posterior: tuple[float, ...]
    none: float
    field: str
    fallback: bool = False
    reliable: Mapping[str, float] | None = None

    def right(self, answer: int) -> float:
        """p(answer number `answer` is right)."""
        return self.posterior[self.groups[answer]]

    def chosen(self, keep: float = KEEP) -> Answer | None:
        """The answer to learn from: of the most probable group, where that has at least `keep`; else None.

        Its wording is the label's where a label agrees, else that of the surest model (the first by name among equals);
        an answer that cannot be learnt from (its fault) is passed over. Where the outcome falls back: the first label.
        """
        answers = self.candidates.answers
        if self.fallback:
            return next((answer for answer in answers if answer.source == LABEL and not answer.fault), None)
        if not self.posterior or max(self.posterior) < keep:
            return None
        best = int(np.argmax(self.posterior))
        among = [a for a, group in zip(answers, self.groups, strict=True) if group == best and not a.fault]
        return min(among, key=_wording, default=None)

    def said_like(self, answer: Answer) -> list[Answer]:
        """The answers that say the same and can be learnt from: the label first, then the surest model."""
        group = self.groups[self.candidates.answers.index(answer)]
        same = [a for a, g in zip(self.candidates.answers, self.groups, strict=True) if g == group and not a.fault]
        return sorted(same, key=_wording)

    def worst(self, than: Answer) -> Answer | None:
        """The answer that is least probably right, of another group than `than`; the pivot's own among equals.

        Its own mistakes are what a student must unlearn. None where all say the same.
        """
        answers = self.candidates.answers
        group = self.groups[answers.index(than)]
        others = [
            (self.right(index), answer.source != PIVOT, _wording(answer), index)
            for index, answer in enumerate(answers)
            if self.groups[index] != group and not answer.fault
        ]
        return answers[min(others)[3]] if others else None

    def weight(self, answer: int) -> float:
        """How much answer number `answer` counts as a sample: p(right); 1 where the outcome falls back."""
        return 1.0 if self.fallback else self.right(answer)

    def weights(self, sources: Sequence[str]) -> dict[str, float]:
        """p(the source's own answer to this prompt is right), of each of `sources`; 0 of one that says nothing.

        Where sources score candidates: p(the source is reliable here). Where the outcome falls back: 1 of each, as the
        papers' sum has it.
        """
        if self.fallback:
            return dict.fromkeys(sources, 1.0)
        if self.reliable is not None:
            return {source: self.reliable.get(source, 0.0) for source in sources}
        own = {answer.source: self.right(index) for index, answer in enumerate(self.candidates.answers)}
        return {source: own.get(source, 0.0) for source in sources}


def _wording(answer: Answer) -> tuple[bool, float, str, str]:
    certainty = -math.inf if answer.certainty is None else answer.certainty
    return answer.by_model, -certainty, answer.source, answer.text


@dataclass(frozen=True)
class Outcome:
    """Who is right, prompt by prompt, and what follows for sources and data.

    Attributes:
        decisions: of each prompt, in the data's order.
        equivalence: how answers were compared, and why so.
        clusters: names of the fields, and whether the data named them.
        estimates: of each source: over all, then by field.
        calibration: of each model's certainty, by bin.
        wrong_labels: estimated share of wrong labels with its interval; None without labels.
        shared_mistakes: delta; see reliability. None where sources score candidates.
        findings: what a reader must know; empty where all is well.
    """

    decisions: tuple[Decision, ...]
    equivalence: Chosen
    clusters: tuple[tuple[str, ...], bool]
    estimates: tuple[Estimate, ...]
    calibration: tuple[CalibrationRow, ...]
    wrong_labels: Estimate | None
    shared_mistakes: float | None
    findings: tuple[Finding, ...]

    @property
    def fell_back(self) -> bool:
        """Whether what was configured is used in place of the posteriors."""
        return any(finding.falls_back for finding in self.findings)


def decide(
    candidates: Sequence[Candidates],
    *,
    equivalence: str = "auto",
    judge: Judge | None = None,
    score: Callable[[Sequence[Candidates]], Sequence[Scores]] | None = None,
    most_clusters: int = MOST,
    silent: Sequence[str] = (),
    prior: Prior | None = None,
) -> Outcome:
    """Who is right.

    Args:
        candidates: all prompts with all answers.
        equivalence: exact, final, tests, none or auto.
        judge: runs unit tests, where the equivalence comes out as "tests".
        score: scores all answers of all prompts, where the equivalence is "none". Without it, and where "auto" comes
            out as "none", the outcome falls back.
        most_clusters: fields to find at most where the data name none.
        silent: sources that were configured and answer nothing (only stored signals, no generation).
        prior: of the EM.
    """
    chosen = choose(equivalence, candidates)
    groupings = groupings_of(chosen.name, candidates, judge)
    texts = [one.prompt.sample.plain_text for one in candidates]
    clusters = clusters_of(texts, [one.prompt.sample.skill for one in candidates], most_clusters)
    claims = claims_of(candidates, groupings, clusters.of_prompt)
    found: Fit | ScoredFit
    # Scores also choose among what nobody knows, so they are asked for by name: auto falls back where it finds none.
    if equivalence == "none" and score is not None:
        found = fit_scores(candidates, groupings, score(candidates), clusters.of_prompt, prior=prior)
        agree = found.agreement
    else:
        found, agree = fit(claims, prior), agreement(groupings)
    hit = found.posterior[claims.group]
    if isinstance(found, ScoredFit):
        hit = found.hits(claims)
    estimates = estimates_of(claims, hit, clusters)
    comparable = chosen.name != "none" or isinstance(found, ScoredFit)
    findings = _findings(candidates, groupings, agree, comparable, estimates, chosen, silent)
    return Outcome(
        _decisions(candidates, groupings, clusters, claims, found, any(one.falls_back for one in findings)),
        chosen,
        (clusters.names, clusters.given),
        estimates,
        calibration_of(claims, hit),
        wrong_labels(estimates),
        found.shared if isinstance(found, Fit) else None,
        findings,
    )


def _decisions(
    candidates: Sequence[Candidates],
    groupings: Sequence[Grouping],
    clusters: Clusters,
    claims: Claims,
    found: Fit | ScoredFit,
    fallback: bool,
) -> tuple[Decision, ...]:
    firsts = np.searchsorted(claims.group_prompt, np.arange(len(candidates) + 1))
    return tuple(
        Decision(
            one,
            grouping.groups,
            tuple(found.posterior[firsts[index] : firsts[index + 1]].tolist()),
            max(0.0, 1.0 - float(found.posterior[firsts[index] : firsts[index + 1]].sum())),
            clusters.names[int(clusters.of_prompt[index])],
            fallback,
            found.of_prompt(index) if isinstance(found, ScoredFit) else None,
        )
        for index, (one, grouping) in enumerate(zip(candidates, groupings, strict=True))
    )


def _findings(
    candidates: Sequence[Candidates],
    groupings: Sequence[Grouping],
    agree: float,
    comparable: bool,
    estimates: Sequence[Estimate],
    chosen: Chosen,
    silent: Sequence[str],
) -> tuple[Finding, ...]:
    back = "labels are learnt as they are, and teachers count as configured"
    findings = [
        Finding("silent source", f"{name} gives no answers of its own: it is no candidate, and its weight is 0", 0.0)
        for name in silent
    ]
    compared = sum(len(one.answers) > 1 for one in candidates)
    known = sum(one.trusted for one in candidates) + sum(grouping.right is not None for grouping in groupings)
    if compared < LEAST_PROMPTS and known < len(candidates):
        text = f"only {compared} prompts have two answers or more; {LEAST_PROMPTS} are needed to learn who is right"
        findings.append(Finding("few prompts", f"{text}: {back}", compared, True))
    elif not comparable or (agree < LEAST_AGREEMENT and not known):
        text = (
            f"answers to a prompt agree in {agree:.1%} of the prompts (equivalence {chosen.name}: {chosen.reason}): "
            "either the sources know nothing of these prompts, or their answers cannot be compared this way (for free "
            "text set consensus.equivalence to none: then every model scores every answer)"
        )
        findings.append(Finding("no agreement", f"{text}; {back}", agree, True))
    label = next((one for one in estimates if one.source == LABEL and not one.field), None)
    if label is not None and chosen.name == "none" and comparable:
        text = (
            f"answers cannot be compared ({chosen.reason}): a right label in other words than the right answer counts "
            f"as wrong, so that {1 - label.right:.0%} of wrong labels is an upper bound"
        )
        findings.append(Finding("free text", text, 1 - label.right))
    elif label is not None and label.right < LEAST_RIGHT_LABELS and not findings[len(silent) :]:
        text = (
            f"{1 - label.right:.0%} of {label.answers} labels seem to be wrong: more likely labels and answers are "
            "of different forms (set the equivalence), or the models share a mistake"
        )
        findings.append(Finding("labels wrong", f"{text}; {back}", 1 - label.right, True))
    return tuple(findings)
