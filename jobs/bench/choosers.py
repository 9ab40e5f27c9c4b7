"""Other ways to choose among the answers to a prompt, to compare the reliability model with; pure functions.

Each takes the candidates of all prompts and gives a text per prompt, or None where it has none. Answers are the same
where their stripped texts are.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

import numpy as np

from rayfuse.consensus.candidates import LABEL, PIVOT, Answer, Candidates

Texts = list[str | None]


def of_teachers(one: Candidates) -> list[Answer]:
    """The teachers' own answers."""
    return [answer for answer in one.answers if answer.source not in (LABEL, PIVOT)]


def majority(asked: Sequence[Candidates], *, everybody: bool = False) -> Texts:
    """The text that most teachers (or all sources, label and pivot too) give; the surest one's among equals."""
    chosen: Texts = []
    for one in asked:
        answers = one.answers if everybody else of_teachers(one)
        votes = Counter(answer.text.strip() for answer in answers)
        best = max(answers, key=lambda a: (votes[a.text.strip()], _certainty(a), a.source), default=None)
        chosen.append(best and best.text)
    return chosen


def surest(asked: Sequence[Candidates]) -> Texts:
    """The answer of the teacher with the highest mean log-probability of its own answer."""
    best = (max(of_teachers(one), key=lambda a: (_certainty(a), a.source), default=None) for one in asked)
    return [answer and answer.text for answer in best]


def at_random(asked: Sequence[Candidates], seed: int = 0) -> Texts:
    """A teacher's answer, drawn for each prompt."""
    draw = Random(seed)
    drawn = (draw.choice(answers) if (answers := of_teachers(one)) else None for one in asked)
    return [answer and answer.text for answer in drawn]


def oracle(asked: Sequence[Candidates], truth: Sequence[str]) -> Texts:
    """The best possible routing: a teacher's answer that is right, where there is one; else the surest teacher's."""
    return [
        next((a.text for a in of_teachers(one) if a.text.strip() == text.strip()), fallback)
        for one, text, fallback in zip(asked, truth, surest(asked), strict=True)
    ]


def router(asked: Sequence[Candidates], seed: int = 0) -> Texts:
    """A learnt router, by the prompt alone: the likeliest of the teachers to agree with a label answers.

    Per teacher a logistic regression on the prompt's character n-grams, learnt from the prompts with a label. All None
    without labels.
    """
    from sklearn.feature_extraction.text import HashingVectorizer
    from sklearn.linear_model import LogisticRegression

    vectors = HashingVectorizer(analyzer="char_wb", ngram_range=(2, 4), n_features=1 << 14, alternate_sign=False)
    features = vectors.transform([one.prompt.sample.plain_text for one in asked])
    labelled = [index for index, one in enumerate(asked) if one.labels]
    names = sorted({answer.source for one in asked for answer in of_teachers(one)})
    chances = {}
    for name in names if labelled else ():
        agrees = np.array([_agrees(asked[index], name) for index in labelled])
        if agrees.min() == agrees.max():  # nothing to learn: it always agrees, or never
            chances[name] = np.full(len(asked), float(agrees[0]))
            continue
        model = LogisticRegression(C=10.0, max_iter=200, random_state=seed).fit(features[labelled], agrees)
        chances[name] = model.predict_proba(features)[:, 1]
    chosen: Texts = []
    for index, one in enumerate(asked):
        answers = of_teachers(one) if labelled else []
        best = max(answers, key=lambda a: (chances[a.source][index], a.source), default=None)
        chosen.append(best and best.text)
    return chosen


def of_crowdkit(asked: Sequence[Candidates], name: str) -> Texts:
    """What an aggregator of crowd-kit chooses among the claims of all sources; it knows neither fields nor certainties.

    Classes are the different answers of a prompt, numbered in an order of their hashes: a text is no class that many
    prompts share, so the full Dawid-Skene with its table of confusions between classes does not apply.

    Args:
        asked: prompts with all answers.
        name: OneCoinDawidSkene, GLAD or MACE.
    """
    import crowdkit.aggregation
    import pandas as pd

    options: dict[str, dict[str, Any]] = {
        "OneCoinDawidSkene": {"n_iter": 30},
        "GLAD": {"n_iter": 30, "silent": True},
        "MACE": {"n_restarts": 3, "n_iter": 30, "random_state": 0},
    }
    texts = [_by_hash({answer.text.strip() for answer in one.answers}) for one in asked]
    claims = [
        (index, answer.source, texts[index].index(answer.text.strip()))
        for index, one in enumerate(asked)
        for answer in one.answers
    ]
    frame = pd.DataFrame(claims, columns=["task", "worker", "label"])
    labels = getattr(crowdkit.aggregation, name)(**options[name]).fit_predict(frame)
    return [texts[index][labels[index]] if index in labels else None for index in range(len(asked))]


PEERS: dict[str, Callable[[Sequence[Candidates]], Texts]] = {
    "random teacher": at_random,
    "majority of the teachers": majority,
    "majority of all sources": lambda asked: majority(asked, everybody=True),
    "surest teacher": surest,
    "learnt router": router,
    "crowd-kit one-coin Dawid-Skene": lambda asked: of_crowdkit(asked, "OneCoinDawidSkene"),
    "crowd-kit GLAD": lambda asked: of_crowdkit(asked, "GLAD"),
    "crowd-kit MACE": lambda asked: of_crowdkit(asked, "MACE"),
}
"""Every way that knows no truth, by its name."""


def share_right(chosen: Texts, truth: Sequence[str]) -> float:
    """Percent of all prompts whose chosen text is right; one without a text is not."""
    right = sum(text is not None and text.strip() == one.strip() for text, one in zip(chosen, truth, strict=True))
    return 100 * right / max(1, len(truth))


def _by_hash(texts: set[str]) -> list[str]:
    return sorted(texts, key=lambda text: hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest())


def _certainty(answer: Answer) -> float:
    return -np.inf if answer.certainty is None else answer.certainty


def _agrees(one: Candidates, name: str) -> bool:
    labels = {label.text.strip() for label in one.labels}
    return any(answer.text.strip() in labels for answer in one.answers if answer.source == name)
