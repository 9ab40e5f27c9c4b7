"""Recipes: what one line of YAML stands for. A key that the file writes itself is used as it is written."""

from __future__ import annotations

from typing import Any

EXPERTS: dict[str, Any] = {"consensus": {}, "stages": ["sft"]}
"""Find out who is right, and learn that: docs/consensus.md."""

PAPERS: dict[str, Any] = {
    "signals": {"k": 10},
    "stages": [
        {"method": "infifusion", "standardized": True, "over_teachers": "sum", "alignment": "bytes"},
        {"method": "infigfusion", "standardized": True, "over_teachers": "sum", "alignment": "bytes", "mode": "closed"},
        {
            "method": "infifpo",
            "variant": "fpo",
            "rule": "max_margin",
            "clip": True,
            "length_norm": True,
            "beta": 2.5,
            "learning_rate": 1e-7,
            "epochs": 1,
            "batch_size": 128,
            "warmup": 0.1,
        },
    ],
}
"""The three papers one after another, with what they publish (docs/papers.md): top 10, z-scores, the sum over the
teachers (arXiv 2501.02795), the closed form of the graph distance (arXiv 2505.13893), and InfiFPO's settings (arXiv
2505.13878, with length normalisation). What they do not publish, lam, alpha, rate, batch and epochs of the first two,
is a stage's default."""

RECIPES = {"experts": EXPERTS, "papers": PAPERS}
"""By the name that `recipe` has."""
