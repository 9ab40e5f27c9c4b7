"""Students side by side: who trains when, what a failure costs, and how many there is room for."""

import threading
from dataclasses import dataclass
from pathlib import Path

import pytest

from rayfuse import cluster
from rayfuse.config import parse_config
from rayfuse.errors import StudentError, TeacherError
from rayfuse.run.pairwise import side_by_side


@dataclass(frozen=True)
class Job:
    """As much of a StageJob as side_by_side looks at."""

    part: str
    root: Path

    @property
    def name(self) -> str:
        return f"01-infifusion/{self.part}"

    @property
    def folder(self) -> Path:
        return self.root / self.part


@pytest.fixture
def jobs(tmp_path):
    return [Job(name, tmp_path) for name in ("math", "code", "instruct")]


def _finish(job):
    (job.folder / "model").mkdir(parents=True)
    return job.folder / "model"


@pytest.mark.parametrize("lanes", [1, 2, 3, 9])
def test_as_many_train_at_a_time_as_there_are_lanes(jobs, lanes):
    """All of a round meet at a barrier, which fewer at a time could not pass; more would be counted."""
    together = min(lanes, len(jobs))
    meeting = threading.Barrier(together if len(jobs) % together == 0 else 1, timeout=30)
    now, most, lock = 0, 0, threading.Lock()

    def train(job):
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        meeting.wait()
        with lock:
            now -= 1
        return _finish(job)

    models = side_by_side(jobs, lanes, train)
    assert models == {job.part: job.folder / "model" for job in jobs}
    assert most <= together
    if meeting.parties > 1:
        assert most == together


def test_a_failure_lets_the_others_end_and_begins_no_more(jobs, monkeypatch):
    both, failed = threading.Barrier(2, timeout=30), threading.Event()
    monkeypatch.setattr("rayfuse.run.pairwise.log.warning", lambda *_: failed.set())

    def train(job):
        both.wait()
        if job.part == "math":
            raise TeacherError("no such replica")
        assert failed.wait(30)
        return _finish(job)

    message = r"01-infifusion/math of the pairwise stage failed \(code trained and kept.*no such replica"
    with pytest.raises(TeacherError, match=message):
        side_by_side(jobs, 2, train)
    assert not jobs[2].folder.exists()


def test_a_fault_in_the_code_is_a_student_error(jobs):
    def train(job):
        raise ZeroDivisionError("division by zero")

    with pytest.raises(StudentError, match="math of the pairwise stage failed: division by zero"):
        side_by_side(jobs, 1, train)


def _config(tmp_path, parallel=None, **student):
    merge = {"method": "sce", "parallel": parallel}
    return parse_config(
        {
            "student": {"model": "s", **student},
            "teachers": [{"model": f"t{i}", "cpus": 2, "gpus": 0.5, "replicas": {"max": 2}} for i in range(3)],
            "data": "d",
            "stages": ["sft", {"method": "infifusion", "merge": merge}],
            "output": str(tmp_path),
        }
    )


@pytest.mark.parametrize(
    ("free", "student", "expected"),
    [
        ({"CPU": 4}, {}, 1),  # less than the teachers may take: one student all the same
        ({"CPU": 12 + 1 + 2.08}, {}, 2),
        ({"CPU": 12 + 1 + 2.07}, {}, 1),
        ({"CPU": 64}, {"cpus": 4, "workers": 2}, 6),
        ({"CPU": 64, "GPU": 8}, {"gpus": 1, "workers": 2}, 2),  # (8 - 3) / 2
        ({"CPU": 64}, {"gpus": 1}, 1),
    ],
)
def test_students_fit_beside_all_replicas_of_the_teachers(tmp_path, monkeypatch, free, student, expected):
    monkeypatch.setattr(cluster.ray, "available_resources", lambda: free)
    assert cluster.students_at_once(_config(tmp_path, **student)) == expected


def test_an_embedded_cluster_has_the_cpus_for_the_students_that_are_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(cluster.os, "cpu_count", lambda: 2)
    asked = {parallel: cluster._local_cpus(_config(tmp_path, parallel)) for parallel in (None, 1, 2, 9)}
    # 3 teachers of 2 replicas of 2 CPUs, Serve's 1, and 1.04 for each of at most 3 students.
    assert asked == {None: 15, 1: 15, 2: 16, 9: 17}
