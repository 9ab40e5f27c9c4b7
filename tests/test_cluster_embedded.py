"""An embedded Ray: its private folder, its end, and two of them side by side."""

import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import ray

from rayfuse import cluster
from rayfuse.cluster import embedded
from rayfuse.errors import ConfigError

ROOT = Path(__file__).parents[1]


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """ray.init without a Ray: the folders that it was given, which lie in a short one of the test."""
    place = tempfile.mkdtemp(dir="/tmp")
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", place)
    monkeypatch.setattr(embedded, "_running", None)
    folders, up = [], []

    def init(address, *, _temp_dir, **options):
        folders.append(Path(_temp_dir))
        up.append(True)

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "is_initialized", lambda: bool(up))
    monkeypatch.setattr(ray, "shutdown", lambda **_: up.clear())
    yield folders
    cluster.end_embedded()
    for folder in Path(place).iterdir():
        folder.rmdir()
    os.rmdir(place)


def fail():
    raise ZeroDivisionError


def test_its_folder_is_private(fake):
    cluster.start_embedded(1)
    assert stat.S_IMODE(fake[0].stat().st_mode) == 0o700
    assert fake[0].parent == Path(tempfile.gettempdir())


def test_its_folder_goes_where_the_program_ends_well(fake):
    with cluster.session():
        cluster.start_embedded(1)
        assert fake[0].exists()
    assert not fake[0].exists()
    assert not ray.is_initialized()


def test_its_folder_stays_where_the_program_fails_and_the_error_names_it(fake):
    @cluster.session()
    def program():
        cluster.start_embedded(1)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError) as raised:
        program()
    assert fake[0].exists()
    assert str(fake[0] / "session_latest" / "logs") in raised.value.__notes__[0]
    assert not ray.is_initialized()


def test_an_error_before_ray_starts_has_no_note(fake):
    with pytest.raises(ZeroDivisionError) as raised, cluster.session():
        fail()
    assert not hasattr(raised.value, "__notes__")


def test_a_ray_that_was_there_before_stays(fake):
    cluster.start_embedded(1)
    with cluster.session():
        pass
    with pytest.raises(ZeroDivisionError), cluster.session():
        fail()
    assert ray.is_initialized()
    assert fake[0].exists()


def test_a_long_temporary_folder_is_left_for_a_short_one(fake, monkeypatch, tmp_path):
    long = tmp_path / ("x" * 90)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    cluster.start_embedded(1)
    assert fake[0].parent == Path("/tmp")
    assert not list(long.iterdir())


def test_ray_tmpdir_is_used_as_it_is(fake, monkeypatch, tmp_path):
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")
    with cluster.session():
        cluster.start_embedded(1)
    assert fake == [Path("/tmp/ray")]


@pytest.mark.parametrize("name", ["x" * 120, "ö" * 45, "数" * 30], ids=["ascii", "two bytes", "three bytes"])
def test_a_ray_tmpdir_that_is_too_long_says_how_much(fake, monkeypatch, name):
    monkeypatch.setenv("RAY_TMPDIR", f"/tmp/{name}")
    with pytest.raises(ConfigError, match=r"paths of (\d+) bytes, and the system allows 107") as raised:
        cluster.start_embedded(1)
    size = int(str(raised.value).partition("paths of ")[2].split()[0])
    session = f"session_2026-01-31_23-59-59_123456_{os.getpid()}"
    assert size == len(f"/tmp/{name}/ray/{session}/sockets/plasma_store".encode())
    assert not fake


def test_where_no_folder_is_short_enough_the_setting_is_named(fake, monkeypatch):
    monkeypatch.setattr(embedded, "SOCKET_BYTES", 20)
    with pytest.raises(ConfigError, match="set RAY_TMPDIR"):
        cluster.start_embedded(1)


TWO_AT_ONCE = """
import json, os, sys, threading, time
import ray
from rayfuse import cluster
from rayfuse.config import parse_config
from rayfuse.data.rows import read_samples
from rayfuse.teachers.identity import identify
from rayfuse.teachers.serving.applications import deploy
from rayfuse.teachers.serving.client import TeacherClient

config = parse_config(json.loads(sys.argv[1])).absolute()
real, begun = ray.init, []
ray.init = lambda *a, **k: begun.append(threading.current_thread().name) or real(*a, **k)
with cluster.session():
    cluster.connect(config)
    folder = ray.get_runtime_context().get_temp_dir()
    nodes = [node["NodeID"] for node in ray.nodes()]
    (teacher,) = identify(config.teachers[:1], config.signals.k)
    deploy([teacher], config.signals.k)
    samples = read_samples(config.data)[0][:4]
    assert len(TeacherClient(teacher).score(samples)()) == 4
    assert [node["NodeID"] for node in ray.nodes()] == nodes
time.sleep(8)  # as long as it takes Serve's router to report once more
assert begun == ["MainThread"], begun
assert not ray.is_initialized()
assert not os.path.exists(folder)
print(json.dumps([folder, nodes]))
"""


@pytest.mark.slow
def test_two_runs_side_by_side_never_meet(tiny, tmp_path):
    """Also with the address of a cluster in Ray's own temporary folder, which a thread of Serve's would join."""
    hidden = ("RAY_ENABLE_AUTO_CONNECT", "RAY_ADDRESS", "RAY_TMPDIR")
    environment = {key: value for key, value in os.environ.items() if key not in hidden}
    place = tempfile.mkdtemp(dir="/tmp", prefix="two-")
    environment |= {"PYTHONPATH": str(ROOT), "TMPDIR": place}
    Path(place, "ray").mkdir()
    Path(place, "ray", "ray_current_cluster").write_text("127.0.0.1:6399", encoding="utf-8")
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_AT_ONCE, json.dumps(tiny.tree(tmp_path / str(index)))],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
        )
        for index in range(2)
    ]
    said = [run.communicate(timeout=400) for run in runs]
    shutil.rmtree(place)
    for run, (_, complaints) in zip(runs, said, strict=True):
        assert run.returncode == 0, complaints
        assert "Connecting to existing Ray cluster" not in complaints
    (one, nodes), (other, others) = [json.loads(out.splitlines()[-1]) for out, _ in said]
    assert one != other
    assert not set(nodes) & set(others)
