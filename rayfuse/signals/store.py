"""The signal store: teachers' answers on any fsspec file system, each computed once.

One small safetensors object per (fingerprint of the teacher, key of the sample). First writer wins: a second writer's
object has the same content, so it is simply not written. This is what makes epochs, ablations, reruns, duplicates and
restarts free. An object that cannot be read back is set aside, reported, counted and computed again.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from rayfuse.errors import StoreError
from rayfuse.signals.codec import decode, encode, read_signals
from rayfuse.signals.objects import ObjectStore
from rayfuse.signals.topk import FIELDS, TopKSignals

ABOUT = "teacher.json"
"""Beside the signals of a fingerprint: which teacher gave them."""


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
