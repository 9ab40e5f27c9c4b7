"""The local cluster: started by its command, labelled, and ended without a trace."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "clusters/local/cluster.py"


def _run(*arguments):
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, timeout=400)


@pytest.mark.slow
def test_a_labelled_cluster_starts_and_ends():
    code = (
        "import json, ray; ray.init('127.0.0.1:26379', logging_level='ERROR'); "
        "print(json.dumps(sorted([n['Labels'].get('rayfuse-role', ''), n['Resources'].get('CPU', 0)] "
        "for n in ray.nodes() if n['Alive'])))"
    )
    started = _run("up", "--teachers", "1", "--students", "1", "--cpus", "2")
    try:
        assert started.returncode == 0, started.stdout + started.stderr
        asked = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
        assert json.loads(asked.stdout.splitlines()[-1]) == [["", 0], ["student", 2.0], ["teachers", 2.0]]
        assert "`down` first" in _run("up").stderr
        folder = Path(f"/tmp/rayfuse-local-{os.getuid()}")
        pids = json.loads((folder / "processes.json").read_text())
    finally:
        ended = _run("down")
    assert ended.returncode == 0, ended.stderr
    assert not [
        pid for pid in pids if Path(f"/proc/{pid}").exists() and "ray" in Path(f"/proc/{pid}/cmdline").read_text()
    ]
    assert "no cluster that this command started is up" in _run("down").stderr
