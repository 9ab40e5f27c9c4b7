"""Who is right where answers cannot be compared: every source scores every candidate, in place of claiming one.

Source s gives candidate c of a prompt the log-probability l_s(c) of its whole text, end of turn included, and so
q_s = softmax over the candidates of temper_s * l_s. It is reliable on this prompt with probability a[s,c,b] (cluster,
and bin of the certainty of its own answer, as in `reliability`), else it knows nothing:

    log p(t) = sum over s of log( a q_s(t) + (1 - a) / |C| )
             + sum over labels of log r where the label is t, log((1 - r) / (|C| - 1)) else,  r = max(rho, 1 / |C|)

    a from the posterior's share of a q / (a q + (1 - a) / |C|), smoothed as in `reliability`; rho as there;
    temper_s, where it is learnt, from TEMPERS by the largest expected log-likelihood

There is no "none of them": the candidates of a prompt always add up to 1. Equal texts are one candidate, and answers
that an equivalence finds equal are one too (its score: the sum of their probabilities). Candidates that only look
different share their support, so that the accuracy of labels is underestimated where all texts are free; r keeps a
label from counting against its own text for that reason.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rayfuse.consensus.candidates import LABEL, Candidates
from rayfuse.consensus.equivalence import Grouping
from rayfuse.consensus.reliability import (
    BINS,
    SETTLED,
    UNKNOWN,
    UNKNOWN_BIN,
    Claims,
    Prior,
    claims_of,
    prior_accuracy,
    smoothed,
)

TEMPERS = (1.0, 0.5, 0.25, 0.1, 0.05, 0.02, 0.01)
"""What a learnt temper is chosen from: likelihoods of long texts are sharper than what their authors know."""

Scores = Mapping[tuple[str, str], float]
"""Of one prompt: (source, text) -> log-probability of the whole text in nats, end of turn included."""


@dataclass(frozen=True)
class ScoredFit:
    """What the EM over scores has found, of G candidate groups, P prompts and S models.

    Attributes:
        posterior: p(right) of each group [G], adding up to 1 in each prompt.
        reliable: p(the model is reliable) on each prompt [P, S]; 0 where it does not score all groups.
        models: names of the models, in the columns' order.
        accuracy: a[s,c,b], [S, C, BINS].
        label: rho; NaN without labels.
        temper: of each model [S].
        agreement: share of the prompts with two answers or more in which two sources put the same one first.
    """

    posterior: np.ndarray
    reliable: np.ndarray
    models: tuple[str, ...]
    accuracy: np.ndarray
    label: float
    temper: np.ndarray
    agreement: float

    def hits(self, claims: Claims) -> np.ndarray:
        """p(right) of each claim [N]; a model's is how reliable it is there: others say the same in other words."""
        column = {claims.sources.index(name): s for s, name in enumerate(self.models)}
        hit = self.posterior[claims.group].copy()
        own = ~claims.is_label
        hit[own] = self.reliable[claims.prompt[own], [column[int(s)] for s in claims.source[own]]]
        return hit

    def of_prompt(self, index: int) -> dict[str, float]:
        """How reliable each model is on one prompt."""
        return dict(zip(self.models, self.reliable[index].tolist(), strict=True))


class _Scored:
    """Scores as arrays, and the steps of the EM over them.

    A model says nothing to a prompt of whose groups it does not score all: half a comparison favours what it scored.
    """

    def __init__(
        self, claims: Claims, candidates: Sequence[Candidates], groupings: Sequence[Grouping], scores: Sequence[Scores]
    ) -> None:
        self.claims = claims
        self.models = np.array([s for s, name in enumerate(claims.sources) if name != LABEL], dtype=np.int64)
        P, G, S = len(candidates), len(claims.group_prompt), len(self.models)
        self.of_group = claims.group_prompt
        self.size_P = np.bincount(self.of_group, minlength=P)
        self.scores_GS = np.full((G, S), -np.inf)
        first = 0
        for one, grouping, of_prompt in zip(candidates, groupings, scores, strict=True):
            texts = [answer.text for answer in one.answers]
            for text, group in dict.fromkeys(zip(texts, grouping.groups, strict=True)):
                for column, s in enumerate(self.models):
                    value = of_prompt.get((claims.sources[s], text), -np.inf)
                    there = self.scores_GS[first + group, column]
                    self.scores_GS[first + group, column] = np.logaddexp(there, value)
            first += grouping.count
        missing_PS = np.zeros((P, S))
        np.add.at(missing_PS, self.of_group, ~np.isfinite(self.scores_GS))
        self.says_PS = (missing_PS == 0) & (self.size_P[:, None] > 0)
        self.bin_PS = np.full((P, S), UNKNOWN_BIN)
        own = ~claims.is_label
        self.bin_PS[claims.prompt[own], np.searchsorted(self.models, claims.source[own])] = claims.bin[own]

    def shares(self, temper_S: np.ndarray) -> np.ndarray:
        """q, the softmax over each prompt's groups [G, S]."""
        scaled_GS = np.where(self.says_PS[self.of_group], self.scores_GS, 0.0) * temper_S
        best_PS = np.full(self.says_PS.shape, -np.inf)
        np.maximum.at(best_PS, self.of_group, scaled_GS)
        mass_GS = np.exp(scaled_GS - best_PS[self.of_group])
        total_PS = np.zeros(self.says_PS.shape)
        np.add.at(total_PS, self.of_group, mass_GS)
        return mass_GS / total_PS[self.of_group]

    def mixture(self, accuracy: np.ndarray, q_GS: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """a q, and a q + (1 - a) / |C| [G, S]."""
        a_PS = accuracy[self.models[None, :], self.claims.cluster[:, None], self.bin_PS]
        a_GS = np.clip(a_PS, 1e-6, 1 - 1e-6)[self.of_group]
        knows_GS = a_GS * q_GS
        return knows_GS, knows_GS + (1 - a_GS) / self.size_P[self.of_group, None]

    def expect(self, accuracy: np.ndarray, q_GS: np.ndarray, rho: float) -> tuple[np.ndarray, np.ndarray]:
        """Posterior of each group [G], and of each model's being reliable [P, S]."""
        knows_GS, both_GS = self.mixture(accuracy, q_GS)
        score = (np.log(both_GS) * self.says_PS[self.of_group]).sum(1) + self._labels(rho)
        best = np.full(len(self.size_P), -np.inf)
        np.maximum.at(best, self.of_group, score)
        mass = np.exp(score - best[self.of_group])
        posterior = mass / np.bincount(self.of_group, mass, minlength=len(best))[self.of_group]
        known = self.claims.known[self.of_group]
        posterior = np.where(known == UNKNOWN, posterior, np.arange(len(posterior)) == known)
        reliable_PS = np.zeros(self.says_PS.shape)
        np.add.at(reliable_PS, self.of_group, posterior[:, None] * knows_GS / both_GS)
        return posterior, reliable_PS * self.says_PS

    def _labels(self, rho: float) -> np.ndarray:
        """What the labels add to the log-probability of each group [G]."""
        claims, labels = self.claims, self.claims.is_label
        here = np.bincount(claims.group[labels], minlength=len(self.of_group))
        elsewhere = np.bincount(claims.prompt[labels], minlength=len(self.size_P))[self.of_group] - here
        size = self.size_P[self.of_group]
        right = np.clip(np.maximum(rho, 1 / size), 1e-6, 1 - 1e-6)
        return here * np.log(right) + elsewhere * np.log((1 - right) / np.maximum(size - 1, 1))

    def agreement(self, q_GS: np.ndarray) -> float:
        """Share of the prompts in which two sources put the same group first: models by score, labels by saying it."""
        claims, P = self.claims, len(self.size_P)
        best_PS = np.zeros(self.says_PS.shape)
        np.maximum.at(best_PS, self.of_group, q_GS)
        votes = ((q_GS == best_PS[self.of_group]) & self.says_PS[self.of_group]).sum(1)
        votes += np.bincount(claims.group[claims.is_label], minlength=len(self.of_group))
        agreed = np.zeros(P, dtype=bool)
        np.logical_or.at(agreed, self.of_group, votes > 1)
        several = np.bincount(claims.prompt, minlength=P) > 1
        return float(agreed[several].mean()) if several.any() else 0.0

    def accuracy(self, reliable_PS: np.ndarray, start_SB: np.ndarray, prior: Prior) -> np.ndarray:
        """a[s,c,b] from how reliable each model was on each prompt."""
        shape = (len(self.claims.sources), int(self.claims.cluster.max(initial=0)) + 1, BINS)
        hits, n = np.zeros(shape), np.zeros(shape)
        for column, s in enumerate(self.models):
            there = self.says_PS[:, column]
            where = (s, self.claims.cluster[there], self.bin_PS[there, column])
            np.add.at(hits, where, reliable_PS[there, column])
            np.add.at(n, where, 1.0)
        return smoothed(hits, n, start_SB, prior)

    def tempers(self, accuracy: np.ndarray, posterior: np.ndarray) -> np.ndarray:
        """For each model the temper under which what is believed is likeliest [S]."""
        gains = []
        for temper in TEMPERS:
            _, both_GS = self.mixture(accuracy, self.shares(np.full(len(self.models), temper)))
            gains.append((posterior[:, None] * np.log(both_GS) * self.says_PS[self.of_group]).sum(0))
        return np.array(TEMPERS)[np.argmax(np.array(gains), axis=0)]


def fit_scores(
    candidates: Sequence[Candidates],
    groupings: Sequence[Grouping],
    scores: Sequence[Scores],
    clusters: Sequence[int] | np.ndarray,
    *,
    temper: float | None = 1.0,
    prior: Prior | None = None,
) -> ScoredFit:
    """Find who is right from scores.

    Args:
        candidates, groupings: of each prompt.
        scores: of each prompt.
        clusters: cluster of each prompt, from 0.
        temper: of all models; None: learnt for each.
        prior: as of `fit`.
    """
    prior = prior or Prior()
    claims = claims_of(candidates, groupings, clusters)
    scored = _Scored(claims, candidates, groupings, scores)
    start_SB = prior_accuracy(claims, prior)
    accuracy = np.repeat(start_SB[:, None], int(claims.cluster.max(initial=0)) + 1, axis=1)
    rho, temper_S = prior.label, np.full(len(scored.models), 1.0 if temper is None else temper)
    posterior, reliable_PS = scored.expect(accuracy, scored.shares(temper_S), rho)
    for _ in range(prior.rounds):
        accuracy = scored.accuracy(reliable_PS, start_SB, prior)
        hits = posterior[claims.group[claims.is_label]]
        rho = float((hits.sum() + prior.strength * prior.label) / (len(hits) + prior.strength))
        if temper is None:
            temper_S = scored.tempers(accuracy, posterior)
        before = posterior
        posterior, reliable_PS = scored.expect(accuracy, scored.shares(temper_S), rho)
        if np.abs(posterior - before).max(initial=0.0) < SETTLED:
            break
    names = tuple(claims.sources[s] for s in scored.models)
    label = rho if LABEL in claims.sources else float("nan")
    agreement = scored.agreement(scored.shares(temper_S))
    return ScoredFit(posterior, reliable_PS, names, accuracy[scored.models], label, temper_S, agreement)
