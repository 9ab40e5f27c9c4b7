"""A plan as text, in lines that are the same on every terminal, and as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from rayfuse.plan.estimate import Plan, StagePlan
from rayfuse.plan.memory import Memory
from rayfuse.plan.roofline import PROCESSOR_USE, STUDENT_USE, TEACHER_USE
from rayfuse.plan.shapes import short_count

GB = 1e9


def plan_lines(plan: Plan, price: float | None = None) -> Iterator[str]:
    """The plan, line by line."""
    yield f"on         {plan.hardware} ({plan.hardware.device.memory / GB:.1f} GB each)"
    yield from _models(plan)
    yield ""
    yield from _memory_lines(plan)
    yield ""
    yield from _time_lines(plan)
    yield from _totals(plan, price)
    yield ""
    yield from _verdict(plan)


def _models(plan: Plan) -> Iterator[str]:
    for name, shape in {"student": plan.student, **plan.teachers}.items():
        stored = f", {shape.stored / GB:.1f} GB of files" if shape.stored is not None else ""
        yield (
            f"{name:<10} {shape.name}: {short_count(shape.parameters)} parameters, {shape.layers} layers of "
            f"{shape.hidden:,}, vocabulary {shape.vocabulary:,}{stored} ({shape.origin})"
        )


def _memory_lines(plan: Plan) -> Iterator[str]:
    yield "memory per device, GB"
    for memory in plan.memories:
        mark = "" if memory.fits else "  DOES NOT FIT"
        largest = memory.terms[0].name
        yield f"  {memory.what}: {memory.total / GB:.1f} of {memory.room / GB:.1f}, largest: {largest}{mark}"
        for term in memory.terms:
            if term.bytes >= 0.005 * memory.total:
                yield f"    {term.bytes / GB:8.2f}  {term.name} ({term.why})"
    if plan.host_bytes:
        yield f"  host, per node: {plan.host_bytes / GB:.0f} for what is offloaded"


def _time_lines(plan: Plan) -> Iterator[str]:
    papers = any(stage.paper for stage in plan.stages)
    head = ["stage", "steps", "tokens", "s/step", "bound by", "teachers h", "hours", "devices", "GPU hours"]
    rows = [_row(stage, papers) for stage in plan.stages]
    yield from table([*head, *(["paper's GPU hours"] if papers else [])], rows)
    device = plan.hardware.device
    uses = (
        f"{STUDENT_USE:.0%} of it in training (recomputation counted), {TEACHER_USE:.0%} in scoring; link "
        f"{device.link / GB:,.0f} GB/s"
        if device.cuda
        else f"{PROCESSOR_USE:.0%} of it, and activations through memory"
    )
    yield (
        f"roofline   {device.peak / 1e12:,.3g} TFLOP/s each, {uses}; memory {device.bandwidth / GB:,.0f} GB/s; "
        "teachers' answers are computed once"
    )
    kind = "mean, as given" if plan.measured else "every sample as long as max_length: an upper bound, see --length"
    yield f"length     {plan.length:,.0f} tokens a sample ({kind})"


def _row(stage: StagePlan, papers: bool) -> list[str]:
    scoring = sum(stage.scoring.values()) / 3600
    row = [
        stage.name + (f" x {stage.students}" if stage.students > 1 else ""),
        f"{stage.work.steps:,}",
        short_count(stage.work.tokens),
        f"{stage.step.seconds:.2f}",
        stage.step.bound,
        f"{stage.teachers_first:.1f}" if stage.teachers_first else (f"({scoring:.1f} GPU h)" if scoring else "-"),
        f"{stage.hours:.2f}",
        str(stage.devices),
        f"{stage.device_hours:.1f}",
    ]
    return [*row, *([f"{stage.paper:g}" if stage.paper else "-"] if papers else [])]


def _totals(plan: Plan, price: float | None) -> Iterator[str]:
    yield f"total      {plan.hours:.1f} hours, {plan.device_hours:.0f} GPU hours"
    if price is not None:
        yield f"cost       {plan.device_hours * price:,.0f} at {price:g} per GPU hour"
    yield (
        f"store      {plan.objects:,} objects, {plan.store_bytes / GB:.1f} GB (top {plan.k} of every position)"
        if plan.objects
        else "store      nothing: no stage asks a teacher"
    )


def _verdict(plan: Plan) -> Iterator[str]:
    for fault in plan.faults:
        yield f"does not fit: {fault}"
    if plan.chosen is None:
        yield "choice     none fits"
        return
    setup, memory = plan.chosen
    yield f"choice     {setup}: {memory.total / GB:.1f} GB a rank"
    if plan.choice:
        yield "           " + " ".join(f"{key}={_yaml(value)}" for key, value in plan.choice.items())
    else:
        yield "           as configured"


def _yaml(value: Any) -> str:
    return {True: "true", False: "false"}.get(value, str(value)) if isinstance(value, bool) else str(value)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Columns of equal width, numbers to the right."""
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    for row in (head, *rows):
        cells = [
            cell.ljust(width) if column in (0, 4) else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield "  ".join(cells).rstrip()


def plan_json(plan: Plan, price: float | None = None) -> str:
    """The plan for programs: bytes, seconds and hours."""
    tree = {
        "hardware": {
            "devices": plan.hardware.devices,
            "nodes": plan.hardware.nodes,
            "device": plan.hardware.device.name,
        },
        "models": {
            name: {"model": shape.name, "parameters": shape.parameters, "origin": shape.origin}
            for name, shape in {"student": plan.student, **plan.teachers}.items()
        },
        "memory": [_memory_tree(memory) for memory in plan.memories],
        "stages": [_stage_tree(stage) for stage in plan.stages],
        "store": {"objects": plan.objects, "bytes": round(plan.store_bytes)},
        "hours": plan.hours,
        "gpu_hours": plan.device_hours,
        "cost": None if price is None else plan.device_hours * price,
        "fits": not plan.faults,
        "faults": list(plan.faults),
        "choice": dict(plan.choice),
    }
    return json.dumps(tree, indent=2)


def _memory_tree(memory: Memory) -> dict[str, Any]:
    return {
        "what": memory.what,
        "bytes": round(memory.total),
        "room": round(memory.room),
        "fits": memory.fits,
        "largest": memory.terms[0].name,
        "terms": {term.name: round(term.bytes) for term in memory.terms},
    }


def _stage_tree(stage: StagePlan) -> dict[str, Any]:
    return {
        "stage": stage.name,
        "steps": stage.work.steps,
        "tokens": stage.work.tokens,
        "seconds_per_step": stage.step.seconds,
        "bound": stage.step.bound,
        "teachers_gpu_hours": {name: seconds / 3600 for name, seconds in stage.scoring.items()},
        "hours": stage.hours,
        "devices": stage.devices,
        "gpu_hours": stage.device_hours,
        "paper_gpu_hours": stage.paper,
    }
