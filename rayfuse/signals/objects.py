"""Named objects on any fsspec file system: written whole, the first writer wins."""

from __future__ import annotations

import contextlib
import logging
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from rayfuse.errors import SignalError, StoreError

log = logging.getLogger(__name__)
T = TypeVar("T")

UNUSABLE = ".unusable"
"""Appended to the name of an object that cannot be read; nothing reads it again, and it can be deleted."""


class ObjectStore:
    """Small objects below one folder or URL, each written completely or not at all, and by its first writer only.

    Attributes:
        damaged: objects found unreadable, foreign or of another format by this process, and set aside.
    """

    what = "store"
    """What errors call it."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.damaged = 0
        try:
            self.fs, root = url_to_fs(url)
        except (ImportError, ValueError, OSError) as error:
            raise StoreError(f"the {self.what} {url} cannot be opened: {error}") from error
        self.root = root.rstrip("/")
        self.local = isinstance(self.fs, LocalFileSystem)

    def read(self, path: str, load: Callable[[], T]) -> T | None:
        """What `load` reads from an object, or None where there is none.

        An object that it refuses (SignalError) is set aside under its name and UNUSABLE, reported and counted; then it
        is as if it was never there.
        """
        try:
            return load()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StoreError(f"cannot read {path} in the {self.what} {self.url}: {error}") from error
        except SignalError as error:
            self.damaged += 1
            log.warning("%s: %s is unusable, it is set aside as %s%s: %s", self.what, path, path, UNUSABLE, error)
            with contextlib.suppress(FileNotFoundError):
                self.fs.mv(path, path + UNUSABLE)
            return None

    def write(self, path: str, blob: bytes) -> bool:
        """Write an object, unless there is one; True where this call wrote it."""
        try:
            return self._create_local(path, blob) if self.local else self._create(path, blob)
        except OSError as error:
            raise StoreError(f"cannot write {path} in the {self.what} {self.url}: {error}") from error

    def _create_local(self, path: str, blob: bytes) -> bool:
        """Write beside, then link: the name appears with its whole content, and only for the first writer."""
        folder, name = os.path.split(path)
        beside = Path(folder, f".{name}.{uuid.uuid4().hex}")
        if not os.path.isdir(folder):
            os.makedirs(folder, exist_ok=True)
        try:
            beside.write_bytes(blob)
            os.link(beside, path)
        except FileExistsError:
            return False
        finally:
            beside.unlink(missing_ok=True)
        return True

    def _create(self, path: str, blob: bytes) -> bool:
        """On an object store a put is atomic; mode="create" asks it to refuse a name that is taken."""
        if self.fs.exists(path):
            return False
        self.fs.makedirs(self.fs._parent(path), exist_ok=True)
        try:
            self.fs.pipe_file(path, blob, mode="create")
        except FileExistsError:
            return False
        return True

    def check(self) -> None:
        """Write and read back a small object.

        Raises:
            StoreError: the store is not writable.
        """
        path = f"{self.root}/.check-{uuid.uuid4().hex}"
        try:
            self.fs.makedirs(self.root, exist_ok=True)
            self.fs.pipe_file(path, b"rayfuse")
            if self.fs.cat_file(path) != b"rayfuse":
                raise OSError("what was written does not read back")
            self.fs.rm_file(path)
        except Exception as error:  # remote file systems raise their own kinds, for example without credentials
            raise StoreError(f"the {self.what} {self.url} is not writable: {error}") from error
