"""Record what crowd-kit's aggregators say of simulated claims: crowdkit.json, an oracle for the tests.

    pip install crowd-kit==1.4.2
    python tests/consensus/record_crowdkit.py

Six workers of accuracies 0.9 to 0.4 answer 200 tasks of ten classes, each wrong answer drawn by itself: there
certainties, clusters and shared mistakes have nothing to say, and one-coin Dawid-Skene is the same model as ours.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

CLASSES = 10
TEXTS = CLASSES - 1
ACCURACIES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4)


def simulated_rows(seed: int) -> list[tuple[str, str, str]]:
    """(task, worker, label) of every worker and task."""
    draw = np.random.default_rng(seed)
    rows = []
    for task in range(200):
        truth = int(draw.integers(CLASSES))
        for worker, accuracy in enumerate(ACCURACIES):
            wrong = (truth + int(draw.integers(1, CLASSES))) % CLASSES
            label = truth if draw.random() < accuracy else wrong
            rows.append((f"t{task:03d}", f"w{worker}", f"c{label}"))
    return rows


def answers_of_crowdkit(rows: list[tuple[str, str, str]]) -> dict[str, Any]:
    """Choices of four aggregators, and the posteriors and skills of one-coin Dawid-Skene."""
    import pandas as pd
    from crowdkit.aggregation import GLAD, MACE, DawidSkene, OneCoinDawidSkene

    frame = pd.DataFrame(rows, columns=["task", "worker", "label"])
    coin = OneCoinDawidSkene(n_iter=200, tol=0).fit(frame)
    models = {
        "one coin": coin.labels_,
        "dawid skene": DawidSkene(n_iter=100).fit_predict(frame),
        "glad": GLAD(n_iter=50, silent=True).fit_predict(frame),
        "mace": MACE(n_restarts=5, n_iter=50, random_state=0).fit_predict(frame),
    }
    return {
        "one coin skills": {worker: float(skill) for worker, skill in coin.skills_.items()},
        "one coin posteriors": {
            str(task): {str(label): round(float(p), 6) for label, p in of.items() if p > 1e-6}
            for task, of in coin.probas_.T.items()
        },
        "choices": {name: {str(t): str(label) for t, label in labels.items()} for name, labels in models.items()},
    }


if __name__ == "__main__":
    recorded = simulated_rows(0)
    content = {"texts": TEXTS, "rows": recorded, **answers_of_crowdkit(recorded)}
    Path(__file__).with_name("crowdkit.json").write_text(json.dumps(content, separators=(",", ":")) + "\n")
