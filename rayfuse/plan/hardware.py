"""What a run is planned for: processors by name, from their makers' data sheets, or this machine as it measures."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError, model_validator

from rayfuse.config.section import Section
from rayfuse.errors import PlanError

GB = 1e9


@dataclass(frozen=True)
class Device:
    """A processor that holds a rank or a replica.

    Attributes:
        name: for people.
        memory: bytes that can be used.
        peak: FLOP/s of dense products in the training's number format, without sparsity.
        bandwidth: bytes/s of its memory.
        link: bytes/s each way to the other devices of its node.
        network: bytes/s each way to another node.
        cuda: whether a GPU.
        cores: of a node, for prepare tasks.
    """

    name: str
    memory: float
    peak: float
    bandwidth: float
    link: float
    network: float = 50 * GB
    cuda: bool = True
    cores: int = 64


def _gpu(name: str, gb: float, tflops: float, gb_s: float, link: float) -> Device:
    # A card of 80 GB shows 80 GB to a process but for about 1 % that the driver keeps.
    return Device(name, 0.99 * gb * GB, tflops * 1e12, gb_s * GB, link * GB)


GPUS = {
    "b200": _gpu("B200", 180, 2250, 8000, 900),
    "h200": _gpu("H200", 141, 989, 4800, 450),
    "h100": _gpu("H100 SXM", 80, 989, 3350, 450),
    "h800": _gpu("H800 SXM", 80, 989, 3350, 160),
    "a100": _gpu("A100 SXM 80 GB", 80, 312, 2039, 300),
    "a100-40gb": _gpu("A100 SXM 40 GB", 40, 312, 1555, 300),
    "a800": _gpu("A800 SXM", 80, 312, 2039, 200),
    "l40s": _gpu("L40S", 48, 362, 864, 32),
    "l4": _gpu("L4", 24, 121, 300, 32),
    "a10g": _gpu("A10G", 24, 70, 600, 32),
    "rtx4090": _gpu("RTX 4090", 24, 165, 1008, 32),
    "t4": _gpu("T4", 16, 65, 300, 16),
}
"""By NVIDIA's data sheets: memory (GB), bfloat16 (T4: float16) without sparsity (TFLOP/s), memory bandwidth (GB/s),
NVLink or PCIe each way (GB/s; H800: DeepSeek-V3 report, arXiv 2412.19437)."""


@dataclass(frozen=True)
class Hardware:
    """Nodes of equal devices.

    Attributes:
        device: each of them.
        nodes: how many nodes.
        per_node: devices of a node.
    """

    device: Device
    nodes: int
    per_node: int

    @property
    def devices(self) -> int:
        """All of them."""
        return self.nodes * self.per_node

    def __str__(self) -> str:
        count = f"{self.nodes} x {self.per_node}" if self.nodes > 1 else str(self.per_node)
        return f"{count} {self.device.name}"


class ClusterFile(Section):
    """A cluster to plan for; what is given beside `gpu` replaces its data sheet's number."""

    gpu: str | None = Field(None, description=f"one of {', '.join(GPUS)}, or a name of your own with all numbers below")
    nodes: int = Field(1, ge=1, description="nodes with GPUs")
    gpus_per_node: int = Field(8, ge=1, description="GPUs of each")
    cores: int = Field(64, ge=1, description="processor cores of a node for prepare tasks")
    memory_gb: float | None = Field(None, gt=0, description="of a GPU")
    tflops: float | None = Field(None, gt=0, description="bfloat16, dense")
    memory_gb_s: float | None = Field(None, gt=0, description="bandwidth of a GPU's memory")
    link_gb_s: float | None = Field(None, gt=0, description="between GPUs of a node, each way")
    network_gb_s: float = Field(50.0, gt=0, description="between nodes, each way and GPU")

    @model_validator(mode="after")
    def _numbers_are_known(self) -> ClusterFile:
        own = (self.memory_gb, self.tflops, self.memory_gb_s, self.link_gb_s)
        if (self.gpu or "").lower() not in GPUS and None in own:
            raise ValueError(
                f"gpu {self.gpu!r} is not known ({', '.join(GPUS)}); of another give memory_gb, tflops, memory_gb_s "
                "and link_gb_s"
            )
        return self

    def hardware(self) -> Hardware:
        """What it describes."""
        base = GPUS.get((self.gpu or "").lower()) or Device(self.gpu or "GPU", 0, 0, 0, 0)
        given = {"memory": self.memory_gb, "bandwidth": self.memory_gb_s, "link": self.link_gb_s}
        changes: dict[str, Any] = {key: value * GB for key, value in given.items() if value is not None}
        if self.tflops is not None:
            changes["peak"] = self.tflops * 1e12
        device = replace(base, **changes, network=self.network_gb_s * GB, cores=self.cores)
        return Hardware(device, self.nodes, self.gpus_per_node)


def read_cluster(path: Path) -> Hardware:
    """The hardware that a YAML file describes, see ClusterFile.

    Raises:
        PlanError: it cannot be read, or a key is wrong.
    """
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise PlanError(f"cannot read the cluster {path}: {error}") from error
    if not isinstance(tree, dict):
        raise PlanError(f"the cluster {path} must hold keys and values (gpu, nodes, gpus_per_node), not {tree!r:.80}")
    try:
        return ClusterFile.model_validate(tree).hardware()
    except ValidationError as error:
        faults = [
            f"  {'.'.join(map(str, fault['loc'])) or 'the file'}: {fault['msg'].removeprefix('Value error, ')}"
            for fault in error.errors()
        ]
        raise PlanError(f"the cluster {path} is wrong:\n" + "\n".join(faults)) from None


def named_gpus(gpus: int, gpu: str) -> Hardware:
    """`gpus` devices of this name; more than 8 are nodes of 8.

    Raises:
        PlanError: the name is not known, or the number cannot be nodes of 8.
    """
    if gpu.lower() not in GPUS:
        raise PlanError(f"--gpu {gpu} is not known; there are: {', '.join(GPUS)}. Describe another by --cluster FILE")
    if gpus < 1 or (gpus > 8 and gpus % 8):
        raise PlanError(
            f"--gpus {gpus}: give 1 to 8, or a multiple of 8 (nodes of 8); or describe them by --cluster FILE"
        )
    return Hardware(GPUS[gpu.lower()], max(1, gpus // 8), min(gpus, 8))


def this_machine(threads: int = 1, workers: int = 1) -> Hardware:
    """The processors of this machine, as one device per worker of `threads` cores that share its memory.

    Products and copies are timed for about a second: how fast float32 is here, nothing else tells.
    """
    import psutil

    peak, bandwidth = measure_processor(threads)
    device = Device(
        name=f"worker of {threads} core{'s' * (threads > 1)} of this machine",
        memory=psutil.virtual_memory().total / workers,
        peak=peak,
        bandwidth=bandwidth,
        link=bandwidth / 4,  # gloo over loopback copies more than once
        network=bandwidth / 4,
        cuda=False,
        cores=os.cpu_count() or 1,
    )
    return Hardware(device, 1, workers)


def measure_processor(threads: int, seconds: float = 0.5) -> tuple[float, float]:
    """FLOP/s of a float32 product, and bytes/s of an in-place sum (two reads, one write), on `threads` cores."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(max(1, threads))
    try:
        a, b = torch.ones(512, 1024), torch.ones(1024, 1024)
        c, d = torch.ones(2**23), torch.ones(2**23)
        # Of one thread the processor's time is taken, so that what else the machine does counts little.
        clock = time.process_time if threads <= 1 else time.perf_counter
        product = _best(lambda: a @ b, seconds, clock)
        total = _best(lambda: c.add_(d), seconds, clock)
    finally:
        torch.set_num_threads(before)
    return 2 * 512 * 1024 * 1024 / product, 3 * 4 * 2**23 / total


def _best(work: Callable[[], Any], seconds: float, clock: Callable[[], float]) -> float:
    """The shortest of the runs of `work` within about `seconds`, after one that is not counted."""
    work()
    end, best = clock() + seconds, float("inf")
    while (begun := clock()) < end:
        work()
        best = min(best, clock() - begun)
    return best
