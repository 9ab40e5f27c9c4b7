"""Evaluation on held-out items: exact match per skill by greedy generation, and bits per byte.

Bits per byte is the negative log2-likelihood of the responses (end-of-turn included) over their UTF-8 bytes: models
with different tokenizers can be compared by it.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import ray

from rayfuse import cluster
from rayfuse.config import Benchmark, Config, Data, Teacher
from rayfuse.config.run import as_teacher
from rayfuse.data.rows import read_samples
from rayfuse.data.sample import Sample
from rayfuse.evaluation.scores import SCORES
from rayfuse.teachers import BACKENDS, Backend


@dataclass(frozen=True)
class Accuracy:
    """Right answers among the items of one skill."""

    right: int
    total: int

    @property
    def share(self) -> float:
        """Right answers over all."""
        return self.right / self.total

    @property
    def interval(self) -> tuple[float, float]:
        """95% Wilson interval of the share."""
        z, n, p = 1.959964, self.total, self.share
        middle = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return max(0.0, middle - half), min(1.0, middle + half)


@dataclass(frozen=True)
class Evaluation:
    """What one model did on the items.

    Attributes:
        name: the model's name in tables.
        role: "teacher", "pivot" or "stage".
        bits_per_byte: over all items, with a 95% bootstrap interval.
        accuracy: per skill; empty where nothing was generated.
    """

    name: str
    role: str
    bits_per_byte: float
    bits_per_byte_interval: tuple[float, float]
    accuracy: dict[str, Accuracy] = field(default_factory=dict)

    @property
    def overall(self) -> Accuracy | None:
        """All skills together."""
        if not self.accuracy:
            return None
        skills = self.accuracy.values()
        return Accuracy(sum(skill.right for skill in skills), sum(skill.total for skill in skills))

    def as_dict(self) -> dict[str, Any]:
        """For results.json."""
        overall = self.overall
        scores = {**self.accuracy, **({"all": overall} if overall else {})}
        return {
            "name": self.name,
            "role": self.role,
            "bits_per_byte": self.bits_per_byte,
            "bits_per_byte_interval": list(self.bits_per_byte_interval),
            "accuracy": {
                skill: {"right": a.right, "total": a.total, "share": a.share, "interval": list(a.interval)}
                for skill, a in scores.items()
            },
        }


def read_items(benchmark: Benchmark) -> list[Sample]:
    """The held-out items, in the file's order.

    Raises:
        DataError: they cannot be read, or one is malformed.
    """
    samples, _ = read_samples(Data(path=benchmark.path, limit=benchmark.limit, columns=benchmark.columns))
    return samples


def evaluate(model: Teacher, role: str, items: Sequence[Sample], benchmark: Benchmark) -> Evaluation:
    """Evaluate one model on all items.

    Args:
        model: what to load or ask, through its own backend.
        role: "teacher", "pivot" or "stage".
        items: the held-out items.
        benchmark: how to generate and score.
    """
    backend = BACKENDS[model.backend](model, 2)
    try:
        bits, right = measure_items(backend, items, benchmark)
    finally:
        backend.close()
    size = np.array([len(item.response.encode()) for item in items], dtype=np.float64)
    accuracy: dict[str, Accuracy] = {}
    if right:
        for skill in sorted({item.skill for item in items}):
            skill_right = [ok for ok, item in zip(right, items, strict=True) if item.skill == skill]
            accuracy[skill or "all items"] = Accuracy(sum(skill_right), len(skill_right))
    return Evaluation(model.name, role, float(bits.sum() / size.sum()), _bootstrap(bits, size), accuracy)


def measure_items(backend: Backend, items: Sequence[Sample], benchmark: Benchmark) -> tuple[np.ndarray, list[bool]]:
    """Of each item: the bits of its response under the model, float64 [items], and whether the answer is right.

    Nothing is generated where the benchmark says so; the second is then empty.
    """
    signals = [s for i in range(0, len(items), 64) for s in backend.score(items[i : i + 64])]
    bits = np.array([-float(s.token_logps.sum(dtype=np.float64)) / math.log(2) for s in signals])
    if not benchmark.generate:
        return bits, []
    score = SCORES[benchmark.score]
    answers = backend.generate(items, max_new_tokens=benchmark.max_new_tokens, batch_size=benchmark.batch_size)
    return bits, [score(answer, item.response) for answer, item in zip(answers, items, strict=True)]


def _bootstrap(bits: np.ndarray, size: np.ndarray, draws: int = 1000) -> tuple[float, float]:
    """95% interval of sum(bits) / sum(size) over resampled items."""
    chooser = np.random.default_rng(random.Random("rayfuse").getrandbits(32))
    picks = chooser.integers(0, len(bits), (draws, len(bits)))
    low, high = np.quantile(bits[picks].sum(1) / size[picks].sum(1), [0.025, 0.975])
    return float(low), float(high)


@ray.remote
def evaluate_model(model: Teacher, role: str, items: list[Sample], benchmark: Benchmark) -> dict[str, Any]:
    """`evaluate` as a Ray task."""
    return evaluate(model, role, items, benchmark).as_dict()


def stage_names(config: Config) -> list[str]:
    """What tables call the stages' models: the method, with the number where two stages have the same one.

    Where some stages learn the rows as they are and others what the consensus chose, those are called `experts`.
    """
    mixed = len({config.learns_chosen(stage) for stage in config.stages}) > 1
    names = []
    for stage in config.stages:
        chosen = mixed and config.learns_chosen(stage)
        names.append(("experts" if stage.method == "sft" else f"{stage.method}-experts") if chosen else stage.method)
    numbers = [config.stage_folder(index).name.partition("-")[0] for index in range(len(names))]
    return [name if names.count(name) == 1 else f"{number}-{name}" for name, number in zip(names, numbers, strict=True)]


def evaluate_all(config: Config) -> list[dict[str, Any]]:
    """Evaluate teachers, pivot and every stage's model on the same items, in parallel tasks."""
    benchmark = config.evaluate
    assert benchmark is not None
    items = read_items(benchmark)
    models = [(teacher, "teacher") for teacher in config.teachers if benchmark.teachers and teacher.stored is None]
    models.append((as_teacher(config, "pivot"), "pivot"))
    for index, name in enumerate(stage_names(config)):
        models.append((as_teacher(config, name, str(config.stage_folder(index) / "model")), "stage"))
    shared = ray.put(items)
    tasks = [
        evaluate_model.options(**cluster.evaluate_task(model)).remote(model, role, shared, benchmark)
        for model, role in models
    ]
    done: list[dict[str, Any]] = ray.get(tasks)
    return done
