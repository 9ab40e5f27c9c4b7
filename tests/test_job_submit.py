"""A run through `ray job submit` on a real local head node, with its own ports, folder and token."""

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
RAY = str(Path(sys.executable).with_name("ray"))


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for item in sockets:
        item.bind(("127.0.0.1", 0))
    ports = [item.getsockname()[1] for item in sockets]
    for item in sockets:
        item.close()
    return ports


@pytest.fixture
def head(tmp_path_factory):
    """Environment and address of a head node that this test started and ends."""
    port, dashboard, agent, client = _free_ports(4)
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16)}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    # Unix sockets have short names: the folder must too.
    folder = Path(f"/tmp/rayfuse-{os.getpid()}")
    process = subprocess.Popen(
        [
            *(RAY, "start", "--head", "--block", "--num-cpus=8", "--disable-usage-stats"),
            *(f"--port={port}", f"--dashboard-port={dashboard}", f"--temp-dir={folder}"),
            *(f"--dashboard-agent-listen-port={agent}", f"--ray-client-server-port={client}"),
        ],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    address = f"http://127.0.0.1:{dashboard}"
    request = urllib.request.Request(
        f"{address}/api/version", headers={"Authorization": f"Bearer {environment['RAY_AUTH_TOKEN']}"}
    )
    deadline = time.monotonic() + 120
    while True:
        try:
            urllib.request.urlopen(request, timeout=5)
            break
        except OSError:
            assert process.poll() is None
            assert time.monotonic() < deadline, "the head node did not start"
            time.sleep(1)
    yield environment, address
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=60)


@pytest.mark.slow
def test_a_submitted_job_leaves_a_complete_run(tiny, tmp_path, head):
    environment, address = head
    tree = tiny.tree(tmp_path / "run", evaluate={"path": str(tiny.root / "eval.jsonl"), "generate": False})
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(tree))
    submit = [RAY, "job", "submit", f"--address={address}", "--working-dir=.", "--"]
    job = subprocess.run(
        [*submit, "python", "jobs/fuse.py", str(config), "stages.0.steps=2"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert job.returncode == 0, job.stdout + job.stderr
    assert "succeeded" in job.stdout
    assert "01-infifusion  step 2/2" in job.stdout
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert [model["name"] for model in results["models"]] == ["math", "code", "pivot", "infifusion"]
    assert (tmp_path / "run/model/model.safetensors").exists()

    wrong = subprocess.run(
        [*submit, "python", "jobs/fuse.py", str(config)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert wrong.returncode != 0
    assert "already holds a run" in wrong.stdout + wrong.stderr
