"""The share of its time that a student waits for data, against the number of teacher replicas.

    python jobs/bench/wait.py [--step 0.4] [--seconds 0.8] [--replicas 1 2 3 4] [--prefetch 8] [--steps 30] [--quick]

A stand-in for the student takes `--step` seconds per unit, one for the teacher (1 to 4 replicas) `--seconds`; both
sleep. Between them is the whole path of a run: UnitStream, prepare tasks, Serve, signal store and object store, the
store empty. Enough replicas are those that answer as fast as the student steps: seconds / step of them. The share is
counted as a run's metric `wait_share` is: UnitStream.waited over the time of all steps, the first units left out. The
data to prepare in advance (student.prefetch) must be at least seconds / step and a little.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ray
from measure import machine
from stream import BLOCK, LOGICAL_CPUS, K, deploy, stub, wait_for_replicas, world

from rayfuse import cluster
from rayfuse.prepare.spec import PrepareSpec
from rayfuse.student.stream import UnitStream
from rayfuse.teachers.serving import applications

ROWS = 64


def wait_share(spec: PrepareSpec, units: list[Any], prefetch: int, step: float, steps: int) -> float:
    """Waiting over all time of `steps` steps of one unit, after the stream has filled."""
    blocks = [ray.put(units[start : start + BLOCK]) for start in range(0, len(units), BLOCK)]
    job: Any = SimpleNamespace(config=SimpleNamespace(student=SimpleNamespace(prefetch=prefetch)), spec=spec)
    job.blocks = blocks
    source = UnitStream(job, range(len(units)))

    def run(count: int) -> None:
        for _ in range(count):
            source.take(1)
            time.sleep(step)

    run(2 * prefetch)  # the processes of prepare tasks start, and the units in flight spread over the replicas
    source.waited = 0.0
    begun = time.perf_counter()
    run(steps)
    share = source.waited / (time.perf_counter() - begun)
    source.take(len(units) - 2 * prefetch - steps)
    return share


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--step", type=float, default=0.4, help="seconds that the student takes per unit")
    parser.add_argument("--seconds", type=float, default=0.8, help="seconds that a teacher's replica takes per unit")
    parser.add_argument("--replicas", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--prefetch", type=int, default=8, help="units in preparation (student.prefetch)")
    parser.add_argument("--steps", type=int, default=30, help="steps that are measured")
    parser.add_argument("--quick", action="store_true", help="numbers without meaning")
    args = parser.parse_args()
    if args.quick:
        args.step, args.seconds, args.replicas, args.prefetch, args.steps = 0.05, 0.1, [1, 2], 2, 3
    print(machine())
    folder = Path(tempfile.mkdtemp(prefix="rayfuse-bench-"))
    cluster.start_embedded(LOGICAL_CPUS)
    applications.start_serve()
    try:
        print(f"a student of {args.step} s and a teacher of {args.seconds} s per unit, {args.prefetch} units in flight")
        for turn, count in enumerate(args.replicas):
            units = world(folder / "student", 3 * args.prefetch + args.steps, 4 * ROWS, offset=100_000 * turn)
            slow = stub(f"slow-{count}", folder / "student", ROWS, args.seconds, count)
            deploy([slow])
            wait_for_replicas(applications.application_name(slow), count)
            spec = PrepareSpec(slow.teacher, (slow,), str(folder / slow.name), K, "bytes", 1 << 20)
            share = wait_share(spec, units, args.prefetch, args.step, args.steps)
            enough = count * args.step / args.seconds
            print(f"{count} replicas, {enough:.2f} x what the student asks for: waits {100 * share:5.1f} % of its time")
            applications.delete([slow])
    finally:
        cluster.end_embedded()
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
