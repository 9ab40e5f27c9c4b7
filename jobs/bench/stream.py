"""Tokens per second from teachers to student without any model: Serve, prepare tasks, signal store, object store.

    python jobs/bench/stream.py [--units 40] [--rounds 3] [--teachers 1 2 3] [--seconds 0.2] [--quick]

Three parts, on an embedded Ray that this script starts and ends:
- padding: share of padded tokens in teacher and student batches, for realistic distributions of lengths.
- flow: 1 to 3 stub teachers answer random valid top-10 signals for units of 5,120 tokens. The whole path (UnitStream,
  prepare_unit, TeacherClient, TeacherReplica, SignalStore) against raw Ray actors that return the same; the ways take
  turns. A token counts once, however many teachers answered it. On a machine that others use, look at the processor
  time per token (of all processes) and at what the cores could do with it.
- scaling: one teacher that sleeps `--seconds` per unit, with 1 to 8 replicas, asked by prepare tasks.

The stub is an ordinary backend: `StubReplica` registers it in the replica's own process and is else a TeacherReplica.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sysconfig
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import ray
from measure import descendants, machine, processor_seconds
from ray import serve
from signals import random_signals

from rayfuse import cluster
from rayfuse.config import Teacher
from rayfuse.data.sample import Sample
from rayfuse.prepare.preparer import Preparer
from rayfuse.prepare.spec import PrepareSpec
from rayfuse.prepare.units import make_units
from rayfuse.quickstart.tiny_models import STYLES, make_tokenizer
from rayfuse.signals.codec import pack, unpack
from rayfuse.signals.topk import TopKSignals
from rayfuse.student.job import BLOCK
from rayfuse.student.stream import UnitStream
from rayfuse.teachers import Backend
from rayfuse.teachers.identity import IdentifiedTeacher
from rayfuse.teachers.serving import applications
from rayfuse.teachers.serving.client import TeacherClient
from rayfuse.teachers.serving.replica import TeacherReplica
from rayfuse.teachers.transformers import length_batches

K, UNIT, ROWS = 10, 8, 640
LOGICAL_CPUS = 24


class StubTeacher(Backend):
    """Answers every sample with the same random signals; its backend's name says rows per sample and seconds."""

    vocab_size = 151_936

    def __init__(self, teacher: Teacher, k: int) -> None:
        _, rows, seconds = teacher.backend.split()
        self.seconds = float(seconds)
        self.signals = random_signals(int(rows), k, np.random.default_rng(0))

    def score(self, samples: Sequence[Sample]) -> list[TopKSignals]:
        if self.seconds:
            time.sleep(self.seconds)
        rows = np.arange(1, len(self.signals))
        sizes = [len(sample.response.encode()) for sample in samples]
        return [replace(self.signals, byte_ends=rows * size // len(rows)) for size in sizes]


class StubReplica(TeacherReplica):
    """The real replica, in whose process the stub is a backend."""

    def __init__(self, teacher: Teacher, k: int) -> None:
        from rayfuse.teachers import BACKENDS

        BACKENDS[teacher.backend] = StubTeacher
        super().__init__(teacher, k)


@ray.remote(num_cpus=0.1)
class RawActor:
    """The peer: a plain asynchronous actor with the same stub and the same packed answer."""

    def __init__(self, teacher: Teacher, k: int) -> None:
        self.backend = StubTeacher(teacher, k)

    async def score(self, samples: list[Sample]) -> dict[str, np.ndarray]:
        return pack(self.backend.score(samples))


def stub(name: str, model: Path, rows: int, seconds: float, replicas: int = 1) -> IdentifiedTeacher:
    """A stub teacher and its fingerprint."""
    counts = {"min": replicas, "max": replicas}
    teacher = Teacher.model_validate({"model": str(model), "name": name, "cpus": 0.1, "replicas": counts})
    return IdentifiedTeacher(teacher.model_copy(update={"backend": f"stub {rows} {seconds}"}), name)


def deploy(teachers: Sequence[IdentifiedTeacher]) -> None:
    """As `applications.deploy`, with the stub's replica."""
    for one in teachers:
        options = cluster.teacher_deployment(one.teacher)
        served: Any = serve.deployment(StubReplica, name=one.name, **options)  # type: ignore[call-overload]
        serve.run(served.bind(one.teacher, K), name=applications.application_name(one), route_prefix=None)


def world(folder: Path, units: int, response_bytes: int, offset: int = 0) -> list[list[Sample]]:
    """Units of samples whose responses are pieces of the standard library's source."""
    root = Path(sysconfig.get_paths()["stdlib"])
    text = "".join(
        (root / f"{name}.py").read_text(encoding="utf-8")
        for name in ("argparse", "inspect", "tarfile", "typing", "pydoc")
    )
    text = text.encode("ascii", "ignore").decode()
    if not folder.exists():
        make_tokenizer(replace(STYLES["pivot"], vocabulary=8192), [text[:200_000]]).save_pretrained(folder)

    def sample(index: int) -> Sample:
        begin = (index * 997) % (len(text) - response_bytes)
        return Sample((("user", f"Continue file {index}."),), text[begin : begin + response_bytes])

    return [[sample(offset + unit * UNIT + row) for row in range(UNIT)] for unit in range(units)]


# --- padding ------------------------------


def padding(samples: int) -> None:
    """Share of padding in a teacher's forward batches and in the student's units; nothing of Ray."""
    draw = np.random.default_rng(0)
    chat = np.exp(draw.normal(np.log(350), 0.8, samples))
    reasoning = np.exp(draw.normal(np.log(1400), 0.6, samples))
    shapes = {
        "chat (log-normal, median 350)": chat,
        "reasoning (log-normal, median 1,400)": reasoning,
        "half chat, half reasoning": np.where(draw.random(samples) < 0.5, chat, reasoning),
        "uniform 16 to 4,096": draw.uniform(16, 4096, samples),
    }
    keys = [Sample((("user", str(index)),), "x").key for index in range(samples)]
    for name, lengths in shapes.items():
        student = np.clip(lengths, 16, 4096).astype(int)
        teacher = (student * draw.normal(1.08, 0.08, samples).clip(0.8, 1.5)).astype(int)
        units = make_units(keys, student.tolist(), UNIT)
        real = padded = 0
        for unit in units:
            sizes = teacher[unit].tolist()
            for batch in length_batches(sizes, 16384):
                real += sum(sizes[index] for index in batch)
                padded += len(batch) * sizes[batch[0]]
        wasted = 1 - sum(student) / sum(len(unit) * max(student[unit]) for unit in units)
        print(f"padding, {name:<38} teacher {100 * (1 - real / padded):5.1f} %   student {100 * wasted:5.1f} %")


# --- flow ------------------------------


def in_flight(send: Callable[[list[Sample]], Any], wait: Callable[[Any], Any], units: Any, limit: int) -> None:
    """Send all units, at most `limit` at a time, and wait for them in order."""
    pending: deque[Any] = deque()
    for unit in units:
        pending.append(send(unit))
        if len(pending) >= limit:
            wait(pending.popleft())
    while pending:
        wait(pending.popleft())


def stream(spec: PrepareSpec, units: list[list[Sample]], prefetch: int, filling: int = 0) -> float:
    """What a student's worker does between its steps: take every unit's batch, `prefetch` of them in preparation.

    Returns the seconds; without the first and last `filling` units, while the stream fills and runs dry.
    """
    student = SimpleNamespace(prefetch=prefetch)
    blocks = [ray.put(units[start : start + BLOCK]) for start in range(0, len(units), BLOCK)]
    job: Any = SimpleNamespace(config=SimpleNamespace(student=student), spec=spec, blocks=blocks)
    source = UnitStream(job, range(len(units)))
    source.take(filling)
    begun = time.perf_counter()
    source.take(len(units) - 2 * filling)
    seconds = time.perf_counter() - begun
    source.take(filling)
    return seconds


def _processor_seconds() -> float:
    """Of this process and all of Ray's processes that it started, up to now."""
    return sum(processor_seconds(descendants(os.getpid())).values())


def _cores(processor_seconds: float) -> float:
    """Thousands of tokens per second that all cores of this machine could do, had they nothing else to do."""
    return (os.cpu_count() or 1) / processor_seconds / 1e3


def flow(folder: Path, counts: Sequence[int], count: int, rounds: int, rows: int, prefetch: int) -> None:
    """Tokens per second with 1, 2 and 3 teachers, by every way."""
    units = world(folder / "student", count, 4 * rows)
    tokens = count * UNIT * rows
    stubs = [stub(f"stub-{index}", folder / "student", rows, 0.0) for index in range(3)]
    deploy(stubs)
    clients = [TeacherClient(item) for item in stubs]
    actors: list[Any] = [RawActor.remote(one.teacher, K) for one in stubs]
    print(f"flow: {count} units of {UNIT} x {rows} tokens, {prefetch} in flight, stub teachers, k {K}")
    used = _processor_seconds()
    time.sleep(2)
    print(f"Ray and Serve doing nothing use {(_processor_seconds() - used) / 2:.2f} cores; that is in every line below")
    for teachers in counts:
        stores = [str(folder / f"store-{teachers}-{turn}") for turn in range(rounds + 1)]
        specs = [PrepareSpec(stubs[0].teacher, tuple(stubs[:teachers]), store, K, "bytes", 1 << 20) for store in stores]
        some, these = actors[:teachers], clients[:teachers]

        ways: dict[str, Callable[[PrepareSpec], Any]] = {
            "raw actors": lambda _, some=some: in_flight(
                lambda unit: [actor.score.remote(unit) for actor in some],
                lambda answers: [unpack(ray.get(answer)) for answer in answers],
                units,
                prefetch,
            ),
            "Serve handles": lambda _, these=these: in_flight(
                lambda unit: [client.score(unit) for client in these],
                lambda waits: [wait() for wait in waits],
                units,
                prefetch,
            ),
            "Serve, prepare, cold store": lambda spec: stream(spec, units, prefetch),
            "Serve, prepare, warm store": lambda spec: stream(spec, units, prefetch),
        }
        if teachers == 1:
            ways["prepare without teachers (SFT)"] = lambda spec: stream(replace(spec, teachers=()), units, prefetch)
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        cpu: dict[str, list[float]] = {name: [] for name in ways}
        # Each turn has a store of its own: ext4 looks for new files slowly where it has just deleted thousands.
        for turn, spec in enumerate(specs):
            for name, way in ways.items():
                begun, used = time.perf_counter(), _processor_seconds()
                way(spec)
                if turn:
                    seconds[name].append(time.perf_counter() - begun)
                    cpu[name].append(_processor_seconds() - used)
        peer = statistics.median(seconds["raw actors"])
        for name, taken in seconds.items():
            median = statistics.median(taken)
            processor = max(statistics.median(cpu[name]), 1 / os.sysconf("SC_CLK_TCK")) / tokens  # it comes in ticks
            print(
                f"{teachers} teacher{'s' * (teachers > 1)}  {name:<31} {tokens / median / 1e3:8.0f}k tokens/s "
                f"({teachers * tokens / median / 1e3:6.0f}k signals/s)  {peer / median:5.2f} x raw actors  "
                f"{processor * 1e6:6.2f} CPU us per token ({_cores(processor):.0f}k tokens/s on {os.cpu_count()} cores)"
            )
    applications.delete(stubs)
    for actor in actors:
        ray.kill(actor)


def prepare_cost(folder: Path, count: int, rows: int) -> None:
    """Processor time per token of the prepare task's own work, 3 teachers, in this process without Ray."""
    units = world(folder / "student", count, 4 * rows)
    stubs = [stub(f"local-{index}", folder / "student", rows, 0.0) for index in range(3)]
    answers = {unit[0].key: StubTeacher(stubs[0].teacher, K).score(unit) for unit in units}
    spec = PrepareSpec(stubs[0].teacher, tuple(stubs), str(folder / "store-local"), K, "bytes", 1 << 20)
    scorer: Any = SimpleNamespace(score=lambda unit: lambda: answers[unit[0].key])
    for name, case in (("no teachers", replace(spec, teachers=())), ("cold store", spec), ("warm store", spec)):
        prepare = Preparer(case, lambda *_: scorer)
        prepare.renderer.render(units[0][0])  # builds the tokenizer's table
        begun = time.process_time()
        for unit in units:
            prepare(unit)
        microseconds = (time.process_time() - begun) / (count * UNIT * rows) * 1e6
        speed = f"{1e3 / microseconds:6.0f}k tokens/s per core"
        print(f"prepare alone, {name:<11} {microseconds:6.2f} CPU us per token, {speed}")


# --- scaling ------------------------------


def scaling(folder: Path, replicas: Sequence[int], seconds: float, per_replica: int, calls: int, rounds: int) -> None:
    """Units per second of a teacher that sleeps, against the replicas' own limit of 1 / `seconds` each."""
    rows = 64
    print(f"scaling: a teacher that sleeps {seconds} s per unit, {per_replica} units in flight per replica")
    first = 0.0
    for count in replicas:
        slow = stub(f"slow-{count}", folder / "student", rows, seconds, count)
        deploy([slow])
        wait_for_replicas(applications.application_name(slow), count)
        spec = PrepareSpec(slow.teacher, (slow,), str(folder / f"store-{slow.name}"), K, "bytes", 1 << 20)
        filling = per_replica * count
        rates = []
        for turn in range(rounds + 1):  # the first only starts processes and loads tokenizers in them
            measured = 2 * filling if turn == 0 else calls * count
            units = world(folder / "student", measured + 2 * filling, 4 * rows, offset=100_000 * turn)
            rates.append(measured / stream(spec, units, filling, filling))
        rate = statistics.median(rates[1:])
        first = first or rate / count
        print(
            f"{count} replica{'s' if count > 1 else ' '}  {rate:6.2f} units/s  {100 * rate * seconds / count:5.1f} % "
            f"of {count / seconds:.0f} units/s  {100 * rate / count / first:5.1f} % of {count} times one replica"
        )
        applications.delete([slow])


def wait_for_replicas(application: str, count: int) -> None:
    while True:
        parts = serve.status().applications[application].deployments.values()
        if all(part.replica_states.get("RUNNING", 0) >= count for part in parts):
            return
        time.sleep(0.2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--units", type=int, default=40, help="units per measurement of the flow")
    parser.add_argument("--teachers", type=int, nargs="*", default=[1, 2, 3])
    parser.add_argument("--rounds", type=int, default=3, help="rounds; the median counts")
    parser.add_argument("--in-flight", type=int, default=4, help="units in preparation at a time (student.prefetch)")
    parser.add_argument("--seconds", type=float, default=0.2, help="what the slow teacher sleeps per unit")
    parser.add_argument("--replicas", type=int, nargs="*", default=[1, 2, 4, 8])
    parser.add_argument("--per-replica", type=int, default=4, help="units in flight per replica of the slow teacher")
    parser.add_argument("--quick", action="store_true", help="half a minute, numbers without meaning")
    args = parser.parse_args()
    rows, calls, samples = ROWS, 25, 20_000
    if args.quick:
        args.units, args.rounds, args.replicas, rows, calls, samples = 4, 1, [1, 2], 64, 3, 500
    print(machine())
    padding(samples)
    folder = Path(tempfile.mkdtemp(prefix="rayfuse-bench-"))
    cluster.start_embedded(LOGICAL_CPUS)
    applications.start_serve()
    try:
        prepare_cost(folder, args.units, rows)
        flow(folder, args.teachers, args.units, args.rounds, rows, args.in_flight)
        scaling(folder, args.replicas, args.seconds, args.per_replica, calls, args.rounds)
    finally:
        cluster.end_embedded()
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
