"""Writing files and folders so that they are there completely or not at all, also after a crash of the machine.

Until it is complete it has a hidden name beside its own, with the writer's process in it. For objects on any file
system and with any number of writers see signals/objects.py.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file; a file that is there already is replaced at once. Text is written as UTF-8.

    Raises:
        OSError: it cannot be written; what was there before is unchanged.
    """
    half = _half(path)
    try:
        with half.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        half.replace(path)
    except BaseException:
        with suppress(OSError):
            half.unlink()
        raise
    sync_folder(path.parent)


@contextmanager
def folder_whole(path: Path, *, replace: bool = True) -> Iterator[Path]:
    """A new folder to fill, which gets its name when the block ends well.

    Args:
        path: the folder.
        replace: put it in place of a folder that is there; False: another writer's, who was faster, stays.

    Raises:
        OSError: it cannot be made or renamed; what was there before is unchanged.
    """
    half = _half(path)
    shutil.rmtree(half, ignore_errors=True)
    half.mkdir(parents=True)
    try:
        yield half
        sync_tree(half)
    except BaseException:
        shutil.rmtree(half, ignore_errors=True)
        raise
    if path.exists() and not replace:
        shutil.rmtree(half, ignore_errors=True)
        return
    shutil.rmtree(path, ignore_errors=True)
    half.rename(path)
    sync_folder(path.parent)


def sync_tree(folder: Path) -> None:
    """Wait until all files below a folder, and their names, are on the disk."""
    for root, _, names in os.walk(folder):
        for name in names:
            with Path(root, name).open("rb") as file:
                os.fsync(file.fileno())
        sync_folder(Path(root))


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _half(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.half")
