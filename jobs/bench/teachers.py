"""Tokens per second that teachers score, per backend: the same model, the same texts, the same number of cores.

    python jobs/bench/teachers.py [--backends transformers vllm openai] [--units 4] [--unit-size 8] [--runs 5] [--quick]

SmolLM2-135M in float32 scores HumanEval problems and docstrings. Each backend is loaded in a process of its own, vLLM's
in its own interpreter (`make vllm` makes .venv-vllm; RAYFUSE_VLLM_PYTHON names another); `openai` asks a vLLM server on
the loopback interface. They take turns, a unit of samples at a time, after one round that is not counted. A line per
backend: tokens read (prompt, response and end-of-turn) per second, median over the rounds, and its ratio to
transformers in the same run.
"""

from __future__ import annotations

import argparse
import os
import pickle
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

K = 10
MAX_LENGTH = 2048


@dataclass(frozen=True)
class Case:
    """A backend to measure: who answers, and in which interpreter."""

    teacher: Any
    python: str


def transformers_case(folder: Path, args: argparse.Namespace) -> Case:
    """The plain forward pass."""
    return Case(_teacher(folder, args, backend="transformers"), sys.executable)


def vllm_case(folder: Path, args: argparse.Namespace) -> Case:
    """An engine in processes of its own."""
    return Case(_teacher(folder, args, backend="vllm", vllm={"max_model_len": MAX_LENGTH}), _vllm_python())


def openai_case(folder: Path, args: argparse.Namespace) -> Case:
    """The same engine behind a server, which ends with this process."""
    from jobs.vllm_server import start_server

    log = args.scratch / "server.log"
    server = args.stack.enter_context(start_server(_vllm_python(), folder, log, max_model_len=MAX_LENGTH))
    os.environ["RAYFUSE_BENCH_KEY"] = server.api_key
    endpoint = {"url": server.url, "model": server.model, "api_key_env": "RAYFUSE_BENCH_KEY"}
    return Case(_teacher(folder, args, backend="openai", tokenizer=str(folder), endpoint=endpoint), sys.executable)


def _vllm_python() -> str:
    from jobs.vllm_server import vllm_python

    python = vllm_python()
    if python is None:
        raise SystemExit("vLLM is missing: run `make vllm`, or name its interpreter in RAYFUSE_VLLM_PYTHON")
    return python


CASES: dict[str, Callable[[Path, argparse.Namespace], Case]] = {
    "transformers": transformers_case,
    "vllm": vllm_case,
    "openai": openai_case,
}


def _teacher(folder: Path, args: argparse.Namespace, **keys: Any) -> Any:
    from rayfuse.config import Teacher

    tree = {"model": str(folder), "name": "smollm2", "dtype": "float32", "cpus": args.cpus, "batch_tokens": 2048}
    return Teacher.model_validate({**tree, **keys})


class Worker:
    """A backend in another process that scores a unit when it is told to."""

    def __init__(self, case: Case, units: Sequence[Any], folder: Path) -> None:
        """Load it; returns when it is ready."""
        asked = folder / f"{case.teacher.backend}.pickle"
        asked.write_bytes(pickle.dumps((case.teacher, K, units)))
        command = [case.python, str(Path(__file__)), "--work", str(asked)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8"
        )
        self._answer()

    def seconds(self, unit: int) -> float:
        """How long `score` took for a unit."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{unit}\n")
        self.process.stdin.flush()
        return float(self._answer())

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def _answer(self) -> str:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("answer "):
                return line.removeprefix("answer ")
        raise SystemExit(f"the worker ended with {self.process.wait()}")


def work(asked: Path) -> None:
    """The other side of Worker: load the backend, then score the units whose numbers come on the standard input."""
    from rayfuse.teachers import BACKENDS

    teacher, k, units = pickle.loads(asked.read_bytes())
    backend = BACKENDS[teacher.backend](teacher, k)
    print("answer ready", flush=True)
    for line in sys.stdin:
        begun = time.perf_counter()
        backend.score(units[int(line)])
        print(f"answer {time.perf_counter() - begun}", flush=True)
    if hasattr(backend, "close"):
        backend.close()


def make_input(folder: Path, count: int, unit_size: int) -> tuple[Path, list[list[Any]], list[int]]:
    """The model's folder, units of samples, and the tokens of each unit under it."""
    from jobs.smollm2_world import make_rows, make_teacher
    from rayfuse.config import Model
    from rayfuse.data.render import Renderer
    from rayfuse.data.sample import Sample

    model = ROOT / "runs" / "smollm2" / "world" / "teacher"
    if not model.exists():
        model = folder / "teacher"
        make_teacher(model)
    rows, _ = make_rows(count * unit_size, 0)
    samples = [Sample((("user", row["prompt"]),), row["response"]) for row in rows]
    units = [samples[i : i + unit_size] for i in range(0, len(samples), unit_size)]
    renderer = Renderer.of(Model(model=str(model)))
    return model, units, [sum(renderer.render(sample).length for sample in unit) for unit in units]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backends", nargs="+", choices=list(CASES), default=list(CASES), help="in this order")
    parser.add_argument("--units", type=int, default=4, help="different units; each round scores all of them")
    parser.add_argument("--unit-size", type=int, default=8, help="samples of a unit")
    parser.add_argument("--cpus", type=float, default=1.0, help="cores of each backend")
    parser.add_argument("--runs", type=int, default=5, help="rounds; the median counts")
    parser.add_argument("--quick", action="store_true", help="few samples and transformers alone, without meaning")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        work(args.work)
        return
    if args.quick:
        args.units, args.unit_size, args.runs, args.backends = 1, 2, 1, ["transformers"]
    from measure import machine

    print(machine())
    with tempfile.TemporaryDirectory(prefix="rayfuse-bench-") as scratch, ExitStack() as stack:
        args.scratch, args.stack = Path(scratch), stack
        model, units, tokens = make_input(Path(scratch), args.units, args.unit_size)
        print(f"{len(units)} units of {args.unit_size} samples, {sum(tokens)} tokens; {args.cpus:g} cores a backend")
        workers = {name: Worker(CASES[name](model, args), units, Path(scratch)) for name in args.backends}
        for worker in workers.values():
            stack.callback(worker.close)
        speeds: dict[str, list[float]] = {name: [] for name in workers}
        for run in range(args.runs + 1):
            for name, worker in workers.items():
                seconds = sum(worker.seconds(unit) for unit in range(len(units)))
                if run:
                    speeds[name].append(sum(tokens) / seconds)
    base = statistics.median(speeds.get("transformers") or [float("nan")])
    for name, of_case in speeds.items():
        median = statistics.median(of_case)
        print(f"score, {name:<14} {median:8.0f} tokens/s  {median / base:6.2f} x transformers  ({len(of_case)} rounds)")


if __name__ == "__main__":
    main()
