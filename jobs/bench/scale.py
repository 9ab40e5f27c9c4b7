"""The Phi-4 run on 1, 8 and 64 nodes of 8 H800, by a discrete-event model fed with measured costs; prints scale.md.

    python jobs/bench/scale.py [--quick] > jobs/bench/scale.md       (half a minute, one core)

What is simulated: every unit of one epoch goes through a prepare task (CPU), three teachers (a queue in front of each
one's replicas), the store and the object store to its student rank; ranks hold `prefetch` units in preparation; every
optimiser step ends with a barrier over all ranks. GPU times are floating-point operations over peak and an assumed
utilisation; everything else was measured on a CPU by the other files of this folder. Nothing here was run on an H800.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

from rayfuse.plan.time import (
    PHI4,
    SOURCES,
    TEACHERS,
    Inputs,
    bytes_per_token,
    simulate,
    split,
    student_seconds,
    teacher_seconds,
)

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
