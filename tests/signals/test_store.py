"""The signal store: first writer wins, damage is found, nothing half-written is ever seen."""

import dataclasses
import logging
import multiprocessing
import os
import uuid
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import fsspec
import numpy as np
import pytest
from safetensors.numpy import save

from rayfuse.errors import StoreError
from rayfuse.signals.codec import encode
from rayfuse.signals.store import SignalStore
from rayfuse.signals.topk import TopKSignals

FINGERPRINT = "0123456789abcdef" * 2
KEY = "ab" + "c" * 62


def make(seed=0, rows=5, k=3):
    random = np.random.default_rng(seed)
    return TopKSignals(
        logps=-np.sort(random.uniform(1, 9, (rows, k))).astype(np.float16),
        ids=random.integers(0, 100, (rows, k)).astype(np.int32),
        lse=random.normal(size=rows).astype(np.float32),
        token_logps=-random.uniform(0, 9, rows).astype(np.float32),
        byte_ends=np.arange(1, rows, dtype=np.int64),
    )


def equal(a, b):
    return all(
        np.array_equal(getattr(a, field.name), getattr(b, field.name)) for field in dataclasses.fields(TopKSignals)
    )


@pytest.fixture(params=["local", "file URL", "memory"])
def store(request, tmp_path):
    if request.param == "memory":
        url = f"memory://{uuid.uuid4().hex}/signals/"
        yield SignalStore(url)
        fsspec.filesystem("memory").store.clear()
    else:
        yield SignalStore(f"{'file://' if request.param == 'file URL' else ''}{tmp_path}/new/signals")


def files(store):
    return sorted(store.fs.find(store.root)) if store.fs.exists(store.root) else []


def test_put_then_get(store):
    assert store.get(FINGERPRINT, KEY) is None
    assert store.put(FINGERPRINT, KEY, make()) is True
    assert equal(store.get(FINGERPRINT, KEY), make())
    assert equal(SignalStore(store.url).get(FINGERPRINT, KEY), make())
    assert store.damaged == 0


def test_first_writer_wins(store):
    assert store.put(FINGERPRINT, KEY, make(seed=1)) is True
    assert SignalStore(store.url).put(FINGERPRINT, KEY, make(seed=2)) is False
    assert equal(store.get(FINGERPRINT, KEY), make(seed=1))


def test_objects_lie_in_sub_folders_by_teacher_and_key(store):
    other = "cd" + KEY[2:]
    for fingerprint, key in ((FINGERPRINT, KEY), (FINGERPRINT, other), ("f" * 32, KEY)):
        assert store.put(fingerprint, key, make())
    assert files(store) == sorted(
        f"{store.root}/{fingerprint}/{key[:2]}/{key}.safetensors"
        for fingerprint, key in ((FINGERPRINT, KEY), (FINGERPRINT, other), ("f" * 32, KEY))
    )
    assert store.get("f" * 32, other) is None


DAMAGE = {
    "truncated": lambda blob: blob[:-3],
    "empty": lambda blob: b"",
    "a bit of the content": lambda blob: blob[:-1] + bytes([blob[-1] ^ 1]),
    "a bit of the length": lambda blob: bytes([blob[0] ^ 1]) + blob[1:],
    "not an object": lambda blob: b"<html>404</html>",
    "of another sample": lambda blob: encode(make(), {"fingerprint": FINGERPRINT, "key": "x"}),
    "of another teacher": lambda blob: encode(make(), {"fingerprint": "x", "key": KEY}),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_reported_counted_set_aside_and_computed_again(store, kind, caplog):
    store.put(FINGERPRINT, KEY, make())
    path = store.path(FINGERPRINT, KEY)
    store.fs.pipe_file(path, DAMAGE[kind](store.fs.cat_file(path)))
    with caplog.at_level(logging.WARNING, logger="rayfuse.signals.objects"):
        assert store.get(FINGERPRINT, KEY) is None
    assert store.damaged == 1
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert path in caplog.text
    assert "is unusable, it is set aside as" in caplog.text
    assert files(store) == [f"{path}.unusable"]

    assert store.put(FINGERPRINT, KEY, make()) is True
    assert equal(store.get(FINGERPRINT, KEY), make())
    assert store.damaged == 1


def test_no_temporary_file_is_left(store):
    for seed in range(3):
        store.put(FINGERPRINT, KEY, make(seed))
    assert files(store) == [store.path(FINGERPRINT, KEY)]


def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch):
    store = SignalStore(str(tmp_path))

    def full(self, data):
        Path(self).touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(StoreError, match=rf"cannot write {tmp_path}/.*No space left on device"):
        store.put(FINGERPRINT, KEY, make())
    assert files(store) == []


def test_a_name_appears_with_its_whole_content(tmp_path, monkeypatch):
    """While the bytes are written, a reader sees nothing under the final name."""
    store = SignalStore(str(tmp_path))
    seen = []
    write = Path.write_bytes

    def watched(self, data):
        write(self, data[:10])
        seen.append(store.get(FINGERPRINT, KEY))
        return write(self, data)

    monkeypatch.setattr(Path, "write_bytes", watched)
    assert store.put(FINGERPRINT, KEY, make()) is True
    assert seen == [None]
    assert store.damaged == 0


def _put(url, seed):
    return SignalStore(url).put(FINGERPRINT, KEY, make(seed))


def test_threads_write_once(tmp_path):
    store = SignalStore(str(tmp_path))
    with ThreadPoolExecutor(8) as pool:
        wrote = list(pool.map(_put, [store.url] * 64, range(64)))
    assert sum(wrote) == 1
    assert equal(store.get(FINGERPRINT, KEY), make(wrote.index(True)))
    assert files(store) == [store.path(FINGERPRINT, KEY)]


def test_processes_write_once(tmp_path):
    with ProcessPoolExecutor(3, mp_context=multiprocessing.get_context("spawn")) as pool:
        wrote = list(pool.map(_put, [str(tmp_path)] * 24, range(24)))
    assert sum(wrote) == 1
    store = SignalStore(str(tmp_path))
    assert equal(store.get(FINGERPRINT, KEY), make(wrote.index(True)))
    assert files(store) == [store.path(FINGERPRINT, KEY)]


def test_readers_and_writers_at_once_see_whole_objects_only(tmp_path):
    store = SignalStore(str(tmp_path))
    keys = [f"{i:064x}" for i in range(30)]

    def work(key):
        store.put(FINGERPRINT, key, make())
        return store.get(FINGERPRINT, key)

    with ThreadPoolExecutor(8) as pool:
        read = list(pool.map(work, keys * 4))
    assert all(equal(item, make()) for item in read)
    assert store.damaged == 0
    assert len(files(store)) == 30


# --- stores that cannot be ------------------------------


def test_check_leaves_a_usable_store_empty(store):
    store.check()
    assert files(store) == []


def test_a_path_below_a_file(tmp_path):
    (tmp_path / "file").touch()
    store = SignalStore(str(tmp_path / "file" / "signals"))
    with pytest.raises(StoreError, match=rf"the signal store {tmp_path}/file/signals is not writable"):
        store.check()
    with pytest.raises(StoreError, match=rf"cannot write {tmp_path}/file/signals/.* in the signal store"):
        store.put(FINGERPRINT, KEY, make())


def test_a_folder_in_the_place_of_an_object(tmp_path):
    store = SignalStore(str(tmp_path))
    Path(store.path(FINGERPRINT, KEY)).mkdir(parents=True)
    with pytest.raises(StoreError, match=rf"cannot read {tmp_path}/.*\.safetensors in the signal store {tmp_path}"):
        store.get(FINGERPRINT, KEY)


def test_an_unknown_kind_of_url():
    with pytest.raises(StoreError, match="the signal store nowhere://x cannot be opened: Protocol not known: nowhere"):
        SignalStore("nowhere://x")


def test_a_remote_file_system_that_refuses_in_its_own_words(monkeypatch):
    store = SignalStore("memory://refused")

    def refuse(*args, **kwargs):
        raise RuntimeError("Unable to locate credentials")

    monkeypatch.setattr(type(store.fs), "pipe_file", refuse)
    with pytest.raises(StoreError, match="memory://refused is not writable: Unable to locate credentials"):
        store.check()


@pytest.mark.parametrize(("url", "root"), [("memory://", ""), ("memory://a/b/", "/a/b"), ("/tmp/a/", "/tmp/a")])
def test_slashes_at_the_end(url, root):
    store = SignalStore(url)
    assert store.root == root
    assert store.local == url.startswith("/")
    assert store.path("f", "key") == f"{root}/f/ke/key.safetensors"


def test_a_part_of_an_object_is_read(store):
    store.put(FINGERPRINT, KEY, make())
    part = store.get(FINGERPRINT, KEY, ("token_logps", "byte_ends"))
    np.testing.assert_array_equal(part.token_logps, make().token_logps)
    np.testing.assert_array_equal(part.byte_ends, make().byte_ends)
    assert (part.logps, part.ids, part.lse) == (None, None, None)


def test_of_a_local_file_only_the_part_is_read(tmp_path, monkeypatch):
    """4 bytes a row where a response's log-probability is wanted, 59 where everything is."""
    store, rows, taken = SignalStore(str(tmp_path)), 1000, []
    store.put(FINGERPRINT, KEY, make(rows=rows, k=10))
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda *place: taken.append(place[1]) or pread(*place))
    store.get(FINGERPRINT, KEY, ("token_logps",))
    assert sum(taken) <= 2048 + 4 * rows
    taken.clear()
    store.get(FINGERPRINT, KEY)
    assert sum(taken) == Path(store.path(FINGERPRINT, KEY)).stat().st_size > 59 * rows


def test_objects_of_the_format_before_are_replaced(store, caplog):
    fields = {field.name: getattr(make(), field.name) for field in dataclasses.fields(TopKSignals)}
    store.put(FINGERPRINT, KEY, make())
    store.fs.pipe_file(store.path(FINGERPRINT, KEY), save(fields, metadata={"format": "rayfuse-signals-1"}))
    assert store.get(FINGERPRINT, KEY) is None
    assert "format 'rayfuse-signals-1'" in caplog.text
    assert store.put(FINGERPRINT, KEY, make()) is True
    assert equal(store.get(FINGERPRINT, KEY), make())
