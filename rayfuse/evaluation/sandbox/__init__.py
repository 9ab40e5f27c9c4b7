"""A sandbox for programs that a language model wrote: one short-lived process, which can say no more than "passed".

What it gives on Linux with namespaces (root, or a user who may make user namespaces):
- time: killed with all its descendants after `seconds`, also those that left its process group (a PID namespace);
- memory (RLIMIT_AS) and CPU time per process, number of processes, size of a file, open files, no core dumps;
- no network, not even loopback; no shared memory or semaphores with others;
- a file system that is read-only, but for its own folder in memory with a size; /tmp, /run, /dev/shm and the home
  folder are covered by empty ones, and with them Ray's and other services' sockets;
- only its own processes in /proc, an environment of five fixed variables, no input but the program, no output.
As root it also becomes a user of its own, without any capability.

What it does not give: a program may read whatever files its user may read elsewhere (it has no way to carry them off),
use `processes` times the memory in all, and attack the kernel. It is no virtual machine. And the program and its tests
share one process: a program that looks for the secret in the interpreter's frames can claim to have passed.

Without namespaces ("limits") are left: time, memory, number of processes, sizes, environment, and the killing of all
descendants. Network, reading, and writing where the user may write are then NOT prevented.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rayfuse.errors import SandboxError

log = logging.getLogger(__name__)
_LAUNCHER = Path(__file__).with_name("launcher.py")
_RUNNER = Path(__file__).with_name("runner.py")
_GRACE_S = 10.0
"""The launcher ends what it started on time; this much later it is itself given up."""
_ENVIRONMENT = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1"}
_PROBE = ("import math, tempfile\nwith tempfile.TemporaryFile() as f: f.write(b'x')\n", ("assert math.pi > 3",))


@dataclass(frozen=True)
class Limits:
    """What one program may use.

    Attributes:
        seconds: of wall-clock time.
        memory_mb: address space of each process.
        processes: processes and threads at a time.
        file_mb: size of its folder, and of any one file.
    """

    seconds: float = 10.0
    memory_mb: int = 1024
    processes: int = 16
    file_mb: int = 16


class Sandbox:
    """Runs programs with their tests. Usable from several threads.

    Attributes:
        isolated: whether namespaces are used.
    """

    def __init__(self, limits: Limits, *, must_isolate: bool = True) -> None:
        """Find out what this machine gives, by running a small program.

        Raises:
            SandboxError: namespaces are refused here and `must_isolate` is set; or nothing runs at all.
        """
        self.limits = limits
        self.isolated = True
        reason = self._probe()
        if not reason:
            return
        if must_isolate:
            raise SandboxError(
                f"this machine gives no namespaces to isolate programs in ({reason}). Allow user namespaces "
                "(a container may need another seccomp profile), or accept limits on time, memory and processes alone, "
                "with the network and your files open to the programs: judge.isolation: limits"
            )
        self.isolated = False
        log.warning("sandbox: no namespaces here (%s): programs can reach the network and your files", reason)
        if reason := self._probe():
            raise SandboxError(f"not even a trivial program runs in the sandbox: {reason}")

    def _probe(self) -> str:
        """Why a program that must pass does not; empty where it does."""
        passed, said = self._run(*_PROBE, Limits(seconds=60.0, memory_mb=max(512, self.limits.memory_mb)))
        return "" if passed else said or "it ended without a word"

    def passes(self, code: str, tests: Sequence[str]) -> bool:
        """Whether `code` runs, then every one of `tests`, to its end within the limits.

        Each of the tests is a piece of Python that sees the code's names (and can import it as `solution`): statements
        such as `assert f(1) == 2`, or functions called test_*.

        Raises:
            SandboxError: the sandbox itself cannot be started.
        """
        passed, said = self._run(code, tests, self.limits)
        if said:
            raise SandboxError(f"the sandbox could not be started: {said}")
        return passed

    def _run(self, code: str, tests: Sequence[str], limits: Limits) -> tuple[bool, str]:
        """Whether it passed, and what the launcher complained of."""
        secret = secrets.token_hex(16)
        with (
            tempfile.TemporaryDirectory(prefix="rayfuse-sandbox-") as folder,
            tempfile.TemporaryFile() as program,
            tempfile.TemporaryFile() as complaints,
        ):
            program.write(json.dumps({"code": code, "tests": list(tests), "secret": secret}).encode())
            program.seek(0)
            reading, writing = os.pipe()
            settings = {
                "folder": folder,
                "namespaces": self.isolated,
                "user": 20_000 + secrets.randbelow(40_000) if os.getuid() == 0 else None,
                "report": writing,
                "runner": _RUNNER.read_text(encoding="utf-8"),
                "home": str(Path.home()),
                "python": [sys.prefix, sys.base_prefix],
                **vars(limits),
            }
            try:
                process = subprocess.Popen(
                    [sys.executable, "-I", "-S", "-B", str(_LAUNCHER), json.dumps(settings)],
                    stdin=program,
                    stdout=subprocess.DEVNULL,
                    stderr=complaints,
                    pass_fds=[writing],
                    cwd=folder,
                    env={**_ENVIRONMENT, "HOME": folder, "TMPDIR": folder},
                    start_new_session=True,
                )
                os.close(writing)
                _wait(process, limits.seconds + _GRACE_S)
                os.set_blocking(reading, False)
                report = _read(reading)
            except OSError as error:
                raise SandboxError(f"the sandbox could not be started: {error}") from error
            finally:
                os.close(reading)
            complaints.seek(0)
            return report == secret.encode(), complaints.read(4000).decode(errors="replace").strip()


def _wait(process: subprocess.Popen[bytes], seconds: float) -> None:
    """Wait for the launcher, and leave nothing of its process group behind."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _read(pipe: int) -> bytes:
    """At most what a report can be; a program that floods the pipe does not pass."""
    try:
        return os.read(pipe, 4096)
    except BlockingIOError:
        return b""
