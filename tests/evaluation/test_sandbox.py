"""Programs that a language model might write, by accident or not: none passes, none harms, none is left over."""

import os
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from rayfuse.evaluation.sandbox import Limits, Sandbox

LIMITS = Limits(seconds=60.0, memory_mb=300, processes=8, file_mb=4)
SHORT = replace(LIMITS, seconds=3.0)
FINE = "def add(a, b):\n    return a + b\n"
ADDS = ("assert add(1, 2) == 3", "from solution import add\ndef test_negative():\n    assert add(-1, 1) == 0\n")


@pytest.fixture(scope="module", params=["namespaces", "limits"])
def sandbox(request):
    """With namespaces, and with limits alone: what this machine gives."""
    made = Sandbox.__new__(Sandbox)
    made.limits, made.isolated = LIMITS, request.param == "namespaces"
    reason = made._probe()
    if reason:
        pytest.skip(f"this machine gives no {request.param}: {reason}")
    return made


def short(sandbox):
    """The same sandbox with little time, for programs that must be stopped."""
    made = Sandbox.__new__(Sandbox)
    made.limits, made.isolated = SHORT, sandbox.isolated
    return made


def test_a_right_program_passes_and_a_wrong_one_does_not(sandbox):
    assert sandbox.passes(FINE, ADDS)
    assert not sandbox.passes(FINE.replace("+", "-"), ADDS)
    assert not sandbox.passes("def add(a, b:", ADDS)
    assert not sandbox.passes("", ADDS)
    assert not sandbox.passes(FINE, ("def test_it():\n    assert add(1, 1) == 3\n",))
    assert sandbox.passes(FINE + "if __name__ == '__main__':\n    raise SystemExit(1)\n", ADDS)
    assert sandbox.passes("import tempfile, json, decimal\nwith open('note', 'w') as f: f.write('x')\n" + FINE, ADDS)


@pytest.mark.parametrize(
    "code",
    [
        "import sys; sys.exit(0)",
        "import os; os._exit(0)",
        "raise SystemExit",
        "import os, signal; os.kill(os.getpid(), signal.SIGTERM); os.abort()",
        "import atexit, sys; atexit.register(lambda: print('passed')); sys.exit(0)",
        "import os; [os.write(fd, b'passed') for fd in range(3, 20) if not os.isatty(fd)]",
    ],
)
def test_leaving_before_the_tests_is_not_passing(sandbox, code):
    assert not sandbox.passes(f"{code}\n{FINE}", ("assert False", *ADDS))
    assert not sandbox.passes(f"def add(a, b):\n    {code}\n", ADDS)


def test_an_infinite_loop_ends_on_time(sandbox):
    begun = time.monotonic()
    for code in ("while True: pass", "import time\ntime.sleep(1e6)", "import signal\nsignal.pause()"):
        assert not short(sandbox).passes(code, ADDS)
    assert time.monotonic() - begun >= 3 * SHORT.seconds


def test_a_memory_bomb_fails_alone(sandbox):
    assert not sandbox.passes("x = bytearray(800 << 20)", ADDS)
    assert not sandbox.passes("x = []\nwhile True: x.append(bytearray(1 << 20))", ADDS)
    assert sandbox.passes("x = bytearray(50 << 20)\n" + FINE, ADDS)


def test_a_fork_bomb_is_small_and_leaves_nothing(sandbox):
    """Children that leave the group and the session, and fork on: none is there afterwards."""
    mark = f"mark{os.getpid()}{sandbox.isolated}"
    bomb = (
        "import os, sys, time, subprocess\n"
        "def spread():\n"
        "    while True:\n"
        "        try:\n"
        "            if os.fork() == 0: os.setsid()\n"
        "        except OSError: time.sleep(0.01)\n"
        f"subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)', '{mark}'], start_new_session=True)\n"
        "spread()\n"
    )
    most = 0
    done = threading.Event()

    def watch():
        nonlocal most
        while not done.wait(0.1):
            most = max(most, sum(1 for p in psutil.process_iter() if _of_sandbox(p)))

    watcher = threading.Thread(target=watch)
    watcher.start()
    assert not short(sandbox).passes(bomb, ADDS)
    done.set()
    watcher.join()
    assert most <= LIMITS.processes + 2
    assert not any(mark in " ".join(p.info["cmdline"] or []) for p in psutil.process_iter(["cmdline"]))
    assert not any(_of_sandbox(p) for p in psutil.process_iter())


def _of_sandbox(process):
    """Whether it runs the runner, which Python is given as text."""
    try:
        return any(argument.startswith('"""Runs a program, then its tests') for argument in process.cmdline())
    except psutil.Error:
        return False


def test_huge_output_goes_nowhere(sandbox):
    loud = "import sys\nfor _ in range(100_000): print('x' * 1000); sys.stderr.write('y' * 1000)\n"
    assert sandbox.passes(loud + FINE, ADDS)
    assert not sandbox.passes("f = open('big', 'wb')\nwhile True: f.write(bytes(1 << 20))", ADDS)


def test_secrets_of_the_environment_are_not_inherited(sandbox, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "very-secret")
    check = "import os\nassert 'HF_TOKEN' not in os.environ, 1\nassert 'very-secret' not in str(os.environ)\n"
    assert sandbox.passes(check + FINE, ADDS)
    if sandbox.isolated or os.getuid() == 0:
        others = (
            "import glob\n"
            "for name in glob.glob('/proc/[0-9]*/environ'):\n"
            "    try: text = open(name, 'rb').read()\n"
            "    except OSError: continue\n"
            "    assert b'very-secret' not in text, name\n"
        )
        assert sandbox.passes(others + FINE, ADDS)
        # A process that does have it, to show that the loop above would find it.
        wait = [sys.executable, "-c", "print(flush=True); input()"]
        child = subprocess.Popen(wait, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        child.stdout.readline()
        assert b"very-secret" in Path(f"/proc/{child.pid}/environ").read_bytes()
        assert sandbox.passes(others + FINE, ADDS)
        child.communicate(b"\n")


def test_nothing_can_be_written_outside(sandbox, tmp_path):
    if not sandbox.isolated and os.getuid() != 0:
        pytest.skip("limits alone do not keep a program from writing")
    write = "open({!r}, 'w').write('x')\n" + FINE
    isolated_only = [tmp_path, Path("/var/tmp")] if sandbox.isolated else []
    tmp_path.chmod(0o777)
    for folder in (Path(__file__).parent, Path("/etc"), Path.home(), *isolated_only):
        place = folder / f"left-over-{os.getpid()}"
        assert not sandbox.passes(write.format(str(place)), ADDS)
        assert not place.exists()


def test_no_network_not_even_this_machine(sandbox):
    if not sandbox.isolated:
        pytest.skip("limits alone do not cut the network")
    with socket.create_server(("127.0.0.1", 0)) as server:
        connect = f"import socket\nsocket.create_connection(('127.0.0.1', {server.getsockname()[1]}), 2)\n"
        subprocess.run([sys.executable, "-c", connect], check=True)
        assert not sandbox.passes(connect + FINE, ADDS)


def test_no_way_back_to_the_file_system_or_to_root(sandbox):
    if not sandbox.isolated:
        pytest.skip("there are no mounts without namespaces")
    undo = (
        "import ctypes, os\n"
        "libc = ctypes.CDLL(None, use_errno=True)\n"
        "assert os.getuid() != 0\n"
        "assert libc.mount(None, b'/', None, 32 | 4096, None) == -1\n"  # remount, bind, without read-only
        "assert libc.umount2(b'/tmp', 2) == -1\n"
        "assert libc.setuid(0) == -1\n"
    )
    assert sandbox.passes(undo + FINE, ADDS)
