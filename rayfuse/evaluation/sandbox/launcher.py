"""Stands between the sandbox and the program: makes the walls, starts the program inside, ends it on time.

Run as `python -I -S launcher.py SETTINGS` (JSON); needs the standard library only. What it writes to standard error is
a complaint that the walls could not be made; the program itself cannot write there.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import signal
import sys
import time
from typing import Any

_NEW_NAMESPACES = 0x00020000 | 0x04000000 | 0x08000000 | 0x20000000 | 0x40000000  # mounts, host name, IPC, PID, network
_NEW_USER = 0x10000000
_PRIVATE, _RECURSIVE, _BIND, _NO_SUID, _NO_DEV, _NO_EXEC = 1 << 18, 1 << 14, 1 << 12, 2, 4, 8
_SYS_MOUNT_SETATTR, _AT_FDCWD, _AT_RECURSIVE, _ATTR_RDONLY = 442, -100, 0x8000, 1
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS = 1, 36, 38
_COVERED = ("/tmp", "/var/tmp", "/run", "/dev/shm")

_UNUSED = (ctypes.c_ulong(0),) * 3  # prctl refuses anything else where it reads them
_libc = ctypes.CDLL(None, use_errno=True)


def main(settings: dict[str, Any]) -> None:
    """Start the program and wait for its end, or its time."""
    deadline = time.monotonic() + settings["seconds"]
    _call("prctl", _PR_SET_PDEATHSIG, signal.SIGKILL, *_UNUSED)
    _call("prctl", _PR_SET_CHILD_SUBREAPER, 1, *_UNUSED)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    if settings["namespaces"]:
        _enter_namespaces()
    child = os.fork()
    if child == 0:
        _become_the_program(settings)
    while (left := deadline - time.monotonic()) > 0 and os.waitpid(child, os.WNOHANG) == (0, 0):
        signal.sigtimedwait({signal.SIGCHLD}, left)
    if settings["namespaces"]:  # the first process of a PID namespace takes all others with it
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    else:
        _kill_descendants(settings["user"])
    with contextlib.suppress(ChildProcessError):
        while True:
            os.waitpid(-1, 0)


def _enter_namespaces() -> None:
    user, group = os.getuid(), os.getgid()
    _call("unshare", _NEW_NAMESPACES | (0 if user == 0 else _NEW_USER))
    if user != 0:
        for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
            with open(f"/proc/self/{name}", "w", encoding="utf-8") as file:
                file.write(text)


def _become_the_program(settings: dict[str, Any]) -> None:
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
        folder, user = settings["folder"], settings["user"]
        if settings["namespaces"]:
            _wall_off_files(folder, settings["home"], settings["python"], settings["file_mb"])
        elif user is not None:
            os.chown(folder, user, user)
        os.chdir(folder)
        if user is not None:
            os.setgroups([])
            os.setresgid(user, user, user)
        _limit(settings, 0 if settings["namespaces"] or user is not None else _processes_of(os.getuid()))
        if user is not None:
            os.setresuid(user, user, user)
        _call("prctl", _PR_SET_PDEATHSIG, signal.SIGKILL, *_UNUSED)  # a change of user clears it
        _call("prctl", _PR_SET_NO_NEW_PRIVS, 1, *_UNUSED)
        arguments = [sys.executable, "-I", "-B", "-c", settings["runner"], str(settings["report"])]
        quiet = os.open(os.devnull, os.O_WRONLY)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)
    saved = os.dup(2)
    os.set_inheritable(saved, False)
    os.dup2(quiet, 2)
    try:
        os.execv(sys.executable, arguments)
    except OSError as error:
        os.write(saved, f"{sys.executable} cannot be run as user {os.getuid()}: {error}".encode())
    os._exit(1)


def _wall_off_files(folder: str, home: str, python: list[str], file_mb: int) -> None:
    """Everything read-only; service folders and the home covered; the program's folder in memory, with a size.

    Python's own folders show again where a cover hides them (an installation in the home).
    """
    _mount(None, "/", None, _PRIVATE | _RECURSIVE)
    _read_only("/", recursive=True)
    covers = [os.path.realpath(place) for place in (*_COVERED, home) if os.path.isdir(place)]
    covers = [place for place in dict.fromkeys(covers) if place != "/"]
    hidden = [place for place in dict.fromkeys(map(os.path.realpath, python)) if _inside(place, covers)]
    originals = [os.open(place, os.O_PATH | os.O_DIRECTORY) for place in hidden]
    for place in covers:
        _mount("tmpfs", place, "tmpfs", _NO_SUID | _NO_DEV, "size=64k,mode=755")
    os.umask(0o022)
    for place, original in zip(hidden, originals, strict=True):
        os.makedirs(place)
        _mount(f"/proc/self/fd/{original}", place, None, _BIND | _RECURSIVE)
        os.close(original)
    os.makedirs(folder, exist_ok=True)
    for place in covers:
        _read_only(place)
    _mount("tmpfs", folder, "tmpfs", _NO_SUID | _NO_DEV, f"size={file_mb}m,mode=777")
    try:
        _mount("proc", "/proc", "proc", _NO_SUID | _NO_DEV | _NO_EXEC)
    except OSError:  # refused where parts of /proc are masked, as in most containers: then there is none at all
        _mount("tmpfs", "/proc", "tmpfs", _NO_SUID | _NO_DEV | _NO_EXEC, "size=4k,mode=555")


def _inside(path: str, places: list[str]) -> bool:
    return any(f"{path}/".startswith(f"{place}/") for place in places)


def _limit(settings: dict[str, Any], others: int) -> None:
    """Resource limits; the number of processes counts all of the user's, `others` of which are not the program's."""
    seconds = int(settings["seconds"]) + 1
    for limit, value in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, settings["memory_mb"] << 20),
        (resource.RLIMIT_NPROC, others + settings["processes"]),
        (resource.RLIMIT_FSIZE, settings["file_mb"] << 20),
        (resource.RLIMIT_NOFILE, 128),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(limit)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (value, value))


def _processes_of(user: int) -> int:
    """Threads of all the user's processes, which is what RLIMIT_NPROC counts."""
    threads = 0
    for name in os.listdir("/proc"):
        with contextlib.suppress(OSError):
            if name.isdigit() and os.stat(f"/proc/{name}").st_uid == user:
                threads += len(os.listdir(f"/proc/{name}/task"))
    return threads


def _kill_descendants(user: int | None) -> None:
    """End all that the program started, without a PID namespace.

    With a user of their own: everything of that user, at once. Else down the tree of processes: this one adopts orphans
    (it is a subreaper), stops whatever it finds until nothing new appears, and then kills.
    """
    if user is not None:
        helper = os.fork()
        if helper == 0:
            os.setresuid(user, user, user)
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(-1, signal.SIGKILL)
            os._exit(0)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(helper, 0)
        return
    stopped: set[int] = set()
    while new := _descendants(os.getpid()) - stopped:
        for process in new:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGSTOP)
        stopped |= new
    for process in stopped:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


def _descendants(process: int) -> set[int]:
    found: set[int] = set()
    with contextlib.suppress(OSError):
        for thread in os.listdir(f"/proc/{process}/task"):
            with open(f"/proc/{process}/task/{thread}/children", encoding="utf-8") as file:
                found.update(int(child) for child in file.read().split())
    return found.union(*(_descendants(child) for child in found))


def _mount(source: str | None, target: str, kind: str | None, flags: int, options: str = "") -> None:
    encoded = [None if text is None else text.encode() for text in (source, target, kind)]
    _call("mount", *encoded, ctypes.c_ulong(flags), options.encode())


class _MountAttributes(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("attr_set", "attr_clr", "propagation", "userns_fd")]


def _read_only(place: str, *, recursive: bool = False) -> None:
    attributes = _MountAttributes(attr_set=_ATTR_RDONLY)
    flags = _AT_RECURSIVE if recursive else 0
    size = ctypes.c_size_t(ctypes.sizeof(attributes))
    _call("syscall", _SYS_MOUNT_SETATTR, _AT_FDCWD, place.encode(), flags, ctypes.byref(attributes), size)


def _call(name: str, *arguments: Any) -> None:
    if getattr(_libc, name)(*arguments) == -1:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}{arguments[:3]}: {os.strerror(code)}")


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
