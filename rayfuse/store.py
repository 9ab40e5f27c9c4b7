"""The signal store: teachers' answers on any fsspec file system, each computed once.

One small safetensors object per (fingerprint of the teacher, key of the sample). First writer wins: a second writer's
object has the same content, so it is simply not written. This is what makes epochs, ablations, reruns, duplicates and
restarts free. An object that cannot be read back is set aside, reported, counted and computed again.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from rayfuse.errors import SignalError, StoreError
from rayfuse.signals import FIELDS, TopKSignals, decode, encode, read_signals

log = logging.getLogger(__name__)
T = TypeVar("T")
ABOUT = "teacher.json"
"""Beside the signals of a fingerprint: which teacher gave them."""
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


class SignalStore(ObjectStore):
    """Signals by (fingerprint, key)."""

    what = "signal store"

    def path(self, fingerprint: str, key: str) -> str:
        """Where the object of one teacher and sample is."""
        return f"{self.root}/{fingerprint}/{key[:2]}/{key}.safetensors"

    def get(self, fingerprint: str, key: str, fields: Sequence[str] = FIELDS) -> TopKSignals | None:
        """The signals of one sample, or None where there are none (or only an unusable object, which is set aside).

        `fields` names what the caller needs: of a local file only that is read.
        """
        path, about = self.path(fingerprint, key), {"fingerprint": fingerprint, "key": key}

        def load() -> TopKSignals:
            if not self.local:
                return decode(self.fs.cat_file(path), about, fields)
            with open(path, "rb", buffering=0) as file:
                number = file.fileno()
                size = os.fstat(number).st_size
                return read_signals(lambda start, end: os.pread(number, end - start, start), size, about, fields)

        return self.read(path, load)

    def put(self, fingerprint: str, key: str, signals: TopKSignals) -> bool:
        """Write the signals of one sample, unless they are there; True where this call wrote them."""
        return self.write(self.path(fingerprint, key), encode(signals, {"fingerprint": fingerprint, "key": key}))

    def describe(self, fingerprint: str, about: Mapping[str, Any]) -> None:
        """Write beside the signals of a fingerprint whose they are, for people; the first description stays."""
        path = f"{self.root}/{fingerprint}/{ABOUT}"
        try:
            if not self.fs.exists(path):
                self.fs.makedirs(self.fs._parent(path), exist_ok=True)
                self.fs.pipe_file(path, (json.dumps(dict(about), indent=2) + "\n").encode())
        except OSError as error:
            raise StoreError(f"cannot write {path} in the signal store {self.url}: {error}") from error

    def known(self) -> dict[str, dict[str, Any]]:
        """The fingerprints that the store has signals of, and what `describe` said about them."""
        try:
            folders = [entry["name"] for entry in self.fs.ls(self.root, detail=True) if entry["type"] == "directory"]
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise StoreError(f"cannot list the signal store {self.url}: {error}") from error
        known = {}
        for folder in folders:
            try:
                about = json.loads(self.fs.cat_file(f"{folder}/{ABOUT}"))
            except (OSError, ValueError):
                about = {}
            known[folder.rstrip("/").rsplit("/", 1)[-1]] = about if isinstance(about, dict) else {}
        return known

    def note(self, fingerprint: str, name: str) -> dict[str, Any] | None:
        """A small JSON object kept beside a teacher's signals, or None where there is none that can be read."""
        try:
            note = json.loads(self.fs.cat_file(f"{self.root}/{fingerprint}/{name}.json"))
        except (OSError, ValueError):
            return None
        return note if isinstance(note, dict) else None

    def put_note(self, fingerprint: str, name: str, note: Mapping[str, Any]) -> None:
        """Write such an object, in place of an older one; it appears whole or not at all."""
        path = f"{self.root}/{fingerprint}/{name}.json"
        blob = json.dumps(note, indent=2).encode()
        try:
            self.fs.makedirs(self.fs._parent(path), exist_ok=True)
            beside = f"{path}.{uuid.uuid4().hex}" if self.local else path
            self.fs.pipe_file(beside, blob)
            if self.local:
                os.replace(beside, path)
        except OSError as error:
            raise StoreError(f"cannot write {path} in the signal store {self.url}: {error}") from error
