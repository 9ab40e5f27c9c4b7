"""Prepare: units to batches, through the store."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from rayfuse.alignment.pairs import align
from rayfuse.config import Data, InfiFPO
from rayfuse.data.render import Renderer
from rayfuse.data.rows import read_preferences
from rayfuse.errors import MissingSignalsError, TeacherError
from rayfuse.prepare.preparer import Preparer
from rayfuse.signals.store import SignalStore
from rayfuse.signals.topk import FIELDS
from rayfuse.teachers.transformers import TransformersTeacher

K = 5


class Counting:
    """A teacher in this process that counts what it is asked."""

    asked: dict = {}  # noqa: RUF012

    def __init__(self, teacher):
        self.name = teacher.name
        self.backend = TransformersTeacher(teacher.teacher, K)
        Counting.asked[self.name] = 0

    def score(self, samples):
        Counting.asked[self.name] += len(samples)
        return lambda: self.backend.score(samples)


def _same(a, b):
    for field in dataclasses.fields(a):
        if field.name not in ("targets", "stats"):
            np.testing.assert_array_equal(getattr(a, field.name), getattr(b, field.name))
    for mine, theirs in zip(a.targets, b.targets, strict=True):
        np.testing.assert_array_equal(mine.rows, theirs.rows)
        assert mine.logps.tobytes() == theirs.logps.tobytes()


def test_batch_holds_every_sample_as_the_student_reads_it(tiny, world):
    spec, samples = world
    batch = Preparer(spec, Counting)(samples)
    tokenizer = AutoTokenizer.from_pretrained(tiny.model("pivot"))
    for b, sample in enumerate(samples):
        whole = tokenizer.apply_chat_template(
            [*sample.turns, {"role": "assistant", "content": sample.response}],
            tokenize=False,
        )
        ids = tokenizer.encode(whole, add_special_tokens=False)
        row = batch.input_ids[b][batch.attention_mask[b] == 1]
        assert [*row, batch.labels[batch.sample == b][-1]] == ids
        here = batch.positions[batch.sample == b] - b * batch.input_ids.shape[1]
        np.testing.assert_array_equal(batch.labels[batch.sample == b], np.array(ids)[here + 1])
        assert tokenizer.decode(batch.labels[batch.sample == b][:-1]) == sample.response


def test_targets_are_the_teachers_rows_at_equal_bytes(world):
    spec, samples = world
    batch = Preparer(spec, Counting)(samples)
    preparer = Preparer(spec, Counting)
    for target, scorer in zip(batch.targets, preparer.scorers, strict=True):
        answers = scorer.score(samples)()
        expected_rows, expected_logps, offset = [], [], 0
        for sample, answer in zip(samples, answers, strict=True):
            item = preparer.renderer.render(sample, 200)
            read = {0: 0, **{int(end): i + 1 for i, end in enumerate(answer.byte_ends)}}
            for row, end in enumerate([0, *item.ends]):
                if int(end) in read:
                    expected_rows.append(offset + row)
                    expected_logps.append(answer.logps[read[int(end)]])
            offset += len(item.response_ids)
        np.testing.assert_array_equal(target.rows, expected_rows)
        np.testing.assert_array_equal(target.logps, np.stack(expected_logps))


def test_each_text_is_forwarded_once(world):
    spec, samples = world
    first = Preparer(spec, Counting)(samples)
    assert Counting.asked == {"math": 8, "code": 8}
    again = Preparer(spec, Counting)(samples)
    assert Counting.asked == {"math": 0, "code": 0}
    assert first.stats["forwarded/math"] == 8
    assert again.stats["stored/math"] == 8
    _same(first, again)


def test_a_missing_sample_asks_for_the_whole_unit_and_gives_the_same_bits(world):
    spec, samples = world
    first = Preparer(spec, Counting)(samples)
    path = Path(SignalStore(spec.store).path(spec.teachers[0].fingerprint, samples[3].key))
    path.unlink()
    again = Preparer(spec, Counting)(samples)
    assert Counting.asked == {"math": 8, "code": 0}
    _same(first, again)
    assert path.exists()


def test_of_preference_pairs_only_the_side_that_is_missing_is_asked(tiny, world):
    """The chosen responses are those of the data, which the store has: each text is forwarded once in all."""
    spec, samples = world
    Preparer(spec, Counting)(samples)
    pairs, _ = read_preferences(Data(path=str(tiny.root / "pairs.jsonl"), limit=8))
    both = [side for pair in pairs for side in pair]
    assert [sample.key for sample in both[0::2]] == [sample.key for sample in samples]
    spec = dataclasses.replace(spec, targets=("responses",), stage=InfiFPO(), k=None)
    batch = Preparer(spec, Counting)(both)
    assert Counting.asked == {"math": 8, "code": 8}
    assert (batch.stats["forwarded/math"], batch.stats["stored/math"]) == (8, 8)
    expected = [
        SignalStore(spec.store).get(spec.teachers[0].fingerprint, sample.key).token_logps.sum() for sample in both
    ]
    np.testing.assert_allclose(batch.targets[0].response_logps, expected, rtol=1e-6)
    again = Preparer(spec, Counting)(both)
    assert Counting.asked == {"math": 0, "code": 0}
    np.testing.assert_array_equal(again.targets[0].response_logps, batch.targets[0].response_logps)


def test_a_damaged_object_is_counted_and_computed_again(world):
    spec, samples = world
    first = Preparer(spec, Counting)(samples)
    path = Path(SignalStore(spec.store).path(spec.teachers[1].fingerprint, samples[0].key))
    path.write_bytes(path.read_bytes()[:-3])
    again = Preparer(spec, Counting)(samples)
    assert again.stats["damaged"] == 1
    assert Counting.asked == {"math": 0, "code": 8}
    _same(first, again)


def test_a_teacher_that_answers_too_little_is_an_error(world):
    spec, samples = world

    class Short(Counting):
        def score(self, samples):
            return lambda: self.backend.score(samples)[:-1]

    with pytest.raises(MissingSignalsError, match="answered 7 of 8"):
        Preparer(spec, Short)(samples)


def test_a_teacher_that_fails_is_not_replaced_by_hard_labels(world):
    spec, samples = world

    class Failing(Counting):
        def score(self, samples):
            def wait():
                raise TeacherError("teacher math did not answer")

            return wait

    with pytest.raises(TeacherError, match="did not answer"):
        Preparer(spec, Failing)(samples)


def test_position_alignment_pairs_t_with_t(world):
    spec, samples = world
    by_position = Preparer(dataclasses.replace(spec, alignment="position"), Counting)(samples)
    rendered = Preparer(spec, Counting)
    rows = [len(rendered.renderer.render(sample).response_ids) for sample in samples]
    answers = rendered.scorers[0].score(samples)()
    assert len(by_position.targets[0].rows) == sum(min(n, len(answer)) for n, answer in zip(rows, answers, strict=True))


def test_tokens_are_those_of_the_student_with_the_same_bytes(tiny, world):
    """Each id is the student's token that decodes to the teacher's string; picks ask for it at its row."""
    spec, samples = world
    preparer = Preparer(dataclasses.replace(spec, targets=("ranks", "tokens")), Counting)
    batch = preparer(samples)
    student = AutoTokenizer.from_pretrained(tiny.model("pivot"))
    vocabulary = student.get_vocab()
    assert batch.picks.shape == (len(batch.labels), 2 * K)
    for s, (target, scorer, name) in enumerate(zip(batch.targets, preparer.scorers, ("math", "code"), strict=True)):
        teacher = AutoTokenizer.from_pretrained(tiny.model(name))
        ids = np.concatenate(
            [
                answer.ids[align(preparer.renderer.render(sample).ends, answer.byte_ends).teacher]
                for sample, answer in zip(samples, scorer.score(samples)(), strict=True)
            ]
        )
        special = set(teacher.all_special_ids) | set(teacher.added_tokens_decoder)
        end = Renderer(teacher).end_of_turn
        expected = np.array(
            [
                [
                    preparer.renderer.end_of_turn
                    if i == end
                    else -1
                    if i in special
                    else vocabulary.get(teacher.convert_ids_to_tokens(i), -1)
                    for i in row
                ]
                for row in ids.tolist()
            ]
        )
        np.testing.assert_array_equal(target.ids, expected)
        assert (target.ids < 0).any()
        assert (target.ids >= 0).mean() > 0.2
        asked = batch.picks[target.rows, s * K : (s + 1) * K]
        labels = np.repeat(batch.labels[target.rows, None], K, axis=1)
        np.testing.assert_array_equal(asked, np.where(target.ids < 0, labels, target.ids))


@pytest.mark.parametrize("kinds", [("ranks",), ("ranks", "graphs"), ("ranks", "tokens"), ("responses",)], ids="+".join)
def test_a_part_of_the_signals_makes_the_same_batch(world, kinds):
    """From a warm store only the fields that the targets are made of are read: each target comes out the same."""
    spec, samples = world
    spec = dataclasses.replace(spec, targets=kinds)
    cold = Preparer(spec, Counting)(samples)
    preparer = Preparer(spec, Counting)
    asked = []
    get = preparer.store.get
    preparer.store.get = lambda *place: asked.append(place[2]) or get(*place)
    warm = preparer(samples)
    assert set(asked) == {preparer.fields}
    assert preparer.fields != FIELDS
    _same(cold, warm)
    for mine, theirs in zip(cold.targets, warm.targets, strict=True):
        for field in ("ids", "graph", "response_logps", "response_tokens"):
            np.testing.assert_array_equal(getattr(mine, field), getattr(theirs, field))


def test_unmatched_marks_the_students_tokens_that_the_teacher_lacks(tiny, world):
    spec, samples = world
    preparer = Preparer(dataclasses.replace(spec, targets=("ranks", "unmatched")), Counting)
    batch = preparer(samples[:2])
    student = AutoTokenizer.from_pretrained(tiny.model("pivot"))
    special = set(student.all_special_ids) | set(student.added_tokens_decoder)
    for target, name in zip(batch.targets, ("math", "code"), strict=True):
        teacher = AutoTokenizer.from_pretrained(tiny.model(name))
        theirs = {token for token, i in teacher.get_vocab().items() if i not in teacher.added_tokens_decoder}
        ends = [Renderer(teacher).end_of_turn, preparer.renderer.end_of_turn]
        shared = {i for token, i in student.get_vocab().items() if token in theirs and i not in special} | {ends[1]}
        bits = np.unpackbits(target.unmatched)[: len(student)]
        assert set(np.flatnonzero(bits == 0).tolist()) == shared
        assert target.overlap == pytest.approx(len(shared) / len(teacher))
