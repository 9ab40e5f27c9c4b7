"""Weights from the rows to the batch, and where a target mixes or chooses teachers by them."""

import dataclasses

import numpy as np
import pytest

from rayfuse.config import SFT, ByteKD, FuseLLM, InfiFusion, Trust
from rayfuse.data.rows import samples_of_row
from rayfuse.data.sample import Weights
from rayfuse.errors import DataError
from rayfuse.prepare.preparer import Preparer
from rayfuse.prepare.weights import refuse_without_weights
from rayfuse.teachers.transformers import TransformersTeacher

K = 5


class InProcess:
    """A teacher in this process."""

    def __init__(self, teacher):
        self.backend = TransformersTeacher(teacher.teacher, K)

    def score(self, samples):
        return lambda: self.backend.score(samples)


def weighted(samples, first, second, of_samples=None):
    """The samples with these weights of the two teachers, `math` and `code`."""
    names = ("math", "code")
    return [
        sample.weighted(
            Weights(
                None if of_samples is None else of_samples[b],
                tuple(sorted(zip(names, (first[b], second[b]), strict=True))),
            )
        )
        for b, sample in enumerate(samples)
    ]


def of(spec, stage):
    return dataclasses.replace(spec, stage=stage, targets=stage.targets)


def test_the_rows_weights_are_in_the_batch_and_no_part_of_a_key(world):
    spec, samples = world
    assert [one.name for one in spec.teachers] == ["math", "code"]
    first, second = np.linspace(0, 1, 8), np.linspace(1, 0, 8)
    counted = weighted(samples, first.tolist(), second.tolist(), first.tolist())
    assert [sample.key for sample in counted] == [sample.key for sample in samples]
    stage = InfiFusion(teacher_weights="consensus", sample_weights="consensus")
    batch = Preparer(of(spec, stage), InProcess)(counted)
    np.testing.assert_array_equal(batch.targets[0].sample_weights, first.astype(np.float32))
    np.testing.assert_array_equal(batch.targets[1].sample_weights, second.astype(np.float32))
    np.testing.assert_array_equal(batch.sample_weights, first.astype(np.float32))
    np.testing.assert_array_equal(batch.row_weights, first.astype(np.float32)[batch.sample])
    plain = Preparer(of(spec, InfiFusion()), InProcess)(counted)
    assert plain.sample_weights is None
    assert all(target.sample_weights is None for target in plain.targets)


def test_sft_takes_the_weights_of_samples_alone(world):
    spec, samples = world
    counted = [sample.weighted(Weights(0.25)) for sample in samples]
    alone = dataclasses.replace(of(spec, SFT(sample_weights="consensus")), teachers=())
    batch = Preparer(alone, InProcess)(counted)
    np.testing.assert_array_equal(batch.sample_weights, np.full(8, 0.25, dtype=np.float32))


@pytest.mark.parametrize("stage", [ByteKD(), FuseLLM()], ids=lambda stage: stage.method)
def test_a_mixture_with_one_hot_weights_is_the_target_of_that_teacher(world, stage):
    spec, samples = world
    by_consensus = stage.model_copy(update={"teacher_weights": "consensus"})
    to_first = [1.0, 0.0] * 4
    batch = Preparer(of(spec, by_consensus), InProcess)(weighted(samples, to_first, [1 - w for w in to_first]))
    alone = [
        Preparer(dataclasses.replace(of(spec, stage), teachers=(teacher,)), InProcess)(samples)
        for teacher in spec.teachers
    ]
    for n, b in enumerate(batch.sample):
        expected = alone[b % 2]
        np.testing.assert_array_equal(batch.picks[n], expected.picks[n])
        np.testing.assert_allclose(batch.mass[n], expected.mass[n], atol=1e-7)


@pytest.mark.parametrize("stage", [ByteKD(), FuseLLM()], ids=lambda stage: stage.method)
def test_equal_shares_are_the_uniform_target(world, stage):
    spec, samples = world
    by_consensus = stage.model_copy(update={"teacher_weights": "consensus"})
    batch = Preparer(of(spec, by_consensus), InProcess)(weighted(samples, [0.5] * 8, [0.5] * 8))
    uniform = Preparer(of(spec, stage), InProcess)(samples)
    assert batch.picks.tobytes() == uniform.picks.tobytes()
    assert batch.mass.tobytes() == uniform.mass.tobytes()


@pytest.mark.parametrize("stage", [ByteKD(), FuseLLM()], ids=lambda stage: stage.method)
@pytest.mark.parametrize("known", [0.0, 0.3])
def test_where_nobody_knows_the_written_text_is_the_target(world, stage, known):
    spec, samples = world
    by_consensus = stage.model_copy(update={"teacher_weights": "consensus"})
    batch = Preparer(of(spec, by_consensus), InProcess)(weighted(samples, [known] * 8, [0.0] * 8))
    alone = Preparer(dataclasses.replace(of(spec, stage), teachers=spec.teachers[:1]), InProcess)(samples)
    label = np.arange(batch.mass.shape[1]) == 0
    expected = known * alone.mass + (1 - known) * label if known else np.broadcast_to(label, batch.mass.shape)
    np.testing.assert_allclose(batch.mass, expected, atol=1e-6)
    np.testing.assert_array_equal(batch.picks[:, 0], batch.labels)


def test_the_order_of_the_teachers_says_nothing_in_a_mixture(world):
    spec, samples = world
    draw = np.random.default_rng(0)
    counted = weighted(samples, draw.random(8).tolist(), draw.random(8).tolist())
    stage = of(spec, ByteKD(teacher_weights="consensus"))
    one = Preparer(stage, InProcess)(counted)
    other = Preparer(dataclasses.replace(stage, teachers=spec.teachers[::-1]), InProcess)(counted)
    np.testing.assert_array_equal(one.picks[:, 0], other.picks[:, 0])
    np.testing.assert_allclose(one.mass.sum(1), 1, atol=1e-5)
    for n in range(len(one.labels)):
        mine, theirs = (dict(zip(b.picks[n].tolist(), b.mass[n].tolist(), strict=True)) for b in (one, other))
        assert {k: v for k, v in mine.items() if v > 1e-4}.keys() == {
            k: v for k, v in theirs.items() if v > 1e-4
        }.keys()


def test_a_sample_without_weights_is_an_error_that_says_what_to_do(world):
    spec, samples = world
    with pytest.raises(DataError, match=r"has no 'teacher_weights' of math, which `teacher_weights: consensus` reads"):
        Preparer(of(spec, InfiFusion(teacher_weights="consensus")), InProcess)(samples)
    with pytest.raises(DataError, match=r"has no 'sample_weight'.*consensus/choices\.jsonl of an earlier run"):
        refuse_without_weights(samples, ["math"], {"samples"})
    refuse_without_weights(samples, ["math"], ())
    other = [samples[0].weighted(Weights(1.0, (("math", 1.0),)))]
    with pytest.raises(DataError, match="'teacher_weights' of code"):
        refuse_without_weights(other, ["math", "code"], Trust(teacher_weights="consensus").weighs)


ROW = {"prompt": "2 + 2?", "response": "4"}


def test_weights_are_read_from_a_row():
    (sample,) = samples_of_row({**ROW, "sample_weight": 0.5, "teacher_weights": {"b": 1, "a": 0.25}})
    assert sample.weights == Weights(0.5, (("a", 0.25), ("b", 1.0)))
    (same,) = samples_of_row({**ROW, "teacher_weights": '{"a": 0.25, "b": 1}'})  # a cell of a table
    assert same.weights == Weights(None, (("a", 0.25), ("b", 1.0)))
    assert same.weights.teacher("c") is None
    (plain,) = samples_of_row(ROW)
    assert plain.weights is None
    assert plain.key == sample.key
    turns = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}] * 2
    assert [one.weights.sample for one in samples_of_row({"messages": turns, "sample_weight": 1})] == [1.0, 1.0]


@pytest.mark.parametrize(
    ("columns", "match"),
    [
        ({"sample_weight": 1.5}, r"'sample_weight' must be a number from 0 to 1, not 1\.5"),
        ({"sample_weight": True}, "'sample_weight' must be a number from 0 to 1, not True"),
        ({"sample_weight": float("nan")}, "'sample_weight' must be a number from 0 to 1, not nan"),
        ({"teacher_weights": {"a": "much"}}, r"'teacher_weights\.a' must be a number from 0 to 1, not 'much'"),
        ({"teacher_weights": [1, 2]}, r"'teacher_weights' must be an object of teachers' names and weights"),
    ],
)
def test_weights_that_are_none_are_named(columns, match):
    with pytest.raises(DataError, match=match):
        samples_of_row({**ROW, **columns})
