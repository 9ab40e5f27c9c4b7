"""The time of a run: a discrete-event simulation of teachers, prepare tasks, store and student ranks.

Every unit of an epoch goes through a prepare task (CPU), the teachers (a queue in front of each one's replicas), the
store and the object store to its student rank; ranks hold `prefetch` units in preparation; every optimiser step ends
with a barrier over all ranks. GPU times are floating-point operations over peak and an assumed utilisation.
jobs/bench/scale.md is made by it.
"""

from __future__ import annotations

import heapq
import math
import random
from dataclasses import dataclass
from typing import NamedTuple

from rayfuse.prepare.units import share_out


class LanguageModel(NamedTuple):
    """Sizes of a model, from its published configuration."""

    name: str
    billions: float
    layers: int
    hidden: int
    vocabulary: int

    def forward_flops(self, length: int) -> float:
        """Per token: two per weight, and attention to half of `length` tokens."""
        return 2e9 * self.billions + 2 * self.layers * self.hidden * length


PHI4 = LanguageModel("Phi-4", 14.7, 40, 5120, 100_352)
TEACHERS = (
    LanguageModel("Qwen2.5-14B-Instruct", 14.8, 48, 5120, 152_064),
    LanguageModel("Qwen2.5-Coder-14B-Instruct", 14.8, 48, 5120, 152_064),
    LanguageModel("Mistral-Small-24B-Instruct", 23.6, 40, 5120, 131_072),
)


@dataclass(frozen=True)
class Inputs:
    """Every number that the model takes; `SOURCES` says where it comes from."""

    samples: int = 130_000
    length: int = 4096
    spread: float = 0.0
    k: int = 10
    peak: float = 989e12
    student_use: float = 0.40
    teacher_use: float = 0.50
    tax: float = 1.04
    teacher_tokens: float = 1.08
    teacher_padding: float = 0.09
    prepare_us: float = 3.0
    store_us: float = 3.0
    replica_us: float = 1.4
    call_ms: float = 5.0
    put_ms: float = 5.0
    node_bandwidth: float = 160e9
    network: float = 50e9
    cores: int = 64
    prefetch: int = 4
    batch: int = 128
    unit: int = 8
    student: LanguageModel = PHI4
    teachers: tuple[LanguageModel, ...] = TEACHERS


SOURCES = {
    "samples": "METHODS.md, section 4",
    "length": "METHODS.md, section 4; every sample counted as full, so an upper bound",
    "spread": "sigma of log-normal unit lengths with the same mean; 0: all alike",
    "k": "METHODS.md, section 1",
    "peak": "H800, bfloat16, dense, FLOP/s (NVIDIA's data sheet, as H100 SXM)",
    "student_use": "assumed share of peak in training, activations recomputed: 8 FLOP per weight and token",
    "teacher_use": "assumed share of peak in a forward pass over whole sequences",
    "tax": "jobs/bench/step.py: InfiGFusion over SFT in processor seconds; on a GPU it is to be measured",
    "teacher_tokens": "assumed: teachers' tokens per student token (they differ by tokenizer)",
    "teacher_padding": "jobs/bench/stream.py: padding of a teacher's batches, chat lengths",
    "prepare_us": "jobs/bench/stream.py, `prepare alone`: CPU microseconds per token, 3 teachers, store warm",
    "store_us": "jobs/bench/stream.py, `prepare alone`: what an empty store adds to it (encode, hash, write)",
    "replica_us": "jobs/bench/stream.py, raw actors: 2 cores / signals per second, an upper bound",
    "call_ms": "jobs/bench/stream.py: Serve handles over raw actors, per unit, rounded up",
    "put_ms": "assumed: latency of a write to the shared file system, per unit",
    "node_bandwidth": "NVLink of an H800, bytes/s each way (DeepSeek-V3 report, arXiv 2412.19437)",
    "network": "InfiniBand per GPU, bytes/s (the same report)",
    "cores": "assumed: processor cores of a node that prepare tasks may use",
    "prefetch": "default of student.prefetch: units in preparation per rank",
    "batch": "METHODS.md, section 3: samples per step (InfiFPO's; InfiFusion's is not known)",
    "unit": "default of data.unit_size: samples per unit",
}


@dataclass(frozen=True)
class Result:
    """Of one simulated epoch."""

    hours: float
    gpus: int
    student_busy: float
    waiting: float
    barrier: float
    teachers_busy: tuple[float, ...]
    cpu_busy: float
    store_bytes_s: float

    @property
    def gpu_hours(self) -> float:
        """GPUs times hours, idle ones included."""
        return self.hours * self.gpus


# --- costs of one unit ------------------------------


def student_seconds(inputs: Inputs, tokens: float) -> float:
    """Of a micro-step on one GPU: forward, backward (twice), recomputation; meanwhile a node gathers the weights."""
    compute = 4 * inputs.student.forward_flops(inputs.length) * tokens / (inputs.peak * inputs.student_use)
    gather = 3 * 2e9 * inputs.student.billions / inputs.node_bandwidth
    return max(compute * (inputs.tax if inputs.teachers else 1.0), gather)


def teacher_seconds(inputs: Inputs, teacher: LanguageModel, tokens: float) -> float:
    """Of a unit on one replica of one GPU."""
    work = teacher.forward_flops(inputs.length) * tokens * inputs.teacher_tokens / (1 - inputs.teacher_padding)
    return work / (inputs.peak * inputs.teacher_use)


def sync_seconds(inputs: Inputs, nodes: int) -> float:
    """Of a step: bfloat16 gradients, sharded over the 8 GPUs of a node, summed over the nodes."""
    return 0.0 if nodes == 1 else 2 * 2e9 * inputs.student.billions / 8 / inputs.network


def bytes_per_token(inputs: Inputs) -> int:
    """In the store, for one teacher: float16 and 3 bytes of id per rank, lse, token log-probability and a width."""
    return 5 * inputs.k + 9


# --- the simulation ------------------------------


def simulate(
    inputs: Inputs, nodes: int, ranks: int, replicas: tuple[int, ...], *, warm: bool = False, by_size: bool = True
) -> Result:
    """One epoch on `ranks` student GPUs and `replicas` of each teacher.

    `warm`: the store holds every answer. `by_size`: units are shared out by size, as rayfuse does; else in turn.
    """
    draw = random.Random(0)
    per_step = inputs.batch // inputs.unit
    assert per_step % ranks == 0, f"{ranks} ranks cannot share {per_step} units"
    steps = inputs.samples // inputs.batch
    shift = -(inputs.spread**2) / 2
    tokens = [inputs.unit * inputs.length * math.exp(draw.gauss(shift, inputs.spread)) for _ in range(steps * per_step)]
    ask = bool(inputs.teachers) and not warm
    cpu_s = [t * 1e-6 * (inputs.prepare_us + (inputs.store_us if ask else 0.0)) for t in tokens]
    free = [[0.0] * count for count in replicas]  # when each replica is done with what it has
    cpus = [0.0] * (nodes * inputs.cores)
    busy = [0.0] * len(replicas)
    ready: dict[int, float] = {}

    def prepare(unit: int, now: float) -> float:
        """When the unit's batch is at its rank, if its task starts now."""
        now = max(now, cpus[0]) + cpu_s[unit]
        heapq.heapreplace(cpus, now)
        if not ask:
            return now + inputs.call_ms / 1e3
        answers = []
        for s, teacher in enumerate(inputs.teachers):
            work = teacher_seconds(inputs, teacher, tokens[unit])
            done = max(now, free[s][0]) + work
            heapq.heapreplace(free[s], done)
            busy[s] += work
            answers.append(done + tokens[unit] * inputs.replica_us * 1e-6)
        return max(answers) + (inputs.call_ms + inputs.put_ms) / 1e3

    mine = per_step // ranks
    total = [0] * ranks
    pending: list[list[int]] = [[] for _ in range(ranks)]
    sizes = [round(t) if by_size else 1 for t in tokens]
    of_steps = [share_out(range(step * per_step, (step + 1) * per_step), sizes, ranks) for step in range(steps)]
    order = [[unit for shares in of_steps for unit in shares[rank]] for rank in range(ranks)]
    clock = [0.0] * ranks
    work_s = wait_s = barrier_s = 0.0
    sync = sync_seconds(inputs, nodes)

    def submit(rank: int, now: float) -> None:
        if total[rank] < len(order[rank]):
            unit = order[rank][total[rank]]
            total[rank] += 1
            pending[rank].append(unit)
            ready[unit] = prepare(unit, now)

    for _ in range(inputs.prefetch):
        for rank in range(ranks):
            submit(rank, 0.0)
    for _ in range(steps):
        for _ in range(mine):
            # Units are asked for in the order of time, so that the teachers' queues are first come, first served.
            for rank in sorted(range(ranks), key=clock.__getitem__):
                unit = pending[rank].pop(0)
                begun = max(clock[rank], ready.pop(unit))
                wait_s += begun - clock[rank]
                submit(rank, begun)
                seconds = student_seconds(inputs, tokens[unit])
                clock[rank] = begun + seconds
                work_s += seconds
        end = max(clock)
        barrier_s += sum(end - at for at in clock) + sync * ranks
        clock = [end + sync] * ranks
    length = clock[0]
    return Result(
        hours=length / 3600,
        gpus=ranks + sum(replicas) * (not warm),
        student_busy=work_s / length / ranks,
        waiting=wait_s / length / ranks,
        barrier=barrier_s / length / ranks,
        teachers_busy=tuple(b / length / count for b, count in zip(busy, replicas, strict=True)),
        cpu_busy=sum(cpu_s) / length / len(cpus),
        store_bytes_s=sum(tokens) * bytes_per_token(inputs) * len(inputs.teachers) / length,
    )


def split(inputs: Inputs, gpus: int) -> tuple[int, tuple[int, ...]]:
    """The fastest whole split: student ranks that divide the step's units, replicas in proportion to the teachers."""
    per_step = inputs.batch // inputs.unit
    best: tuple[float, int, tuple[int, ...]] | None = None
    tokens = inputs.unit * inputs.length
    costs = [teacher_seconds(inputs, teacher, tokens) for teacher in inputs.teachers]
    for ranks in range(min(4, per_step), gpus - len(costs) + 1):
        if per_step % ranks:
            continue
        replicas = [1] * len(costs)
        for _ in range(gpus - ranks - len(costs)):
            slowest = max(range(len(costs)), key=lambda s: costs[s] / replicas[s])
            replicas[slowest] += 1
        teachers = max((cost / count for cost, count in zip(costs, replicas, strict=True)), default=0.0)
        seconds = max(student_seconds(inputs, tokens) / ranks, teachers)
        if best is None or seconds < best[0] * 0.999:
            best = (seconds, ranks, tuple(replicas))
    assert best is not None
    return best[1], best[2]
