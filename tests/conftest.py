"""A tiny world for tests: untrained models with four different tokenizers and chat templates, and three data files."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Beside other tests Ray's processes, which are nicer than others by default, would wait for all of them.
os.environ.setdefault("RAY_worker_niceness", "0")

import pytest
from hypothesis import settings

from rayfuse import cluster
from rayfuse.config import parse_config
from rayfuse.quickstart.skills import make
from rayfuse.quickstart.tiny_models import STYLES, make_model, make_tokenizer, save

settings.register_profile("rayfuse", deadline=None)  # a busy machine must not fail a test
settings.load_profile("rayfuse")


@dataclass(frozen=True)
class TinyWorld:
    """Paths of a tiny world."""

    root: Path

    def model(self, name: str) -> str:
        """The folder of one of math, code, instruct, pivot."""
        return str(self.root / name)

    def tree(self, output: Path, **changes: Any) -> dict[str, Any]:
        """A configuration with short stages, as the YAML file would hold it."""
        tree: dict[str, Any] = {
            "student": {"model": self.model("pivot")},
            "teachers": [
                {"model": self.model(name), "dtype": "float32", "cpus": 1, "replicas": {"idle_s": 5}, "parity": False}
                for name in ("math", "code")
            ],
            "data": {"path": str(self.root / "train.jsonl"), "unit_size": 8, "max_length": 200},
            "stages": [{"method": "infifusion", "steps": 4, "batch_size": 16, "learning_rate": 1e-3}],
            "output": str(output),
            "signals": {"k": 5},
        }
        return {**tree, **changes}


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    """The tiny world, made once."""
    root = tmp_path_factory.mktemp("tiny")
    rows = [row for skill in ("math", "code", "instruct") for row in make(skill, 40, seed=1)]
    texts = [f"{row['prompt']} {row['response']}" for row in rows]
    for seed, (name, style) in enumerate(STYLES.items()):
        tokenizer = make_tokenizer(style, texts)
        save(make_model(tokenizer, seed, hidden=32, layers=1), tokenizer, root / name)
    pairs = [
        {"prompt": row["prompt"], "chosen": row["response"], "rejected": f"{row['response'][::-1]} no"} for row in rows
    ]
    for name, part in (("train", rows), ("eval", rows[::5]), ("pairs", pairs)):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
    return TinyWorld(root)


@pytest.fixture(scope="module")
def embedded_ray(tiny: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One embedded Ray for all runs of a module, which share its processes; it ends with the module."""
    student = {"model": tiny.model("pivot"), "cpus": 4}
    cluster.connect(parse_config(tiny.tree(tmp_path_factory.mktemp("ray"), student=student)))
    yield
    cluster.end_embedded()
