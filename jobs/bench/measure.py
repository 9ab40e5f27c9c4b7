"""What the benchmarks share: the machine in one line, medians of alternated runs, peak extra memory, and what a process
and all that it started use.

python jobs/bench/measure.py        prints the machine
"""

import contextlib
import gc
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def machine() -> str:
    """Processor, threads in use, torch, and the load of the last minute: a busy machine makes noisy numbers."""
    model = [
        line.split(":")[1].strip()
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        if "model name" in line
    ]
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return (
        f"machine: {model[0] if model else platform.processor()}, {torch.get_num_threads()} threads{gpu}, "
        f"torch {torch.__version__}, load {os.getloadavg()[0]:.1f}"
    )


def alternate(
    cases: dict[str, Callable[[], Any]],
    runs: int,
    device: str = "cpu",
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, tuple[float, float]]:
    """Median milliseconds and peak extra MiB of each case; the cases take turns, after one round that is not counted.

    With time.process_time as the clock, what other processes do counts little. Peak memory is the high-water mark of
    resident memory (or of CUDA's allocator) over the size before the case ran.
    """
    times: dict[str, list[float]] = {name: [] for name in cases}
    peaks: dict[str, list[float]] = {name: [] for name in cases}
    for run in range(runs + 1):
        for name, case in cases.items():
            gc.collect()
            before = _reset_peak(device)
            start = clock()
            kept = case()
            if device == "cuda":
                torch.cuda.synchronize()
            elapsed = (clock() - start) * 1e3
            peak = (_peak(device) - before) / 2**20
            del kept
            if run:
                times[name].append(elapsed)
                peaks[name].append(peak)
    return {name: (statistics.median(times[name]), statistics.median(peaks[name])) for name in cases}


def _reset_peak(device: str) -> int:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    return _status("VmRSS")


def _peak(device: str) -> int:
    return torch.cuda.max_memory_allocated() if device == "cuda" else _status("VmHWM")


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


# --- a process and all that it started ------------------------------


def descendants(root: int) -> list[int]:
    """A process and everything it started, by process id."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):  # it ended meanwhile
                parent = int((folder / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()[1])
                children.setdefault(parent, []).append(int(folder.name))
    found = [root]
    for pid in found:
        found += children.get(pid, [])
    return found


def processor_seconds(family: list[int]) -> dict[int, float]:
    """Processor seconds of each process up to now, user's and system's; those that ended are left out."""
    seconds = {}
    for pid in family:
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
            seconds[pid] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return seconds


def resident_bytes(family: list[int]) -> int:
    """Proportional resident bytes (PSS) of some processes: shared pages count once."""
    total = 0
    for pid in family:
        with contextlib.suppress(OSError, StopIteration):
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="utf-8").splitlines()
            total += next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
    return total


if __name__ == "__main__":
    print(machine())
