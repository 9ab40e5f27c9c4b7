"""`rayfuse plan` against what really happens: peak memory and time of a student's step, on this machine.

    python jobs/bench/plan.py [--quick]

Each case is a process of one thread: a Llama with random weights, loaded by the engine, four optimiser steps of one
micro-step, on full sequences. Memory is the process's own resident memory at its highest, beyond what it had before the
engine. Time is processor seconds, the median of the steps; the speed of products and copies that the plan takes is
measured by the plan's own function between the steps, so that other work on the machine slows both. One line per case:
predicted, measured, and their ratio.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

CASES = {
    # hidden, layers, vocabulary, samples, tokens of each, recomputation
    "8M": (256, 4, 16_384, 4, 256, False),
    "33M": (512, 6, 24_576, 4, 256, False),
    "33M, recomputed": (512, 6, 24_576, 4, 256, True),
    "117M": (768, 12, 32_768, 2, 256, False),
}
QUICK = {"tiny": (32, 2, 5000, 2, 32, False)}
STEPS = 4
K = 10


class OwnMemory:
    """The process's own resident memory (RssAnon: without mapped files), at its highest since the start."""

    def __init__(self) -> None:
        self.before = self.most = self._now()
        self.stopped = False
        threading.Thread(target=self._watch, daemon=True).start()

    @staticmethod
    def _now() -> int:
        found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))
        assert found is not None
        return int(found[1]) * 1024

    def _watch(self) -> None:
        while True:
            if not self.stopped:
                self.most = max(self.most, self._now())
            time.sleep(0.001)


def measure(folder: Path, batch: int, length: int, checkpointing: bool) -> dict[str, float]:
    """Some steps in this process: bytes at the highest, processor seconds of a step, speeds between the steps."""
    import numpy as np
    import torch

    from rayfuse.batch import FusionBatch
    from rayfuse.config import SFT, Student
    from rayfuse.plan.hardware import measure_processor
    from rayfuse.stages import METHODS
    from rayfuse.student.engines.ddp import DDPEngine

    torch.set_num_threads(1)
    draw = np.random.default_rng(0)
    ids = draw.integers(1, 4000, (batch, length))
    unit = FusionBatch(
        input_ids=ids,
        attention_mask=np.ones_like(ids),
        positions=np.arange(batch * length),
        labels=draw.integers(1, 4000, batch * length),
        sample=np.repeat(np.arange(batch), length),
    )
    torch.ones(64, 64) @ torch.ones(64, 64)  # libraries' own buffers are not the step's
    stage, memory, seconds = SFT(method="sft"), OwnMemory(), list[float]()
    speeds: list[tuple[float, float]] = []
    student = Student(model=str(folder), gradient_checkpointing=checkpointing)
    engine = DDPEngine(student, student.model, stage, torch.device("cpu"))
    for _ in range(STEPS):
        begun = time.process_time()
        with engine.accumulate(last=True):
            loss, _ = METHODS["sft"](stage, engine.score(unit, K), unit, unit.counts)
            engine.backward(loss)
        engine.step(1e-6)
        seconds.append(time.process_time() - begun)
        memory.stopped = True  # what the measurement of speed needs is not the step's
        speeds.append(measure_processor(1, 0.3))
        memory.stopped = False
    peak, bandwidth = (statistics.median(values) for values in zip(*speeds, strict=True))
    seconds_a_step = statistics.median(seconds[1:])  # the first makes the optimiser's state
    return {"bytes": memory.most - memory.before, "seconds": seconds_a_step, "peak": peak, "bandwidth": bandwidth}


def predict(folder: Path, batch: int, length: int, checkpointing: bool, found: dict[str, float]) -> dict[str, Any]:
    """What the plan says of the same, on a processor of the speed in `found`."""
    from rayfuse.config import Model
    from rayfuse.plan.hardware import this_machine
    from rayfuse.plan.memory import PROCESS, Setup, student_activations, student_memory
    from rayfuse.plan.roofline import step_time
    from rayfuse.plan.shapes import read_shape

    shape, here = read_shape(Model(model=str(folder))), this_machine(1)
    device = replace(here.device, peak=found["peak"], bandwidth=found["bandwidth"])
    hardware = replace(here, device=device)
    setup = Setup("ddp", 0, 1, "float32", checkpointing, batch, length)
    memory = student_memory(shape, setup, hardware.device)
    step = step_time(shape, setup, hardware, student_activations(shape, setup), length=length)
    parts = {term.name: term.bytes for term in memory.terms if term.name != "process"}
    return {
        "bytes": memory.total - PROCESS,
        "seconds": step.seconds,
        "parameters": shape.parameters,
        "largest": max(parts, key=parts.__getitem__),
        "gflops": hardware.device.peak / 1e9,
    }


def run_case(name: str, case: tuple[int, int, int, int, int, bool]) -> None:
    """Make the model, predict here, measure in a process of its own, and print the line."""
    from step import make_student

    hidden, layers, vocabulary, batch, length, checkpointing = case
    text = (Path(sysconfig.get_paths()["stdlib"]) / "argparse.py").read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory(prefix="rayfuse-bench-") as folder:
        make_student(Path(folder), vocabulary, hidden, layers, text.encode("ascii", "ignore").decode())
        # Freed memory goes back to the system at once, so that what is resident is what is held.
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**18), "OMP_NUM_THREADS": "1"}
        options = [folder, str(batch), str(length), str(int(checkpointing))]
        command = [sys.executable, __file__, "--measure", *options]
        done = subprocess.run(command, capture_output=True, encoding="utf-8", env=environment)
        if done.returncode:
            sys.exit(done.stderr[-2000:])
        found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
        said = predict(Path(folder), batch, length, checkpointing, found)
    print(
        f"{name:<16} {said['parameters'] / 1e6:6.1f}M parameters, {batch} x {length} tokens  memory, MB: predicted "
        f"{said['bytes'] / 1e6:7.0f}, measured {found['bytes'] / 1e6:7.0f}, ratio {said['bytes'] / found['bytes']:5.2f}"
        f"  step, s: predicted {said['seconds']:6.2f}, measured {found['seconds']:6.2f}, ratio "
        f"{said['seconds'] / found['seconds']:5.2f}  (largest: {said['largest']}; {said['gflops']:.0f} GFLOP/s)",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one tiny case, numbers without meaning")
    parser.add_argument(
        "--measure", nargs=4, metavar=("FOLDER", "BATCH", "LENGTH", "RECOMPUTE"), help=argparse.SUPPRESS
    )
    arguments = parser.parse_args()
    if arguments.measure:
        folder, batch, length, checkpointing = arguments.measure
        print(json.dumps(measure(Path(folder), int(batch), int(length), checkpointing == "1")))
        return
    from measure import machine

    print(machine())
    for name, case in (QUICK if arguments.quick else CASES).items():
        run_case(name, case)


if __name__ == "__main__":
    main()
