"""On-policy against off-policy where answers are long: at equal steps, and at equal processor time.

    python jobs/bench/onpolicy.py --cache /tmp/journeys --seeds 0 1

The world of journeys (quickstart/journeys.py), its three experts and its pivot; the real loss, targets, generator and
engine in this process on one core: no Ray. Off-policy is fine-tuning on the experts' own answers, each prompt's text by
its field's expert; on-policy begins with half of those steps and goes on with the student's own texts, read by the same
expert. One line per case: held-out journeys that are right as a whole, single stops that are right, processor seconds.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch

from rayfuse.config import Config, parse_config
from rayfuse.data.rows import read_samples
from rayfuse.data.sample import Sample
from rayfuse.prepare.preparer import Preparer
from rayfuse.prepare.spec import PrepareSpec
from rayfuse.quickstart import tiny_models
from rayfuse.quickstart.journeys_world import build_journeys_world
from rayfuse.quickstart.world import World
from rayfuse.student.engines import DDPEngine
from rayfuse.student.gradients import accumulate
from rayfuse.student.loop import learning_rate
from rayfuse.student.rollouts import OwnWeights, Sampling, own_samples, rollout_of, step_seed
from rayfuse.teachers.identity import IdentifiedTeacher
from rayfuse.teachers.transformers import TransformersTeacher

UNIT, UNITS = 16, 2
LONGEST = 40
OWN: dict[str, dict[str, Any]] = {
    "jsd, half of the texts": {"divergence": "jsd", "share": 0.5},
    "jsd, all texts": {"divergence": "jsd", "share": 1.0},
    "reverse, all texts": {"divergence": "reverse", "share": 1.0},
    "forward, all texts": {"divergence": "forward", "share": 1.0},
    "forward without the student's likely tokens": {"divergence": "forward", "share": 1.0, "likely": 0},
    "chunk advantage, all texts": {"divergence": "advantage", "share": 1.0},
    "jsd, prefix from 0.3": {"divergence": "jsd", "share": 1.0, "prefix": 0.3},
}


class Result(NamedTuple):
    """One student: percent of whole journeys and of single stops, processor seconds of its training."""

    whole: float
    stops: float
    seconds: float


class Bench:
    """A world, its models in this process, and students trained from its pivot."""

    def __init__(self, world: World, scratch: Path, seed: int, rate: float) -> None:
        self.world, self.scratch, self.seed, self.rate = world, scratch, seed, rate
        self.held_out = [json.loads(line) for line in world.evaluation.read_text(encoding="utf-8").splitlines()]
        self.config = self._config([{"method": "sft"}])
        self.samples, _ = read_samples(self.config.data)
        self.experts = {
            one.name: TransformersTeacher(one, self.config.signals.k) for one in self.config.teachers if one.name
        }
        self.texts = self._texts()
        self.spent: dict[str, float] = {}

    def _config(self, stages: list[dict[str, Any]]) -> Config:
        teachers = [
            {"model": str(path), "name": name, "dtype": "float32"} for name, path in self.world.teachers.items()
        ]
        common = {"batch_size": UNIT * UNITS, "learning_rate": self.rate, "warmup": 0.04}
        return parse_config(
            {
                "student": str(self.world.pivot),
                "teachers": teachers,
                "data": {"path": str(self.world.train), "max_length": 128, "unit_size": UNIT},
                "stages": [{**stage, **common} for stage in stages],
                "output": str(self.scratch),
                "seed": self.seed,
            }
        )

    def _texts(self) -> list[Sample]:
        """The prompts with their expert's own answers: what off-policy learns."""
        made = []
        for name, expert in self.experts.items():
            own = [one for one in self.samples if one.weights is not None and one.weights.only == name]
            answers = expert.generate(own, max_new_tokens=LONGEST, batch_size=64)
            made += [replace(one, response=text) for one, text in zip(own, answers, strict=True) if text]
        return made

    def student(self, name: str, stages: Sequence[tuple[dict[str, Any], int]]) -> Result:
        """Train the stages (settings, steps) one after another, from the pivot, and ask the held-out questions."""
        begun = time.process_time()
        engine: DDPEngine | None = None
        for settings, steps in stages:
            config = self._config([{**settings, "steps": steps}])
            engine = self._train(config, steps, engine)
        seconds = time.process_time() - begun
        assert engine is not None
        given = tiny_models.answers(engine.model, engine.tokenizer, [row["prompt"] for row in self.held_out])
        wanted = [row["response"] for row in self.held_out]
        whole = np.mean([one == other for one, other in zip(given, wanted, strict=True)])
        pairs = [
            one == other
            for text, right in zip(given, wanted, strict=True)
            for one, other in zip(text.split(", ") + [""] * 9, right.split(", "), strict=False)
        ]
        self.spent[name] = seconds
        return Result(100 * float(whole), 100 * float(np.mean(pairs)), seconds)

    def _train(self, config: Config, steps: int, before: DDPEngine | None) -> DDPEngine:
        """One stage, from the model before it."""
        (stage,) = config.stages
        torch.manual_seed(self.seed)
        engine = DDPEngine(config.student, config.student.model, stage, torch.device("cpu"))
        if before is not None:
            engine.model.load_state_dict(before.model.state_dict())
        spec = PrepareSpec(
            student=config.student,
            teachers=tuple(IdentifiedTeacher(one, str(one.name)) for one in config.teachers if stage.uses_teachers),
            store=str(self.scratch / "signals"),
            k=stage.kept(config.signals.k),
            alignment="bytes",
            max_length=config.data.max_length,
            targets=stage.targets,
            stage=stage,
        )
        prepare = Preparer(spec, lambda one: Here(self.experts[str(one.name)]))
        job: Any = SimpleNamespace(config=config, stage=stage, data=config.data, spec=spec)
        generator = OwnWeights(engine, job) if stage.writes else None
        draw, order = Random(self.seed), list(self.texts)
        for step in range(1, steps + 1):
            batches = []
            for unit in range(UNITS):
                if len(order) < UNIT:
                    order = list(self.texts)
                    draw.shuffle(order)
                samples, order = order[:UNIT], order[UNIT:]
                batches.append(prepare(self._own(stage, generator, samples, step, unit, steps)))
            accumulate(job, stage, engine, batches)
            engine.step(learning_rate(stage, step - 1, steps))
        return engine

    def _own(
        self, stage: Any, generator: OwnWeights | None, samples: list[Sample], step: int, unit: int, steps: int
    ) -> list[Sample]:
        """The samples with the student's own texts in place of its share of them."""
        if generator is None:
            return samples
        chosen = own_samples(samples, stage.share, self.seed, step, unit)
        sampling = Sampling(step_seed(self.seed, step), stage.longest(step, steps), stage.temperature, stage.likely)
        with generator.writing(step - 1):
            written = generator.write([samples[b] for b in chosen], sampling)
        made = list(samples)
        for b, (text, likely) in zip(chosen, written, strict=True):
            made[b] = rollout_of(samples[b], {**text._asdict(), "likely": likely}, step - 1, 0)
        return made


class Here:
    """A teacher in this process."""

    def __init__(self, backend: TransformersTeacher) -> None:
        self.backend = backend

    def score(self, samples: Sequence[Sample]) -> Any:
        """Send a unit; the returned function waits."""
        return lambda: self.backend.score(samples)


def main() -> None:
    """Make the worlds, train the students, print a line per case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True, help="folder that keeps the worlds")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1], help="of world and student")
    parser.add_argument("--steps", type=int, default=400, help="of 32 samples, in all")
    parser.add_argument("--rate", type=float, default=2e-3, help="learning rate")
    parser.add_argument("--cases", nargs="+", default=list(OWN), choices=OWN, help="on-policy forms")
    parser.add_argument("--quick", action="store_true", help="hardly any training: only to see that it runs")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.seeds, arguments.steps, arguments.cases = [0], 4, ["jsd, half of the texts"]
    torch.set_num_threads(1)
    lines: dict[str, list[Result]] = {}
    for seed in arguments.seeds:
        world = build_journeys_world(
            arguments.cache, seed, print, lambda f, items: map(f, items), **({"steps": 20} if arguments.quick else {})
        )
        with tempfile.TemporaryDirectory() as scratch:
            run_seed(Bench(world, Path(scratch), seed, arguments.rate), arguments, lines)
    for name, results in lines.items():
        whole, stops, seconds = (sum(values) / len(results) for values in zip(*results, strict=True))
        of_seeds = ", ".join(f"{result.whole:.1f}" for result in results)
        print(f"{name:58} whole {whole:5.1f} ({of_seeds})  stops {stops:5.1f}  {seconds:6.1f} s of processor time")


def run_seed(bench: Bench, arguments: argparse.Namespace, lines: dict[str, list[Result]]) -> None:
    """All cases of one world, into `lines`."""

    def add(name: str, stages: Sequence[tuple[dict[str, Any], int]]) -> Result:
        result = bench.student(name, stages)
        lines.setdefault(name, []).append(result)
        print(json.dumps({"seed": bench.seed, "case": name, **result._asdict()}), flush=True)
        return result

    half, sft = arguments.steps // 2, {"method": "sft"}
    off = add("off-policy: sft", [(sft, arguments.steps)])
    add("off-policy: sft, then sft", [(sft, half), (sft, half)])
    add("off-policy: sft, then byte-prefix distillation", [(sft, half), ({"method": "bytekd"}, half)])
    best: tuple[float, Result] | None = None
    for case in arguments.cases:
        own = {"method": "onpolicy", "teacher_weights": "consensus", "max_new_tokens": LONGEST, **OWN[case]}
        result = add(f"on-policy: sft, then {case}", [(sft, half), (own, half)])
        best = max(best or (-1.0, result), (result.whole, result))
    assert best is not None
    longer = max(1, round(arguments.steps * best[1].seconds / off.seconds))
    add("off-policy: sft for the processor time of the best", [(sft, longer)])


if __name__ == "__main__":
    main()
