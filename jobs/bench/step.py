"""Seconds per optimiser step of SFT, InfiFusion and InfiGFusion on one student, the teachers' signals being there.

    python jobs/bench/step.py [--hidden 384] [--layers 4] [--vocabulary 65536] [--steps 8] [--threads 1] [--profile]
        [--device cuda --dtype bfloat16] [--quick]

One process, one student, one optimiser: the methods take turns step by step, on batches that a Preparer made beforehand
from a warm store, so that only the student's own time is compared. The teachers are three stubs with random top-10
signals whose tokens end at words. A ratio is the median over rounds of a step's time over SFT's in the same round.
SFT takes the top-K too here, as in a run; jobs/bench/head.py compares the head with cross-entropy alone. On a machine
that others use, look at the ratio of processor seconds with `--threads 1`: waiting threads burn processor time too.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import statistics
import sysconfig
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from measure import machine
from signals import random_signals

from rayfuse.batch import FusionBatch
from rayfuse.config import STAGES, Stage, Student, Teacher
from rayfuse.data.sample import Sample
from rayfuse.prepare.preparer import Preparer
from rayfuse.prepare.spec import PrepareSpec
from rayfuse.quickstart.tiny_models import STYLES, make_model, make_tokenizer, save
from rayfuse.signals.topk import TopKSignals
from rayfuse.stages import METHODS
from rayfuse.student.engines.ddp import DDPEngine
from rayfuse.teachers.identity import IdentifiedTeacher

K, TEACHERS, BATCHES = 10, 3, 3
WORDS = re.compile(r" ?\w+| ?[^\w\s]+|\s+")
PHASES = ("forward", "loss", "backward", "update")
Phases = dict[str, float]


class WordTeacher:
    """A stub whose tokens are words, and whose signals are random but always the same for a response."""

    def __init__(self, teacher: IdentifiedTeacher) -> None:
        self.seed = int(teacher.fingerprint)

    def score(self, samples: Sequence[Sample]) -> Callable[[], list[TopKSignals]]:
        answers = []
        for sample in samples:
            ends = np.array([len(sample.response[: match.end()].encode()) for match in WORDS.finditer(sample.response)])
            draw = np.random.default_rng([self.seed, len(sample.response)])
            answers.append(replace(random_signals(len(ends) + 1, K, draw), byte_ends=ends.astype(np.int64)))
        return lambda: answers


def make_student(folder: Path, vocabulary: int, hidden: int, layers: int, text: str) -> None:
    """A Llama with random weights; tokens that no text uses fill its vocabulary up."""
    make_tokenizer(replace(STYLES["pivot"], vocabulary=4096), [text[:200_000]]).save_pretrained(folder)
    file = folder / "tokenizer.json"
    tree = json.loads(file.read_text(encoding="utf-8"))
    vocabulary_of_file = tree["model"]["vocab"]
    vocabulary_of_file |= {f"unused{i}": i for i in range(len(vocabulary_of_file), vocabulary)}
    file.write_text(json.dumps(tree), encoding="utf-8")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    save(make_model(tokenizer, 0, hidden, layers), tokenizer, folder)


def make_batches(
    folder: Path, method: str, units: Sequence[Sequence[Sample]], student: Student
) -> tuple[list[FusionBatch], float]:
    """The units as the method's prepare tasks make them from a warm store, and milliseconds of CPU per unit."""
    teachers = [IdentifiedTeacher(Teacher(model=str(folder), name=f"stub-{s}"), str(s)) for s in range(TEACHERS)]
    spec = PrepareSpec(
        student=student,
        teachers=tuple(teachers) if STAGES[method].uses_teachers else (),
        store=str(folder / "store"),
        k=K,
        alignment="bytes",
        max_length=256,
        targets=STAGES[method].targets,
        stage=STAGES[method](method=method),
    )
    prepare = Preparer(spec, WordTeacher)
    for unit in units:
        prepare(unit)  # fills the store
    begun = time.process_time()
    batches = [prepare(unit) for unit in units]
    return batches, (time.process_time() - begun) / len(units) * 1e3


def one_step(engine: DDPEngine, stage: Stage, batch: FusionBatch) -> Phases:
    """What a worker does for a step of one unit; seconds of its phases, and processor seconds of the whole."""

    def now() -> float:
        if engine.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    cpu = time.process_time()
    marks = [now()]
    head = engine.score(batch, K)
    marks.append(now())
    loss, parts = METHODS[stage.method](stage, head, batch, batch.counts)
    marks.append(now())
    engine.backward(loss)
    marks.append(now())
    assert all(np.isfinite(float(value)) for value in [loss.detach(), *parts.values()])
    engine.step(1e-6)
    marks.append(now())
    phases = [b - a for a, b in pairwise(marks)]
    return {**dict(zip(PHASES, phases, strict=True)), "seconds": sum(phases), "cpu": time.process_time() - cpu}


def profile(engine: DDPEngine, stages: dict[str, Stage], batches: dict[str, list[FusionBatch]]) -> None:
    """Where the extra goes: the operators whose own time differs most from SFT's, in milliseconds of one step."""
    own: dict[str, dict[str, float]] = {}
    for method, stage in stages.items():
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as trace:
            one_step(engine, stage, batches[method][0])
        own[method] = {event.key: event.self_cpu_time_total / 1e3 for event in trace.key_averages()}
    for method in list(stages)[1:]:
        extra = {name: ms - own["sft"].get(name, 0.0) for name, ms in own[method].items()}
        largest = sorted(extra, key=lambda name: -abs(extra[name]))[:8]
        print(f"profile, {method} over sft, ms: " + ", ".join(f"{name} {extra[name]:+.1f}" for name in largest))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=384)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=65_536)
    parser.add_argument("--samples", type=int, default=8, help="samples per step")
    parser.add_argument("--bytes", type=int, default=460, help="bytes per response; about 128 tokens with the prompt")
    parser.add_argument("--steps", type=int, default=8, help="steps per method; the median counts")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--profile", action="store_true", help="one more step of each under torch.profiler")
    parser.add_argument("--quick", action="store_true", help="a few seconds, numbers without meaning")
    args = parser.parse_args()
    if args.quick:
        args.hidden, args.layers, args.vocabulary, args.samples, args.steps = 32, 1, 5000, 2, 2
    torch.set_num_threads(args.threads)
    text = (
        (Path(sysconfig.get_paths()["stdlib"]) / "argparse.py")
        .read_text(encoding="utf-8")
        .encode("ascii", "ignore")
        .decode()
    )
    folder = Path(tempfile.mkdtemp(prefix="rayfuse-bench-"))
    try:
        make_student(folder, args.vocabulary, args.hidden, args.layers, text)
        starts = range(0, BATCHES * args.samples * args.bytes, args.bytes)
        rows = [Sample((("user", "Continue."),), text[start : start + args.bytes]) for start in starts]
        units = [rows[i : i + args.samples] for i in range(0, len(rows), args.samples)]
        student = Student(model=str(folder), dtype=args.dtype)
        stages = {name: STAGES[name](method=name) for name in ("sft", "infifusion", "infigfusion")}
        batches, prepared = {}, {}
        for name in stages:
            batches[name], prepared[name] = make_batches(folder, name, units, student)
        torch.manual_seed(0)
        engine = DDPEngine(student, student.model, stages["sft"], torch.device(args.device))
        measure(args.steps, engine, stages, batches, prepared)
        if args.profile:
            profile(engine, stages, batches)
    finally:
        shutil.rmtree(folder)


def measure(
    steps: int,
    engine: DDPEngine,
    stages: dict[str, Stage],
    batches: dict[str, list[FusionBatch]],
    prepared: dict[str, float],
) -> None:
    """Alternate the methods and print one line for each."""
    batch = batches["infifusion"][0]
    pairs = [len(target.rows) for target in batch.targets]
    parameters = sum(p.numel() for p in engine.model.parameters())
    print(machine())
    print(
        f"student {parameters / 1e6:.0f}M parameters, vocabulary {engine.model.config.vocab_size:,}, "
        f"[B, T] = {list(batch.input_ids.shape)}, {len(batch.labels)} positions, {TEACHERS} teachers, k {K}, "
        f"aligned with them {pairs}; {engine.dtype} on {engine.device}, prepared beforehand"
    )
    taken: dict[str, list[Phases]] = {name: [] for name in stages}
    names = list(stages)
    for turn in range(-1, steps):
        order = names[turn % 3 :] + names[: turn % 3]
        for name in order:
            phases = one_step(engine, stages[name], batches[name][turn % BATCHES])
            if turn >= 0:
                taken[name].append(phases)
    for name in names:
        middle = {key: statistics.median(phases[key] for phases in taken[name]) for key in taken[name][0]}
        ratio = {
            key: statistics.median(a[key] / b[key] for a, b in zip(taken[name], taken["sft"], strict=True))
            for key in ("seconds", "cpu")
        }
        print(
            f"{name:<12} {middle['seconds']:7.3f} s per step  {ratio['seconds']:6.3f} x SFT  "
            f"{middle['cpu']:7.3f} CPU s  {ratio['cpu']:6.3f} x SFT  "
            f"(ms: {', '.join(f'{part} {middle[part] * 1e3:.1f}' for part in PHASES)}); "
            f"prepare task {prepared[name]:.1f} CPU ms"
        )


if __name__ == "__main__":
    main()
