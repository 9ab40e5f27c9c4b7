"""Prepare tasks where a teacher is gone: wait, fail or drop."""

import dataclasses
import time

import numpy as np
import pytest

from rayfuse.config import ByteKD, Data, InfiFPO, InfiFusion, parse_config
from rayfuse.data.rows import read_preferences, read_samples
from rayfuse.errors import ConfigError, MissingSignalsError, TeacherError, TeacherGoneError
from rayfuse.prepare.preparer import Preparer
from rayfuse.prepare.spec import INITIAL, PrepareSpec
from rayfuse.run.fuse import _refuse_faults
from rayfuse.run.teachers_first import waves
from rayfuse.teachers.identity import IdentifiedTeacher, fingerprint
from rayfuse.teachers.transformers import TransformersTeacher

K = 5


class Switch:
    """A teacher in this process that can be gone; `gone` holds the names of those that are."""

    gone: set = set()  # noqa: RUF012
    asked: list = []  # noqa: RUF012

    def __init__(self, teacher):
        self.name = teacher.name
        self.backend = TransformersTeacher(teacher.teacher, K)

    def score(self, samples):
        def wait():
            Switch.asked.append(self.name)
            if self.name in Switch.gone:
                raise TeacherGoneError(f"teacher {self.name} did not answer for 600 s (patience_s)")
            return self.backend.score(samples)

        return wait


@pytest.fixture
def world(tiny, tmp_path):
    Switch.gone, Switch.asked = set(), []
    config = parse_config(tiny.tree(tmp_path / "run"))
    spec = PrepareSpec(
        student=config.student,
        teachers=tuple(IdentifiedTeacher(teacher, fingerprint(teacher, K)) for teacher in config.teachers),
        store=str(tmp_path / "store"),
        k=K,
        alignment="bytes",
        max_length=200,
        targets=("ranks", "graphs"),
        on_missing="drop",
    )
    samples, _ = read_samples(Data(path=str(tiny.root / "train.jsonl"), limit=8))
    return spec, samples


def test_a_gone_teacher_is_dropped_counted_and_not_waited_for_again(world):
    spec, samples = world
    whole = Preparer(dataclasses.replace(spec, on_missing="fail"), Switch)(samples[:3])
    assert whole.shares is None
    Switch.gone = {"code"}
    preparer = Preparer(spec, Switch)
    batch = preparer(samples)
    # The first three of its answers are in the store.
    assert batch.targets[1].answered.tolist() == [True] * 3 + [False] * 5
    assert batch.targets[0].answered.all()
    assert batch.stats["dropped/code"] == 5
    assert batch.stats["dropped/math"] == 0
    np.testing.assert_allclose(batch.shares, [1] * 3 + [2] * 5)
    assert (batch.sample[batch.targets[1].rows] < 3).all()
    np.testing.assert_array_equal(batch.targets[1].graph[:3], whole.targets[1].graph)
    assert not batch.targets[1].graph[3:].any()
    asked = Switch.asked.count("code")
    preparer(samples)
    assert Switch.asked.count("code") == asked, "its patience must not be spent on every unit"

    Switch.gone = set()
    back = Preparer(spec, Switch)(samples)
    assert back.shares is None
    assert back.stats["dropped/code"] == 0


def test_a_teacher_that_is_gone_is_asked_again_after_its_patience(world):
    spec, samples = world
    hasty = tuple(
        dataclasses.replace(one, teacher=one.teacher.model_copy(update={"patience_s": 0.05})) for one in spec.teachers
    )
    Switch.gone = {"code"}
    preparer = Preparer(dataclasses.replace(spec, teachers=hasty), Switch)
    preparer(samples)
    Switch.gone = set()
    time.sleep(0.1)
    assert preparer(samples).shares is None


def test_no_teacher_at_all_is_an_error_that_names_the_sample(world):
    spec, samples = world
    Switch.gone = {"math", "code"}
    with pytest.raises(MissingSignalsError, match=f"no teacher has signals for sample {samples[0].key[:12]}"):
        Preparer(spec, Switch)(samples)


def test_fail_ends_and_wait_asks_until_it_is_back(world, monkeypatch):
    spec, samples = world
    Switch.gone = {"code"}
    with pytest.raises(TeacherGoneError, match="did not answer"):
        Preparer(dataclasses.replace(spec, on_missing="fail"), Switch)(samples)
    pauses = []

    def pause(seconds):
        pauses.append(seconds)
        if len(pauses) == 3:
            Switch.gone = set()

    monkeypatch.setattr("rayfuse.prepare.preparer.time.sleep", pause)
    batch = Preparer(dataclasses.replace(spec, on_missing="wait"), Switch)(samples)
    assert len(pauses) == 3
    assert batch.targets[1].answered is None
    assert "dropped/code" not in batch.stats


def test_only_absence_is_forgiven(world):
    spec, samples = world

    class Broken(Switch):
        def score(self, samples):
            def wait():
                raise TeacherError("teacher code failed on a unit")

            return wait if self.name == "code" else super().score(samples)

    with pytest.raises(TeacherError, match="failed on a unit"):
        Preparer(spec, Broken)(samples)


def test_a_pair_is_dropped_as_a_whole_and_the_initial_model_never(tiny, world):
    spec, _ = world
    pairs, _ = read_preferences(Data(path=str(tiny.root / "pairs.jsonl"), limit=3))
    samples = [sample for pair in pairs for sample in pair]
    initial = spec.teachers[0].teacher.model_copy(update={"name": INITIAL})
    spec = dataclasses.replace(
        spec,
        teachers=(*spec.teachers, IdentifiedTeacher(initial, "f" * 32)),
        k=None,
        targets=("responses",),
        stage=InfiFPO(),
    )
    Preparer(dataclasses.replace(spec, on_missing="fail"), Switch)([samples[0], samples[2], samples[3], samples[4]])
    Switch.gone = {"code"}
    batch = Preparer(spec, Switch)(samples)
    # Of the first pair the rejected response is missing, of the last pair too: both go whole.
    assert batch.targets[1].answered.tolist() == [False, False, True, True, False, False]
    assert batch.stats["dropped/code"] == 4
    assert f"dropped/{INITIAL}" not in batch.stats
    Switch.gone = {INITIAL}
    with pytest.raises(TeacherGoneError):
        Preparer(dataclasses.replace(spec, store=spec.store + "2"), Switch)(samples)


def test_byte_prefix_targets_are_those_of_the_teachers_that_answered(world):
    spec, samples = world
    spec = dataclasses.replace(spec, targets=("ranks", "carried"), stage=ByteKD())
    alone = dataclasses.replace(spec, teachers=spec.teachers[:1], store=spec.store + "1")
    expected = Preparer(alone, Switch)(samples)
    Switch.gone = {"code"}
    batch = Preparer(spec, Switch)(samples)
    np.testing.assert_array_equal(batch.picks, expected.picks)
    np.testing.assert_array_equal(batch.mass, expected.mass)


def test_a_method_that_cannot_go_on_without_a_teacher_is_refused_before_the_run(tiny, tmp_path, monkeypatch):
    config = parse_config(tiny.tree(tmp_path / "run", serving={"on_missing": "drop"}))
    _refuse_faults(config)
    monkeypatch.setattr(InfiFusion, "partial", False)
    with pytest.raises(ConfigError, match=r"stages\.0 \(infifusion\) cannot go on without one of its teachers"):
        _refuse_faults(config)


def test_waves_are_teachers_that_fit_side_by_side(tiny, tmp_path):
    teacher = parse_config(tiny.tree(tmp_path)).teachers[0]

    def named(name, cpus, gpus):
        return IdentifiedTeacher(teacher.model_copy(update={"name": name, "cpus": cpus, "gpus": gpus}), name)

    teachers = [named("a", 1, 0.5), named("b", 1, 0.5), named("c", 1, 1.0), named("d", 3, 0.0), named("e", 1, 0.0)]
    assert [[one.name for one in wave] for wave in waves(teachers, 4, 1)] == [["a", "b"], ["c", "d"], ["e"]]
    assert [len(wave) for wave in waves(teachers, 1, 0)] == [1, 1, 1, 1, 1]
