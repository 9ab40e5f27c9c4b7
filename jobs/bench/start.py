"""What it costs to start: a run of two optimiser steps with two tiny teachers, part by part.

python jobs/bench/start.py [--runs 3] [--stages 1] [--processes]

Nearly all of such a run is starting: processes, imports, waiting intervals. Every part gets its seconds and the
processor seconds of everything that the run started, as medians over the runs; on a busy machine only the second is
worth reading. `--processes` adds who used them.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from measure import descendants, machine, processor_seconds

from rayfuse.quickstart.skills import make
from rayfuse.quickstart.tiny_models import STYLES, make_model, make_tokenizer, save

BEFORE, AFTER = "import, check", "report, shut down"
"""What is in no part of the run."""


def make_world(root: Path, stages: int) -> Path:
    """Untrained models, two data files and the run's configuration in `root`."""
    rows = [row for skill in ("math", "code", "instruct") for row in make(skill, 40, seed=1)]
    texts = [f"{row['prompt']} {row['response']}" for row in rows]
    for seed, (name, style) in enumerate(STYLES.items()):
        tokenizer = make_tokenizer(style, texts)
        save(make_model(tokenizer, seed, hidden=32, layers=1), tokenizer, root / name)
    for name, part in (("train", rows), ("eval", rows[::14])):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
    config = {
        "student": str(root / "pivot"),
        "teachers": [{"model": str(root / name), "dtype": "float32"} for name in ("math", "code")],
        "data": {"path": str(root / "train.jsonl"), "unit_size": 8, "max_length": 200},
        "stages": [{"method": "infifusion", "steps": 2, "batch_size": 16} for _ in range(stages)],
        "signals": {"k": 5},
        "evaluate": {"path": str(root / "eval.jsonl"), "max_new_tokens": 16},
        "output": str(root / "run"),
    }
    (root / "run.yaml").write_text(json.dumps(config), encoding="utf-8")
    return root / "run.yaml"


def name_of(pid: int) -> str:
    """What a process is, in a word."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return ""
    if words[0].startswith("ray::"):
        return words[0].partition(".")[0].partition(":rayfuse")[0]
    known = ("gcs_server", "raylet", "agent.py", "main.py", "log_monitor", "monitor.py", "default_worker", "cli")
    line = " ".join(words[:4])
    return next((name for name in known if name in line), Path(words[0]).name)


def measure_run(config: Path, output: Path) -> tuple[dict[str, tuple[float, float]], Counter[str]]:
    """Run once: part -> (seconds, processor seconds of the whole family), and processor seconds by process."""
    times, log = output / "times.json", output.parent / "log.txt"
    command = [sys.executable, "-m", "rayfuse.cli", "fuse", str(config), f"output={output}"]
    used: dict[int, float] = {}
    names: dict[int, str] = {}
    parts: dict[str, tuple[float, float]] = {}
    begun, before, ended = time.monotonic(), 0.0, 0.0
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        while process.poll() is None:
            family = descendants(process.pid)
            used.update(processor_seconds(family))
            names.update({pid: name for pid in family if (name := name_of(pid)) and name != "ray::IDLE"})
            done = json.loads(times.read_text(encoding="utf-8")) if times.exists() else {}
            for part in [part for part in done if part not in parts]:
                now, total = time.monotonic() - begun, sum(used.values())
                if not parts:
                    parts[BEFORE] = (now - done[part], 0.0)  # its processor time counts with the first part
                parts[part] = (done[part], total - before)
                before, ended = total, now
            time.sleep(0.1)
    if process.returncode:
        raise SystemExit(f"the run failed:\n{log.read_text(encoding='utf-8', errors='replace')[-3000:]}")
    parts[AFTER] = (time.monotonic() - begun - ended, sum(used.values()) - before)
    parts["all"] = (time.monotonic() - begun, sum(used.values()))
    by_process: Counter[str] = Counter()
    for pid, seconds in used.items():
        by_process[names.get(pid, "?")] += seconds
    return parts, by_process


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--stages", type=int, default=1)
    parser.add_argument("--processes", action="store_true", help="also the processor seconds of each kind of process")
    parser.add_argument("--quick", action="store_true", help="one run only, to see that it works")
    arguments = parser.parse_args()
    print(machine())
    with tempfile.TemporaryDirectory(prefix="start-") as folder:
        root = Path(folder)
        config = make_world(root, arguments.stages)
        runs, loads = [], []
        for index in range(1 if arguments.quick else arguments.runs):
            runs.append(measure_run(config, root / f"run-{index}"))
            loads.append(os.getloadavg()[0])
    print(f"load after each run: {', '.join(f'{load:.1f}' for load in loads)}")
    print(f"{'part':24}{'seconds':>10}{'processor s':>14}")
    for part in runs[0][0]:
        wall, processor = (statistics.median(parts[part][i] for parts, _ in runs) for i in (0, 1))
        print(f"{part:24}{wall:10.1f}{processor:14.1f}")
    if arguments.processes:
        for name in sorted({name for _, processes in runs for name in processes}):
            print(f"  {name:40}{statistics.median(processes[name] for _, processes in runs):10.1f}")
