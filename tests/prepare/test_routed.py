"""What the routed teachers say of the student's own texts: cells, chunks, weights."""

import numpy as np
import pytest

from rayfuse.alignment.token_bytes import encode_response
from rayfuse.config import Data, OnPolicy, parse_config
from rayfuse.data.render import Renderer
from rayfuse.data.rollout import Rollout
from rayfuse.data.rows import read_samples
from rayfuse.data.sample import Weights
from rayfuse.errors import DataError
from rayfuse.prepare.byte_prefix import PrefixMap
from rayfuse.prepare.preparer import Preparer
from rayfuse.prepare.routed import chunks, mixed, packed, prompt_weights, row_target
from rayfuse.prepare.spec import PrepareSpec
from rayfuse.signals.topk import TopKSignals
from rayfuse.teachers.identity import IdentifiedTeacher, fingerprint
from rayfuse.teachers.transformers import TransformersTeacher

PIECES = [b"4", b"41", b"412", b"5", b"a", b"ab", b"abc", b""]
IDS = PrefixMap({piece: index for index, piece in enumerate(PIECES) if piece})
K = 5


def test_a_likely_token_counts_for_the_longest_token_that_it_goes_on_from():
    """The teacher says 4, 5 or ab; the student would write 412, abc, 41 or a."""
    row = row_target({0: 0.5, 3: 0.2, 5: 0.2}, 3, [2, 6, 1, 4, 3], 4, PIECES, IDS)
    assert row.ids == [3, 0, 5, 2, 6, 1]  # "a" goes on from nothing that the teacher says
    assert row.cells == [0, 1, 2, 1, 2, 1]
    assert row.mass == [0.2, 0.5, 0.2]


def test_the_label_is_always_a_cell_and_only_the_largest_others_are_kept():
    row = row_target({0: 0.5, 3: 0.2, 5: 0.3}, 4, [3], 3, PIECES, IDS)
    assert row.ids == [4, 0, 5]  # 3 has mass, but no cell: for both sides it is in the rest
    assert row.mass == [0.0, 0.5, 0.3]


def test_a_row_needs_those_who_hold_most_of_the_weight():
    assert mixed([{1: 0.6}, {2: 0.8}], [0.75, 0.25]) == pytest.approx({1: 0.45, 2: 0.2})
    assert mixed([{1: 0.6}, None], [0.75, 0.25]) == pytest.approx({1: 0.6})
    assert mixed([None, {2: 0.8}], [0.75, 0.25]) is None
    assert mixed([None, None], [0.5, 0.5]) is None
    assert mixed([{}, None], [0.75, 0.25]) == {}  # it speaks of other tokens only: all is in the rest


def test_packed_rows_repeat_the_label_where_nothing_is_said():
    ids, cells, mass = packed([row_target({0: 0.9}, 3, [], 2, PIECES, IDS), None], [3, 7], 3)
    assert ids.tolist() == [[3, 0, 3], [7, 7, 7]]
    assert cells.tolist() == [[0, 1, -1], [-1, -1, -1]]
    np.testing.assert_allclose(mass, [[0, 0.9, 0], [0, 0, 0]], rtol=1e-6)


def _signals(ends, token_logps):
    L = len(token_logps)
    logps, ids = np.full((L, 1), -1.0, dtype=np.float16), np.zeros((L, 1), dtype=np.int32)
    token_logps = np.array(token_logps, dtype=np.float32)
    return TopKSignals(logps, ids, np.zeros(L, np.float32), token_logps, np.array(ends, dtype=np.int64))


@pytest.mark.parametrize("finished", [True, False])
def test_chunks_end_where_both_have_read_the_same_bytes(finished):
    """The student reads 412 5 4, the teacher 4 12 54: two chunks and the end of the turn."""
    rollout = Rollout((("user", "?"),), "41254", token_ids=(2, 3, 0), ends=(3, 4, 5), finished=finished)
    numbers, logps = chunks(rollout, _signals([1, 3, 5], [-1.0, -0.5, -2.0, -0.25]))
    assert numbers.tolist() == [0, 1, 1, 2 if finished else -1]
    assert logps[:3].tolist() == [-1.5, -2.0, -2.0]
    if finished:
        assert logps[3] == -0.25


class Local:
    """A teacher in this process that counts what it reads."""

    def __init__(self, teacher):
        self.backend = TransformersTeacher(teacher.teacher, K)
        self.read = []

    def score(self, samples):
        self.read += [sample.response for sample in samples]
        return lambda: self.backend.score(samples)


@pytest.fixture
def world(tiny, tmp_path):
    config = parse_config(tiny.tree(tmp_path / "run"))
    stage = OnPolicy(share=0.5, max_new_tokens=100, teacher_weights="consensus")
    spec = PrepareSpec(
        student=config.student,
        teachers=tuple(IdentifiedTeacher(teacher, fingerprint(teacher, K)) for teacher in config.teachers),
        store=str(tmp_path / "store"),
        k=K,
        alignment="bytes",
        max_length=200,
        targets=stage.targets,
        stage=stage,
    )
    samples, _ = read_samples(Data(path=str(tiny.root / "train.jsonl"), limit=8))
    tokenizer = Renderer.of(config.student).tokenizer

    def own(sample, weights, **changes):
        ids, ends = encode_response(tokenizer, sample.response)
        made = {"response": sample.response, "token_ids": tuple(ids.tolist()), "ends": tuple(ends.tolist()), "age": 1}
        return Rollout(messages=sample.messages, weights=weights, written=sample, **{**made, **changes})

    return spec, samples, own


def _prepare(spec, samples):
    locals_ = []
    preparer = Preparer(spec, lambda teacher: locals_.append(Local(teacher)) or locals_[-1])
    return preparer(samples), locals_


def test_only_the_students_own_texts_are_read_by_the_teachers(world):
    spec, samples, own = world
    weights = [Weights(teachers=(("code", 0.2), ("math", 0.3))), Weights(only="code")]
    unit = [own(samples[0], weights[0]), *samples[1:3], own(samples[3], weights[1], finished=False)]
    batch, asked = _prepare(spec, unit)
    math, code = asked
    assert math.read == [samples[0].response]
    assert code.read == [samples[0].response, samples[3].response]
    target = batch.rollouts
    own_samples = np.unique(batch.sample[target.own]).tolist()
    assert own_samples == [0, 3]
    assert batch.picks.shape == target.cells.shape == target.mass.shape
    np.testing.assert_array_equal(batch.picks[:, 0], batch.labels)
    heavy = [np.unique(batch.sample[one.rows]).tolist() for one in batch.targets]
    assert heavy == [[0], [3]]  # math, code
    counts = [target.counts[batch.sample == b][0] for b in range(4)]
    assert counts == pytest.approx([0.5, 1, 1, 1])
    assert (target.mass.sum(1) <= 1 + 1e-5).all()
    assert target.taught[target.own].mean() > 0.5
    last = np.flatnonzero(batch.sample == 3)[-1]
    assert target.chunks[last] == -1  # the turn was cut, not ended
    assert batch.stats["rollout_share"] == 0.5
    assert batch.stats["rollout_age"] == 1
    assert batch.stats["rollout_unfinished"] == 1
    assert batch.stats["rollout_tokens"] == sum(len(unit[b].token_ids) for b in (0, 3))


def test_an_empty_rollout_is_learnt_as_the_data_write_it(world):
    spec, samples, own = world
    math = Weights(only="math")
    unit = [own(samples[0], math, response="", token_ids=(), ends=()), own(samples[1], math)]
    batch, asked = _prepare(spec, unit)
    assert batch.stats["rollout_empty"] == 1
    assert batch.stats["rollout_share"] == 0.5
    assert asked[0].read == [samples[1].response]
    assert not batch.rollouts.own[batch.sample == 0].any()


def test_a_prompt_without_weights_is_refused_by_name(world):
    spec, samples, _ = world
    assert prompt_weights(spec, samples[0], by_row=False) == [1.0, 1.0]
    with pytest.raises(DataError, match="has no 'teacher_weights' and no 'teacher', which teacher_weights: consensus"):
        prompt_weights(spec, samples[0], by_row=True)
    for weights, text in (
        (Weights(only="law"), "'teacher' is 'law', and the teachers are math, code"),
        (Weights(teachers=(("math", 1.0),)), "'teacher_weights' has no weight of code"),
    ):
        with pytest.raises(DataError, match=text):
            prompt_weights(spec, samples[0].weighted(weights), by_row=True)
