"""Whole runs whose student writes the texts that it learns from."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from rayfuse.metrics.records import read_metrics

RAYFUSE = str(Path(sys.executable).with_name("rayfuse"))
STEPS, AGE = 14, 1
STAGE = {
    "method": "onpolicy",
    "steps": STEPS,
    "batch_size": 16,
    "learning_rate": 1e-3,
    "save_every": 5,
    "share": 0.5,
    "max_age": AGE,
    "max_new_tokens": 16,
    "prefix": 0.5,
}

pytestmark = pytest.mark.slow


def _start(config, *options):
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    return subprocess.Popen(
        [RAYFUSE, "fuse", str(config), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**environment, "PYTHONUNBUFFERED": "1"},
    )


def _metrics(folder):
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _write(tiny, folder, **changes):
    config = folder.with_suffix(".yaml")
    config.write_text(yaml.safe_dump(tiny.tree(folder, stages=[STAGE], **changes)))
    return config


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    """An undisturbed run."""
    folder = tmp_path_factory.mktemp("on-policy") / "whole"
    process = _start(_write(tiny, folder))
    output, _ = process.communicate(timeout=500)
    assert process.returncode == 0, output
    return folder


def test_every_step_says_what_the_student_wrote(whole):
    records = _metrics(whole)
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    assert [record["rollout_age"] for record in records] == [0] + [AGE] * (STEPS - 1)
    for record in records:
        own = record["rollout_share"] * 16
        assert own + record["rollout_empty"] == 8
        assert 0 < record["rollout_tokens"] <= 16 * own
        asked = [record[f"{kind}/math"] for kind in ("forwarded", "stored")]
        assert sum(asked) == own, "the teachers read the student's own texts, and no others"
        own_tokens = record["rollout_tokens"] + own
        shares = sum(record[f"routed/{teacher}"] for teacher in ("math", "code"))
        assert shares == pytest.approx(own_tokens / record["tokens"])
    longest = max(record["rollout_tokens"] / max(1, record["rollout_share"] * 16) for record in records[:3])
    assert longest <= 9, "the prefix begins at half of max_new_tokens"
    page = (whole / "report.html").read_text()
    assert "age of the rollouts" in page
    assert "`onpolicy`" in (whole / "model/README.md").read_text()


def test_a_killed_and_resumed_run_ends_with_the_same_bits(whole, tiny, tmp_path):
    folder = tmp_path / "killed"
    config = _write(tiny, folder)
    killed = _start(config)
    deadline = time.monotonic() + 500
    while len(_metrics(folder)) < 8:
        assert killed.poll() is None, killed.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.005)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    time.sleep(3)
    resumed = _start(config, "--resume")
    output, _ = resumed.communicate(timeout=500)
    assert resumed.returncode == 0, output
    steps = [record["step"] for record in _metrics(folder)]
    assert steps.count(1) == 1, "the resumed run must go on from a checkpoint, not from the start"
    assert steps.count(6) == 2, "step 6 was done and is done again from the checkpoint of step 5"
    timing = {"time", "seconds", "tokens_per_second", "wait_share", "rollout_seconds"}
    found = ("forwarded/", "stored/")

    def told(of_run):
        records = {record["step"]: record for record in read_metrics(of_run / "metrics.jsonl")}
        return [
            {key: value for key, value in records[step].items() if key not in timing and not key.startswith(found)}
            for step in range(1, STEPS + 1)
        ]

    assert told(folder) == told(whole)
    mine, twin = (load_file(one / "model/model.safetensors") for one in (folder, whole))
    assert set(mine) == set(twin)
    for name, value in twin.items():
        assert mine[name].numpy().tobytes() == value.numpy().tobytes()
