"""The Phi-4 run on 1, 8 and 64 nodes of 8 H800, by a discrete-event model fed with measured costs; prints scale.md.

    python jobs/bench/scale.py [--quick] > jobs/bench/scale.md       (half a minute, one core)

What is simulated: every unit of one epoch goes through a prepare task (CPU), three teachers (a queue in front of each
one's replicas), the store and the object store to its student rank; ranks hold `prefetch` units in preparation; every
optimiser step ends with a barrier over all ranks. GPU times are floating-point operations over peak and an assumed
utilisation; everything else was measured on a CPU by the other files of this folder. Nothing here was run on an H800.
"""

from __future__ import annotations

import argparse
import heapq
import math
import random
from dataclasses import dataclass, replace
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


# --- the page ------------------------------


def page(inputs: Inputs, nodes_list: tuple[int, ...]) -> None:
    """scale.md, on standard output."""
    print(
        "# The Phi-4 run on paper\n\n"
        "Made by `python jobs/bench/scale.py > jobs/bench/scale.md`. A simulation: no number on this page was measured "
        "on an H800.\n\n"
        f"One epoch of {inputs.samples:,} samples of {inputs.length:,} tokens "
        f"({inputs.samples * inputs.length / 1e6:.0f}M tokens), "
        f"three teachers, K = {inputs.k}, {inputs.batch} samples per step in units of {inputs.unit} "
        "unless a table says otherwise.\n"
    )
    print("## Where the time goes\n")
    print(
        "`cold`: an empty store, teachers and student at the same time on the nodes' GPUs. `warm`: every answer is "
        "stored (second\nepoch, ablation, rerun), the student has all GPUs that its batch can use. `SFT`: the same "
        "without teachers.\n"
    )
    head = ["nodes", "run", "units of", "student GPUs", "teacher GPUs", "hours", "GPU hours", "student computes"]
    head += ["waits for data", "barrier and sync", "busiest teacher", "CPUs busy", "store"]
    rows = []
    for nodes in nodes_list:
        gpus = 8 * nodes
        here = at_scale(inputs, nodes)
        sft = replace(here, teachers=())
        ranks, replicas = split(here, gpus)
        full = max(r for r in range(1, gpus + 1) if (here.batch // here.unit) % r == 0)
        cases = (
            ("SFT", sft, full, (), False),
            ("warm", here, full, (1,) * len(here.teachers), True),
            ("cold", here, ranks, replicas, False),
        )
        for name, case, r, t, warm in cases:
            result = simulate(case, nodes, r, t, warm=warm)
            rows.append(
                [
                    str(nodes),
                    name,
                    f"{case.unit} of {case.batch}",
                    str(r),
                    "+".join(map(str, t)) if not warm and t else "-",
                    f"{result.hours:.2f}",
                    f"{result.gpu_hours:.0f}",
                    f"{100 * result.student_busy:.1f} %",
                    f"{100 * result.waiting:.1f} %",
                    f"{100 * result.barrier:.1f} %",
                    f"{100 * max(result.teachers_busy):.0f} %" if t and not warm else "-",
                    f"{100 * result.cpu_busy:.2f} %",
                    f"{result.store_bytes_s / 1e6:.1f} MB/s" if t else "-",
                ]
            )
    table(head, rows)
    print("\n## What saturates first\n")
    first = at_scale(inputs, 1)
    tokens_s = 8 / (student_seconds(first, 1e6) + sum(teacher_seconds(first, t, 1e6) for t in first.teachers)) * 1e6
    per_core = 1e6 / (inputs.prepare_us + inputs.store_us + len(inputs.teachers) * inputs.replica_us)
    store = bytes_per_token(inputs) * len(inputs.teachers)
    table(
        ["resource", "a node of 8 GPUs offers", "the run asks of it", "used"],
        [
            ["GPUs, teachers and student together", f"{tokens_s:,.0f} tokens/s", "all of it", "100 %"],
            _use("prepare tasks and packing, tokens/s", per_core * inputs.cores, tokens_s),
            _use("network to the students, MB/s", 8 * inputs.network / 1e6, tokens_s * (28 * 3 + 24) / 1e6),
            _use("store writes, MB/s (a shared file system of 1 GB/s per node)", 1000, tokens_s * store / 1e6),
        ],
    )
    print(
        f"\nThe store of the whole data set: {inputs.samples * inputs.length * store / 1e9:.0f} GB "
        f"({bytes_per_token(inputs)} bytes per token and teacher). In order: GPUs, then the batch (no more student GPUs"
        "\nthan units in a step), then the barrier (units of unequal length), long before CPUs, network or store.\n"
    )
    print("## Unequal lengths at the barrier\n")
    print(
        "The workers meet at the end of each step. Its units are shared out so that every worker has about as many "
        "tokens\n(`units.share_out`); with one unit per worker there is nothing to choose.\n"
    )
    rows = []
    for nodes in nodes_list:
        for spread in (0.0, 0.3, 0.6):
            here = replace(at_scale(inputs, nodes), spread=spread)
            ranks, replicas = split(here, 8 * nodes)
            units = here.batch // here.unit // ranks
            row = [str(nodes), f"{spread:.1f}", str(units)]
            for by_size in (False, True):
                result = simulate(here, nodes, ranks, replicas, by_size=by_size)
                row += [f"{result.hours:.2f}", f"{100 * result.barrier:.1f} %"]
            rows.append(row)
    head = ["nodes", "sigma of unit lengths", "units per rank and step", "hours, dealt in turn", "lost at the barrier"]
    table([*head, "hours, shared out by size", "lost at the barrier"], rows)
    growth(inputs)
    print("\n## Inputs\n")
    sft = inputs.samples / inputs.unit * student_seconds(replace(inputs, teachers=()), inputs.unit * inputs.length)
    table(
        ["input", "value", "source"],
        [[name, f"{getattr(inputs, name):,g}", source] for name, source in SOURCES.items()]
        + [
            [m.name, f"{m.billions}B, {m.layers} x {m.hidden}, V {m.vocabulary:,}", "published configuration"]
            for m in (inputs.student, *inputs.teachers)
        ],
    )
    print(
        f"\nThe papers' SFT took 145 H800 hours; this page has {sft / 3600:.0f} for one full epoch. Several epochs or "
        "a lower share of peak\nmake up the difference; the ratios between rows do not depend on it."
    )


def growth(inputs: Inputs) -> None:
    """Cost per student token against teachers, K, length and vocabulary."""
    print("\n## How the cost grows\n")
    print("GPU microseconds per student token; `cold` holds the teachers, `warm` does not.\n")

    def row(what: str, value: str, case: Inputs) -> list[str]:
        tokens = float(case.unit * case.length)
        sft = student_seconds(replace(case, teachers=()), tokens) / tokens * 1e6
        warm = student_seconds(case, tokens) / tokens * 1e6
        cold = warm + sum(teacher_seconds(case, t, tokens) for t in case.teachers) / tokens * 1e6
        size = bytes_per_token(case) * len(case.teachers)
        cells = [what, value, f"{sft:.0f}", f"{warm:.0f}", f"{cold:.0f}", f"{cold / sft:.2f}", f"{size:,}"]
        return [*cells, f"{size * case.samples * case.length / 1e9:,.0f} GB"]

    rows = [row("teachers", str(s), replace(inputs, teachers=(TEACHERS * 2)[:s])) for s in (1, 2, 3, 6)]
    rows += [row("K", str(k), replace(inputs, k=k)) for k in (10, 32, 100, 1000)]
    rows += [row("length", f"{n:,}", replace(inputs, length=n)) for n in (1024, 4096, 16384, 65536)]
    for vocabulary in (32_000, 100_352, 151_936, 262_144):
        change = (vocabulary - PHI4.vocabulary) * PHI4.hidden / 1e9
        student = PHI4._replace(vocabulary=vocabulary, billions=PHI4.billions + change)
        rows.append(row("student's vocabulary", f"{vocabulary:,}", replace(inputs, student=student)))
    head = ["grows", "to", "SFT", "warm", "cold", "cold / SFT", "store bytes per token", "store"]
    table(head, rows)
    print(
        "\nK costs memory and disk, not time: the loss is K x H per position where the head is V x H. Teachers add "
        "their forward\npass, once per data set. Length adds attention on both sides. The vocabulary is paid once, in "
        "the head's product,\nwith or without teachers; full-vocabulary losses pay it again for every teacher."
    )


def at_scale(inputs: Inputs, nodes: int) -> Inputs:
    """Units small enough, and a batch large enough, that every GPU of the cluster can have a unit of each step."""
    gpus = 8 * nodes
    batch = max(inputs.batch, gpus)
    unit = inputs.unit
    while unit > 1 and batch // unit < gpus:
        unit //= 2
    return replace(inputs, batch=batch, unit=unit)


def _use(name: str, offered: float, asked: float) -> list[str]:
    return [name, f"{offered:,.0f}", f"{asked:,.1f}", f"{100 * asked / offered:.2f} %"]


def table(head: list[str], rows: list[list[str]]) -> None:
    """A Markdown table."""
    for row in (head, ["---"] * len(head), *rows):
        print("| " + " | ".join(row) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student-use", type=float, default=Inputs.student_use, help="share of peak in training")
    parser.add_argument("--teacher-use", type=float, default=Inputs.teacher_use, help="share of peak in scoring")
    parser.add_argument("--quick", action="store_true", help="2,048 samples and two cluster sizes")
    args = parser.parse_args()
    inputs = Inputs(student_use=args.student_use, teacher_use=args.teacher_use)
    page(replace(inputs, samples=2048) if args.quick else inputs, (1, 8) if args.quick else (1, 8, 64))


if __name__ == "__main__":
    main()
