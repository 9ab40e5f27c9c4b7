"""Seconds of a step by rooflines: products over the device's peak, traffic over its memory's bandwidth and links."""

from __future__ import annotations

from dataclasses import dataclass

from rayfuse.config import Teacher
from rayfuse.plan.activations import Activations
from rayfuse.plan.hardware import Device, Hardware
from rayfuse.plan.memory import BYTES, Setup
from rayfuse.plan.shapes import Shape

STUDENT_USE = 0.40
"""Assumed share of a GPU's peak in training: every FLOP counted, recomputation too."""
TEACHER_USE = 0.50
"""The same in a forward pass over whole sequences."""
PROCESSOR_USE = 0.65
"""Of a processor, whose best float32 product is measured here; chosen by jobs/bench/plan.py."""
TEACHER_TOKENS = 1.08
"""Assumed tokens of a teacher per student token."""
TEACHER_PADDING = 0.09
"""Padding of a teacher's batches, measured on chat lengths by jobs/bench/stream.py."""
UPDATE_BYTES = 40
"""Of a weight in an optimiser step: norm, clipping, and AdamW's reads and writes in float32."""
HOST_LINK = 25e9
"""Bytes/s between a GPU and its host, PCIe 4 or 5 as it is reached."""
HOST_BANDWIDTH = 200e9
"""Bytes/s of a host's memory, shared by the ranks of a node."""
TOUCHES = 4
"""How often a kept activation passes the memory: written, read in backward, and its gradient written and read."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimiser step of one rank.

    Attributes:
        compute: products, at the assumed share of the peak.
        traffic: activations through memory, where the assumed share does not hold it already.
        gather: weights and gradients of a sharded engine, beyond what computing hides.
        reduce: gradients between the ranks, once a step.
        update: the optimiser.
    """

    compute: float
    traffic: float
    gather: float
    reduce: float
    update: float

    @property
    def seconds(self) -> float:
        """All of it."""
        return self.compute + self.traffic + self.gather + self.reduce + self.update

    @property
    def bound(self) -> str:
        """The largest part."""
        parts = {"compute": self.compute, "memory traffic": self.traffic, "gathering weights": self.gather}
        parts |= {"reducing gradients": self.reduce, "the optimiser": self.update}
        return max(parts, key=parts.__getitem__)


def student_use(device: Device) -> float:
    """Share of the peak that the plan counts on in training."""
    return STUDENT_USE if device.cuda else PROCESSOR_USE


def training_flops(shape: Shape, setup: Setup, length: float) -> float:
    """Per token: forward and twice that backward, recomputation, and the head once more where its loss asks for it."""
    passes = 4 if setup.checkpointing else 3
    return passes * shape.layer_flops(length) + (4 if setup.lse_gradient else 3) * shape.head_flops


def step_time(
    shape: Shape, setup: Setup, hardware: Hardware, acts: Activations, *, length: float, tokens: float | None = None
) -> StepTime:
    """A rank's optimiser step of `setup.micro_steps` micro-steps.

    Args:
        shape: the student.
        setup: how it is trained.
        hardware: on what.
        acts: what its largest micro-step keeps.
        length: mean tokens of a sequence.
        tokens: of a micro-step; default: batch x length.
    """
    device, ranks = hardware.device, setup.workers
    tokens = setup.batch * length if tokens is None else tokens
    compute = tokens * training_flops(shape, setup, length) / (device.peak * student_use(device))
    traffic = 0.0
    if not device.cuda:
        full = acts.kept(shape.layers, checkpointing=False) * tokens / setup.tokens
        traffic = TOUCHES * full / device.bandwidth
    link = device.link if ranks <= hardware.per_node else min(device.link, device.network)
    others = (ranks - 1) / ranks
    element = BYTES[setup.dtype]
    gather = reduce = 0.0
    if setup.zero_stage >= 3:  # forward, backward, and the gradients' way back, in every micro-step
        gather = max(0.0, 3 * element * shape.parameters * others / link - compute)
    elif ranks > 1:
        exchanged = 4 if setup.engine == "ddp" else element
        reduce = 2 * exchanged * shape.trained * others / link
    update = UPDATE_BYTES * shape.trained / setup.shares / device.bandwidth
    if setup.offload != "none":  # gradients to the host, its update, and the weights back
        local = min(ranks, hardware.per_node)
        moved = 2 * element * shape.trained / setup.shares / HOST_LINK
        update = UPDATE_BYTES * shape.trained / setup.shares * local / HOST_BANDWIDTH + moved
    times = setup.micro_steps
    return StepTime(times * compute, times * traffic, times * gather, reduce, update)


def scoring_seconds(teacher: Teacher, shape: Shape, device: Device, tokens: float, length: float) -> float:
    """Device-seconds in which a teacher scores `tokens` student tokens of text."""
    flops = shape.layer_flops(length) + shape.head_flops
    if not device.cuda:
        return tokens * TEACHER_TOKENS / (1 - TEACHER_PADDING) * flops / (device.peak * PROCESSOR_USE)
    peak = device.peak if BYTES[teacher.autocast or teacher.dtype] == 2 else device.peak / 16
    return tokens * TEACHER_TOKENS / (1 - TEACHER_PADDING) * flops / (peak * TEACHER_USE)
