"""A labelled Ray cluster of several nodes on this machine, to try what a run does on a real one.

    python clusters/local/cluster.py up [--teachers 1] [--students 1] [--cpus 4] [--gpus 0]
    export RAY_ADDRESS=127.0.0.1:26379
    rayfuse fuse run.yaml                                     or: ray job submit ... (the dashboard: 127.0.0.1:28265)
    python clusters/local/cluster.py down

The head has no CPUs for tasks; every other node offers --cpus logical CPUs and has the label rayfuse-role. All listen
on this machine only. `down` ends what `up` started and nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HOST = "127.0.0.1"
PORT = 26379
DASHBOARD_PORT = 28265
CLIENT_PORT = 20001
"""Not Ray's own 6379, 8265 and 10001, so that a cluster which is there already is left alone."""
FOLDER = Path(tempfile.gettempdir()) / f"rayfuse-local-{os.getuid()}"
PROCESSES = FOLDER / "processes.json"
WAIT_S = 120.0


def commands(teachers: int, students: int, cpus: int, gpus: int) -> list[list[str]]:
    """`ray start` of the head, then of each node."""
    ray = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"]
    head = [*ray, "--head", f"--node-ip-address={HOST}", f"--port={PORT}", f"--dashboard-port={DASHBOARD_PORT}"]
    head += [f"--dashboard-host={HOST}", f"--ray-client-server-port={CLIENT_PORT}", f"--temp-dir={FOLDER / 'ray'}"]
    node = [*ray, f"--address={HOST}:{PORT}", f"--node-ip-address={HOST}", f"--num-cpus={cpus}"]
    roles = ["teachers"] * teachers + ["student"] * students
    started = [[*node, f"--num-gpus={gpus}", f"--labels=rayfuse-role={role}"] for role in roles]
    return [[*head, "--num-cpus=0", "--num-gpus=0"], *started]


def up(teachers: int, students: int, cpus: int, gpus: int) -> None:
    """Start the nodes and wait until all of them are there."""
    if PROCESSES.exists():
        sys.exit(f"{PROCESSES} says that a cluster is up: `down` first")
    FOLDER.mkdir(mode=0o700, exist_ok=True)
    started: list[int] = []
    nodes = commands(teachers, students, cpus, gpus)
    for number, command in enumerate(nodes):
        with (FOLDER / f"node-{number}.log").open("wb") as log:
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        started.append(process.pid)
        PROCESSES.write_text(json.dumps(started), encoding="utf-8")
        if not _alive(number + 1, process):
            down()
            sys.exit(f"node {number} does not start; see {FOLDER / f'node-{number}.log'}")
    print(f"{len(nodes)} nodes are up. export RAY_ADDRESS={HOST}:{PORT}    dashboard: http://{HOST}:{DASHBOARD_PORT}")


def _alive(expected: int, process: subprocess.Popen[bytes]) -> bool:
    """Whether so many nodes are alive, waited for."""
    code = (
        "import sys, ray; ray.init(sys.argv[1], logging_level='ERROR', log_to_driver=False); "
        "print(sum(node['Alive'] for node in ray.nodes()))"
    )
    end = time.monotonic() + WAIT_S
    while time.monotonic() < end and process.poll() is None:
        asked = subprocess.run([sys.executable, "-c", code, f"{HOST}:{PORT}"], capture_output=True, text=True)
        if asked.stdout.strip().isdecimal() and int(asked.stdout) >= expected:
            return True
        time.sleep(1)
    return False


def down() -> None:
    """End what `up` started, the head last."""
    if not PROCESSES.exists():
        sys.exit("no cluster that this command started is up")
    for pid in reversed(json.loads(PROCESSES.read_text(encoding="utf-8"))):
        _end(pid)
    PROCESSES.unlink()


def _end(pid: int) -> None:
    """Tell `ray start --block` to end its node; after a while, end all of its session."""
    for number, patience in ((signal.SIGTERM, 20.0), (signal.SIGKILL, 5.0)):
        end = time.monotonic() + patience
        try:
            os.kill(pid, number) if number == signal.SIGTERM else os.killpg(pid, number)
            while time.monotonic() < end:
                os.waitpid(pid, os.WNOHANG) if _own(pid) else None
                os.kill(pid, 0)
                time.sleep(0.2)
        except ProcessLookupError:
            return


def _own(pid: int) -> bool:
    """Whether it is a child of this very process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1] == str(os.getpid())
    except OSError:
        return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["up", "down"])
    parser.add_argument("--teachers", type=int, default=1, help="nodes for teachers")
    parser.add_argument("--students", type=int, default=1, help="nodes for the student's workers")
    parser.add_argument("--cpus", type=int, default=4, help="logical CPUs of each")
    parser.add_argument("--gpus", type=int, default=0, help="GPUs of each")
    arguments = parser.parse_args()
    if arguments.action == "down":
        down()
    else:
        up(arguments.teachers, arguments.students, arguments.cpus, arguments.gpus)


if __name__ == "__main__":
    main()
