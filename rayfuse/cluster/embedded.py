"""A Ray of this process's own: where its files are, how it starts, how it ends."""

from __future__ import annotations

import atexit
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray

from rayfuse.errors import ConfigError, RayfuseError

# For Ray itself and for all worker processes: fewer surprises on a laptop and after a lost node.
ENVIRONMENT = {
    "RAY_TRAIN_V2_ENABLED": "1",
    # After a node loss the old reservation never comes back: do not wait a minute for it.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "30",
    # Train's controller looks at its workers, and sees that they are done, so often: a stage may take a second.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    # Ray Train sets it (to this) for its workers. Set for all, their tasks share processes with those of the driver.
    "RAY_WARN_BLOCKING_GET_INSIDE_ASYNC": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # Ray starts a process per CPU in advance, outside of any runtime environment: none of ours could use them.
    "RAY_prestart_worker_first_driver": "0",
    # The group's restarts are ours (student/group.py); nobody listens to this watcher's warnings.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    # Tokenizers, teachers and the student start at the same time, each in its process: that is no leak to warn of.
    "RAY_worker_maximum_startup_concurrency": "64",
    # Tasks come in waves, and a process takes seconds of processor time to start: keep it for the next wave.
    "RAY_idle_worker_killing_time_threshold_ms": "60000",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}
START_ATTEMPTS = 3
"""Ray gives an embedded node 30 seconds to start, which a busy machine may need more than once."""
QUIET: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
SOCKET_BYTES = 107
"""Longest path of a Unix socket on Linux (sun_path, without its final zero)."""
_OURS = "rayfuse-"


class _Embedded:
    """The Ray that this process started; there is at most one.

    Attributes:
        folder: where its session is.
        ours: the folder was made for it alone.
    """

    def __init__(self, folder: Path, *, ours: bool) -> None:
        self.folder = folder
        self.ours = ours

    @property
    def logs(self) -> Path:
        """Where its processes write what they have to say."""
        return self.folder / "session_latest" / "logs"

    def remove(self) -> None:
        """Delete the folder, where it is ours; a process that ends may still be writing its last line."""
        if self.ours:
            shutil.rmtree(self.folder, ignore_errors=True)


_running: _Embedded | None = None


def start_embedded(cpus: int, **options: Any) -> None:
    """Start Ray in this process and on this machine alone, with so many logical CPUs; `options` are ray.init's.

    Its files are in a private folder (0700) with a short path, in RAY_TMPDIR/ray where that is set. A private folder is
    removed when Ray ends (`session`, or this process).

    Raises:
        ConfigError: no folder is short enough for its sockets.
        RayfuseError: it does not start.
    """
    global _running
    os.environ.update({key: os.environ.get(key, value) for key, value in ENVIRONMENT.items()})
    if _running is not None:  # Ray was shut down without us
        _running.remove()
    started = _make_folder()
    for attempt in range(START_ATTEMPTS):
        try:
            ray.init("local", num_cpus=cpus, include_dashboard=False, _temp_dir=str(started.folder), **QUIET, **options)
            _running = started
            atexit.register(end_embedded)  # after Ray's own, so called before it
            return
        except Exception as error:  # Ray raises plain Exceptions here
            ray.shutdown()
            if attempt == START_ATTEMPTS - 1:
                raise RayfuseError(
                    f"an embedded Ray cannot start on this machine: {error}. Free some memory or load and try again; "
                    f"Ray's logs are in {started.logs}"
                ) from error


def end_embedded(*, keep: bool = False) -> None:
    """End the Ray that this process started, if it did; its private folder goes too, unless `keep`."""
    global _running
    ended, _running = _running, None
    if ended is None:
        return
    atexit.unregister(end_embedded)
    leave_serve()
    ray.shutdown(wait_for_processes=True)
    if not keep:
        ended.remove()


def leave_serve() -> None:
    """Let Serve's routers in this process end before Ray does.

    Their thread reports the length of their queues to Serve's controller by itself. Without a Ray its first call
    (`ray.wait`) starts one or joins one: that of whoever else has left an address in Ray's temporary folder.
    """
    context = sys.modules.get("ray.serve.context")
    client = context and context._global_client  # Serve ends routers only together with itself (serve.shutdown)
    if client is not None:
        client.shutdown_cached_handles()


@contextmanager
def session() -> Iterator[None]:
    """A program that uses Ray: what it starts ends with it; usable as a decorator.

    An embedded Ray that is started inside is shut down, and its private folder removed. Where the program fails the
    folder stays, and the error has a note that names it. Nothing happens where Ray was there before.
    """
    before = ray.is_initialized()
    failed = True
    try:
        yield
        failed = False
    except BaseException as error:
        if not before and _running is not None:
            error.add_note(f"Ray's logs of this run are in {_running.logs} (kept, can be deleted)")
        raise
    finally:
        if not before:
            leave_serve()
            end_embedded(keep=failed)


def _make_folder() -> _Embedded:
    given = os.environ.get("RAY_TMPDIR")
    if given:
        folder = Path(given).absolute() / "ray"
        size = _socket_bytes(folder)
        if size > SOCKET_BYTES:
            raise ConfigError(
                f"RAY_TMPDIR is too long: Ray's sockets in {folder} would have paths of {size} bytes, and the system "
                f"allows {SOCKET_BYTES}. Set it to a folder whose path is at least {size - SOCKET_BYTES} bytes "
                "shorter, or unset it"
            )
        return _Embedded(folder, ours=False)
    asked = dict.fromkeys(Path(place) for place in (tempfile.gettempdir(), "/tmp"))
    for parent in asked:
        if _socket_bytes(parent / f"{_OURS}12345678") <= SOCKET_BYTES and os.access(parent, os.W_OK | os.X_OK):
            return _Embedded(Path(tempfile.mkdtemp(prefix=_OURS, dir=parent)), ours=True)
    raise ConfigError(
        f"no temporary folder can be written to and is short enough for Ray's sockets ({SOCKET_BYTES} bytes with 80 of "
        f"their own; tried {', '.join(map(str, asked))}): set RAY_TMPDIR to one"
    )


def _socket_bytes(folder: Path) -> int:
    """Bytes of the longest socket path of a session in this folder."""
    session_name = f"session_2026-01-31_23-59-59_123456_{os.getpid()}"
    return len(os.fsencode(folder / session_name / "sockets" / "plasma_store"))
