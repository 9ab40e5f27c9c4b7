"""How many copies of a shared teacher there may be, and what a run leaves behind."""

import os
import signal
import subprocess
import sys
import time

import pytest
import ray
import yaml
from ray import serve
from rich.console import Console

from rayfuse.cluster import connect, end_embedded
from rayfuse.config import Data, parse_config
from rayfuse.data.rows import read_samples
from rayfuse.errors import ConfigError, TeacherError
from rayfuse.teachers.identity import IdentifiedTeacher, fingerprint
from rayfuse.teachers.serving import wishes
from rayfuse.teachers.serving.applications import application_name, borrowed, delete, deploy
from rayfuse.teachers.serving.client import TeacherClient
from rayfuse.teachers.serving.manage import manage

K = 5


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ({}, (0, 1)),
        ({"a": (0, 4)}, (0, 4)),
        ({"a": (1, 2), "b": (0, 8)}, (1, 8)),
        ({"a": (1, 8), wishes.PINNED: (3, 3)}, (3, 3)),
    ],
)
def test_bounds_are_the_largest_wishes_or_the_pinned_number(entries, expected):
    assert wishes.bounds(entries) == expected


@pytest.fixture(scope="module")
def cluster(tiny, tmp_path_factory):
    tree = tiny.tree(tmp_path_factory.mktemp("serve"))
    for teacher in tree["teachers"]:
        teacher["replicas"] = {"max": 2, "idle_s": 2, "upscale_s": 0}
    config = parse_config(tree)
    connect(config)
    yield config
    serve.shutdown()
    end_embedded()


def _running(name):
    (deployment,) = serve.status().applications[name].deployments.values()
    return deployment.replica_states.get("RUNNING", 0)


def _wait(condition, what):
    deadline = time.monotonic() + 240
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.3)


@pytest.mark.slow
def test_a_shared_teacher_gets_what_its_users_wish_and_is_found_when_scaled(tiny, cluster):
    """Two runs, up, scale and down on one application, whose copies are never restarted."""
    teacher = cluster.teachers[0]
    teachers = [IdentifiedTeacher(teacher, fingerprint(teacher, K))]
    name = application_name(teachers[0])
    samples = read_samples(Data(path=str(tiny.root / "train.jsonl"), limit=4))[0]
    shown = Console(record=True, width=220)
    with pytest.raises(TeacherError, match="is not up"):
        manage(cluster, "scale", ["math", "2"], shown)
    manage(cluster, "up", [], shown)
    assert wishes.wishes(name) == {"kept": (0, 2)}
    first = TeacherClient(teachers[0]).score(samples)()
    pids = _pids(name)
    assert len(pids) == 1

    more = teacher.model_copy(update={"replicas": teacher.replicas.model_copy(update={"min": 1, "max": 5})})
    assert application_name(IdentifiedTeacher(more, teachers[0].fingerprint)) == name, (
        "a run with other bounds finds the same teacher"
    )
    with borrowed([IdentifiedTeacher(more, teachers[0].fingerprint)], K):
        assert wishes.resize(name) == (1, 5)
        manage(cluster, "status", [], shown)
        assert "1 run, up" in shown.export_text()
        with pytest.raises(TeacherError, match=r"runs are using these teachers.*math: 1"):
            manage(cluster, "down", [], shown)
    assert wishes.resize(name) == (0, 2)

    manage(cluster, "scale", ["math", "2"], shown)
    deploy(teachers, K)
    assert wishes.resize(name) == (2, 2), "a run does not undo what was set by hand"
    _wait(lambda: _running(name) == 2, "the teacher is not scaled")
    assert pids < _pids(name), "the first copy must live on"
    again = TeacherClient(teachers[0]).score(samples)()
    assert [item.logps.tobytes() for item in again] == [item.logps.tobytes() for item in first]
    wishes.withdraw(name, wishes.this_run())

    manage(cluster, "scale", ["math", "0"], shown)
    _wait(lambda: _running(name) == 0, "an idle teacher keeps its copies")
    manage(cluster, "down", [], shown)
    _wait(lambda: name not in serve.status().applications, "the teacher is not removed")
    assert wishes.wishes(name) == {}


def _pids(name):
    import psutil

    found = set()
    for process in psutil.process_iter(["cmdline"]):
        command = " ".join(process.info["cmdline"] or [])
        if command.startswith("ray::ServeReplica") and name in command:
            found.add(process.pid)
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("action", "arguments", "message"),
    [
        ("stop", [], "there is no action 'stop'; there are: up, down, status, scale"),
        ("status", ["math"], "takes no arguments"),
        ("scale", ["math"], "a teacher's name and a number"),
        ("scale", ["math", "two"], "a teacher's name and a number"),
        ("scale", ["nobody", "2"], "there is no teacher 'nobody'; there are: math, code"),
    ],
)
def test_wrong_arguments_say_what_is_right(cluster, action, arguments, message):
    with pytest.raises(ConfigError, match=message):
        manage(cluster, action, arguments, Console(quiet=True))


RUN = """
import sys
import time


from rayfuse.config import load_config
from rayfuse.models import fingerprint
from rayfuse.teachers.deployment import deploy

config = load_config(sys.argv[1])
ray.init(sys.argv[2], logging_level="ERROR")
teachers = [IdentifiedTeacher(teacher, fingerprint(teacher, 5)) for teacher in config.teachers]
deploy(teachers, 5)
print("deployed", flush=True)
time.sleep(600)
"""


@pytest.mark.chaos
def test_a_killed_run_leaves_no_copy_behind(tiny, tmp_path, cluster):
    """A run that keeps a copy at all times is killed; the copy finds out, and goes after the idle delay."""
    tree = tiny.tree(tmp_path)
    tree["teachers"] = [{**tree["teachers"][1], "replicas": {"min": 1, "idle_s": 2}}]
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    teacher = parse_config(tree).teachers[0]
    name = application_name(IdentifiedTeacher(teacher, fingerprint(teacher, K)))
    address = ray.get_runtime_context().gcs_address
    run = subprocess.Popen(
        [sys.executable, "-c", RUN, str(tmp_path / "run.yaml"), address], stdout=subprocess.PIPE, text=True
    )
    try:
        assert run.stdout.readline().strip() == "deployed"
        _wait(lambda: _running(name) == 1, "the run's teacher does not start")
        assert wishes.bounds(wishes.wishes(name)) == (1, 1)
    finally:
        os.kill(run.pid, signal.SIGKILL)
        run.wait()
    _wait(lambda: _running(name) == 0, "the killed run's teacher stays")
    delete([IdentifiedTeacher(teacher, fingerprint(teacher, K))])
