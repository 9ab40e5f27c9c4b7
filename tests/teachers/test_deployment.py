"""Teachers on Ray Serve: replicas that die, and teachers that scale to zero."""

import asyncio
import os
import signal
import threading
import time
from types import SimpleNamespace

import psutil
import pytest
from ray import serve

from rayfuse.cluster import connect, end_embedded
from rayfuse.config import Data, parse_config
from rayfuse.data.rows import read_samples
from rayfuse.errors import TeacherError
from rayfuse.teachers import BACKENDS, Backend
from rayfuse.teachers.identity import IdentifiedTeacher, fingerprint
from rayfuse.teachers.serving import wishes
from rayfuse.teachers.serving.applications import application_name, delete, deploy
from rayfuse.teachers.serving.client import TeacherClient
from rayfuse.teachers.serving.replica import TeacherReplica
from rayfuse.teachers.transformers import TransformersTeacher

pytestmark = pytest.mark.ray

K = 5


@pytest.fixture(scope="module")
def cluster(tiny, tmp_path_factory):
    yield connect(parse_config(tiny.tree(tmp_path_factory.mktemp("serve"))))
    serve.shutdown()  # the handles' threads end before what they listen to
    end_embedded()


def _replicas(name):
    """Processes that host replicas of the teacher's application."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        command = " ".join(process.info["cmdline"] or [])
        if command.startswith("ray::ServeReplica") and name in command:
            found.append(process)
    return found


def _samples(tiny, n=8):
    return read_samples(Data(path=str(tiny.root / "train.jsonl"), limit=n))[0]


@pytest.mark.chaos
def test_a_killed_replica_is_replaced_and_the_answer_is_the_same(tiny, tmp_path, cluster):
    teacher = parse_config(tiny.tree(tmp_path)).teachers[0]
    name = fingerprint(teacher, K)
    deploy([IdentifiedTeacher(teacher, name)], K)
    client = TeacherClient(IdentifiedTeacher(teacher, name))
    samples = _samples(tiny)
    first = client.score(samples)()
    local = TransformersTeacher(teacher, K).score(samples)
    for mine, theirs in zip(first, local, strict=True):
        assert mine.logps.tobytes() == theirs.logps.tobytes()
        assert mine.token_logps.tobytes() == theirs.token_logps.tobytes()
    (replica,) = _replicas(application_name(IdentifiedTeacher(teacher, name)))
    waits = [client.score(samples) for _ in range(3)]
    os.kill(replica.pid, signal.SIGKILL)
    for wait in [*waits, client.score(samples)]:
        for mine, theirs in zip(wait(), first, strict=True):
            assert mine.logps.tobytes() == theirs.logps.tobytes()
            assert mine.ids.tobytes() == theirs.ids.tobytes()
    assert replica.pid not in [process.pid for process in _replicas(application_name(IdentifiedTeacher(teacher, name)))]


def test_a_deployed_teacher_answers_prompts_as_it_does_alone(tiny, tmp_path, cluster):
    teacher = parse_config(tiny.tree(tmp_path)).teachers[0]
    name = fingerprint(teacher, K)
    deploy([IdentifiedTeacher(teacher, name)], K)
    client = TeacherClient(IdentifiedTeacher(teacher, name))
    ask = {"max_new_tokens": 8, "batch_size": 4, "temperature": 0.8}
    waits = [client.generate(_samples(tiny), **ask, seed=seed) for seed in (1, 2, 1)]
    first, other, again = [wait() for wait in waits]
    assert first == again != other
    assert first == TransformersTeacher(teacher, K).generate(_samples(tiny), **ask, seed=1)


@pytest.mark.slow
def test_an_idle_teacher_scales_to_zero_and_comes_back(tiny, tmp_path, cluster):
    tree = tiny.tree(tmp_path)
    tree["teachers"][1]["replicas"] = {"idle_s": 3}
    teacher = parse_config(tree).teachers[1]
    name = fingerprint(teacher, K)
    deploy([IdentifiedTeacher(teacher, name)], K)
    client = TeacherClient(IdentifiedTeacher(teacher, name))
    client.score(_samples(tiny))()
    assert len(_replicas(application_name(IdentifiedTeacher(teacher, name)))) == 1
    deadline = time.monotonic() + 90
    while _replicas(application_name(IdentifiedTeacher(teacher, name))):
        assert time.monotonic() < deadline, "the idle teacher keeps its replica"
        time.sleep(1)
    assert len(client.score(_samples(tiny))()) == 8
    delete([IdentifiedTeacher(teacher, name)])


@pytest.mark.slow
def test_a_teacher_that_was_removed_is_an_error_that_says_so(tiny, tmp_path, cluster, monkeypatch):
    monkeypatch.setattr("rayfuse.teachers.serving.client.CALL_TIMEOUT_S", 2.0)
    teacher = parse_config(tiny.tree(tmp_path)).teachers[1].model_copy(update={"patience_s": 20.0})
    name = fingerprint(teacher, K)
    deploy([IdentifiedTeacher(teacher, name)], K)
    client = TeacherClient(IdentifiedTeacher(teacher, name))
    serve.delete(application_name(IdentifiedTeacher(teacher, name)))
    with pytest.raises(TeacherError, match=r"removed from the cluster|did not answer"):
        client.score(_samples(tiny))()


def test_a_copy_whose_unit_never_ends_is_unhealthy(tiny, tmp_path, monkeypatch):
    """In this process: what Serve asks every few seconds, while a unit hangs in the model's thread and after it."""
    release = threading.Event()

    class Hanging(Backend):
        def __init__(self, teacher, k):
            pass

        def score(self, samples):
            assert release.wait(60)
            return TransformersTeacher(teacher, K).score(samples)

    monkeypatch.setitem(BACKENDS, "transformers", Hanging)
    monkeypatch.setattr(serve, "get_replica_context", lambda: SimpleNamespace(app_name="application"))
    monkeypatch.setattr(wishes, "outlive", lambda application: None)
    teacher = parse_config(tiny.tree(tmp_path)).teachers[0].model_copy(update={"unit_timeout_s": 0.2})

    async def score():
        replica = TeacherReplica(teacher, K)
        replica.check_health()
        unit = asyncio.create_task(replica.score(_samples(tiny, 2)))
        while not replica.since:
            await asyncio.sleep(0.01)
        replica.check_health()
        await asyncio.sleep(0.5)
        with pytest.raises(TeacherError, match=r"math: a unit has been computing for more than 0 s \(unit_timeout_s\)"):
            replica.check_health()
        release.set()
        assert len((await unit)["lengths"]) == 2
        replica.check_health()

    asyncio.run(score())
