"""Carrying a teacher's mass into the student's vocabulary."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayfuse.prepare.byte_prefix import PrefixMap, TeacherSide, carry, continuations, mix, teacher_weights
from rayfuse.signals.topk import TopKSignals

# Ids of a small vocabulary; the last is the end of the turn.
DIGITS = [b"0", b"1", b"2", b"3", b"4", b"5", b"6", b"7", b"8", b"9", b""]
PAIRS = [*DIGITS[:-1], b"12", b"13", b"25", b"57", b""]
END = len(DIGITS) - 1
END_PAIRS = len(PAIRS) - 1


def _prefixes(pieces):
    return PrefixMap({piece: index for index, piece in enumerate(pieces) if piece})


def _signals(rows, actual, ends):
    """rows: per teacher row {id: probability}; actual: the ids that follow."""
    k = max(map(len, rows))
    logps = np.full((len(rows), k), -12.0, dtype=np.float16)
    ids = np.zeros((len(rows), k), dtype=np.int32)
    token_logps = np.zeros(len(rows), dtype=np.float32)
    for i, row in enumerate(rows):
        for j, (index, p) in enumerate(sorted(row.items(), key=lambda item: -item[1])):
            logps[i, j], ids[i, j] = np.log(p), index
        token_logps[i] = np.log(row.get(actual[i], 1e-4))
    return TopKSignals(logps, ids, np.zeros(len(rows), np.float32), token_logps, np.array(ends, dtype=np.int64))


def _clean(carried):
    return [{i: round(p, 3) for i, p in row.items() if p > 2e-3} for row in carried]


def test_with_the_same_tokenizer_nothing_changes():
    teacher = TeacherSide(_signals([{1: 0.6, 2: 0.3}, {END: 0.9, 3: 0.1}], [1, END], [1]), DIGITS, END)
    carried = carry(teacher, b"1", np.array([1]), [1, END], _prefixes(DIGITS))
    assert _clean(carried) == [{1: 0.667, 2: 0.333}, {END: 0.9, 3: 0.1}]


def test_a_teacher_with_longer_tokens_teaches_every_digit():
    """The teacher reads 12 at once; the student, after 1, learns what the teacher expected after 1."""
    teacher = TeacherSide(
        _signals([{10: 0.5, 11: 0.3, 12: 0.2}, {END_PAIRS: 1.0}], [10, END_PAIRS], [2]), PAIRS, END_PAIRS
    )
    carried = carry(teacher, b"12", np.array([1, 2]), [1, 2, END], _prefixes(DIGITS))
    assert _clean(carried) == [{1: 0.8, 2: 0.2}, {2: 0.625, 3: 0.375}, {END: 1.0}]


def test_a_teacher_with_shorter_tokens_counts_the_alternatives_on_the_way():
    """The student reads 12 at once; the teacher says 1 (0.9), then 2 (0.6) or 3 (0.4)."""
    teacher = TeacherSide(_signals([{1: 0.9, 2: 0.1}, {2: 0.6, 3: 0.4}, {END: 1.0}], [1, 2, END], [1, 2]), DIGITS, END)
    carried = carry(teacher, b"12", np.array([2]), [10, END_PAIRS], _prefixes(PAIRS))
    assert _clean(carried) == [{10: 0.54, 11: 0.36, 2: 0.1}, {END_PAIRS: 1.0}]


def test_a_token_that_the_student_lacks_goes_to_its_longest_prefix():
    teacher = TeacherSide(_signals([{13: 0.7, 10: 0.3}, {END_PAIRS: 1.0}], [10, END_PAIRS], [2]), PAIRS, END_PAIRS)
    some = [*PAIRS[:10], b"12", b""]
    carried = carry(teacher, b"12", np.array([2]), [10, 11], _prefixes(some))
    assert _clean(carried) == [{5: 0.7, 10: 0.3}, {11: 1.0}]


def test_a_teacher_that_did_not_expect_the_text_says_nothing_inside_it():
    """It gave 0.001 to tokens that begin with what the student has read: there is nothing to condition on."""
    teacher = TeacherSide(_signals([{12: 0.999, 10: 0.001}, {END_PAIRS: 1.0}], [10, END_PAIRS], [2]), PAIRS, END_PAIRS)
    carried = carry(teacher, b"12", np.array([1, 2]), [1, 2, END], _prefixes(DIGITS))
    assert carried[1] == {}


def test_the_example_of_the_docs():
    """docs/bytekd.md: a teacher of digit pairs and one of digits, mixed for a student of digits."""
    pairs = _signals([{10: 0.5, 11: 0.3, 12: 0.2}, {END_PAIRS: 0.9, 5: 0.1}], [10, END_PAIRS], [2])
    digits = _signals([{1: 0.9, 2: 0.1}, {2: 0.2, 7: 0.8}, {END: 1.0}], [1, 2, END], [1, 2])
    labels, ends = [1, 2, END], np.array([1, 2])
    sides = TeacherSide(pairs, PAIRS, END_PAIRS), TeacherSide(digits, DIGITS, END)
    carried = [carry(side, b"12", ends, labels, _prefixes(DIGITS)) for side in sides]
    assert _clean(carried[0]) == [{1: 0.8, 2: 0.2}, {2: 0.625, 3: 0.375}, {END: 0.9, 5: 0.1}]
    assert _clean(carried[1]) == [{1: 0.9, 2: 0.1}, {7: 0.8, 2: 0.2}, {END: 1.0}]
    weights = teacher_weights([pairs, digits])
    np.testing.assert_allclose(weights, [0.45 / 0.63, 0.18 / 0.63], rtol=1e-5)
    ids, mass = mix(carried, weights.tolist(), labels, 4)
    rows = [{int(i): m for i, m in zip(*row, strict=True) if m > 0} for row in zip(ids, mass, strict=True)]
    assert _clean(rows) == [{1: 0.829, 2: 0.171}, {2: 0.504, 3: 0.268, 7: 0.229}, {END: 0.929, 5: 0.071}]


@settings(deadline=None)
@given(st.data())
def test_every_row_sums_to_one_or_is_empty(data):
    text = data.draw(st.text("0123456789", min_size=1, max_size=12)).encode()

    def cut(pieces):
        ids, position = [], 0
        while position < len(text):
            options = [i for i, piece in enumerate(pieces) if piece and text.startswith(piece, position)]
            ids.append(data.draw(st.sampled_from(options)))
            position += len(pieces[ids[-1]])
        return ids, np.cumsum([len(pieces[i]) for i in ids])

    teacher_ids, teacher_ends = cut(PAIRS)
    student_ids, student_ends = cut(PAIRS)
    rows = []
    for index in [*teacher_ids, END_PAIRS]:
        others = data.draw(st.lists(st.integers(0, END_PAIRS), unique=True, min_size=1, max_size=5))
        weights = [data.draw(st.integers(1, 9)) for _ in {*others, index}]
        rows.append({i: w / sum(weights) for i, w in zip({*others, index}, weights, strict=True)})
    teacher = TeacherSide(_signals(rows, [*teacher_ids, END_PAIRS], teacher_ends), PAIRS, END_PAIRS)
    labels = [*student_ids, END_PAIRS]
    carried = carry(teacher, text, student_ends, labels, _prefixes(PAIRS))
    assert len(carried) == len(labels)
    for row in carried:
        assert not row or sum(row.values()) == pytest.approx(1)
    ids, mass = mix([carried, carried], [0.5, 0.5], labels, 4)
    np.testing.assert_allclose(mass.sum(1), 1, rtol=1e-5)
    assert ids[:, 0].tolist() == labels
    assert (mass >= 0).all()


def test_mix_weighs_teachers_and_leaves_silent_ones_out():
    ids, mass = mix([[{1: 1.0}, {}], [{2: 1.0}, {}]], [0.75, 0.25], [1, 7], 3)
    assert ids[0].tolist() == [1, 2, 1]
    assert mass.tolist() == [[0.75, 0.25, 0.0], [1.0, 0.0, 0.0]]


def test_the_teacher_that_foresaw_the_response_counts_more():
    good = _signals([{1: 0.9}, {END: 0.9}], [1, END], [1])
    bad = _signals([{1: 0.1}, {END: 0.9}], [1, END], [1])
    np.testing.assert_allclose(teacher_weights([good, bad]), [0.9, 0.1], atol=1e-3)
    np.testing.assert_allclose(teacher_weights([good, bad], temper=0.0), [0.5, 0.5])
    np.testing.assert_allclose(teacher_weights([good, bad], temper=0.0, prior=[1.0, 3.0]), [0.25, 0.75])
    np.testing.assert_allclose(teacher_weights([good, bad], prior=[1.0, 3.0]), [0.75, 0.25], atol=1e-2)
    np.testing.assert_array_equal(teacher_weights([good, bad], prior=[0.7, 0.7]), teacher_weights([good, bad]))


def test_continuations_keep_what_the_teacher_gives_to_others():
    """At its own boundary these are its probabilities; inside 12, those that begin with 1 share what is kept."""
    teacher = TeacherSide(
        _signals([{10: 0.5, 11: 0.3, 5: 0.1}, {END_PAIRS: 0.7}], [10, END_PAIRS], [2]), PAIRS, END_PAIRS
    )
    found = continuations(teacher, b"12", np.array([1, 2]), [1, 2, END], _prefixes(DIGITS))
    assert _clean(found) == [{1: 0.8, 5: 0.1}, {2: pytest.approx(0.9 * 5 / 8, abs=2e-3), 3: 0.337}, {END: 0.7}]


def test_there_are_no_continuations_of_what_the_teacher_did_not_expect():
    teacher = TeacherSide(_signals([{12: 0.999, 10: 0.001}, {END_PAIRS: 1.0}], [10, END_PAIRS], [2]), PAIRS, END_PAIRS)
    found = continuations(teacher, b"12", np.array([1, 2]), [1, 2, END], _prefixes(DIGITS))
    assert found[1] is None
    assert _clean(found[::2]) == [{2: 0.999}, {END: 1.0}]


@settings(deadline=None)
@given(st.data())
def test_continuations_are_those_of_carry_but_for_their_sum(data):
    text = data.draw(st.text("0123456789", min_size=1, max_size=8)).encode()
    rows = []
    for digit in [*text.decode(), None]:
        actual = END if digit is None else int(digit)
        other = (actual + 1) % END if digit is not None else 3
        kept = data.draw(st.sampled_from([0.2, 0.5, 1.0]))
        rows.append({actual: 0.75 * kept, other: 0.25 * kept})
    ends = np.arange(1, len(text) + 1)
    labels = [*map(int, text.decode()), END]
    teacher = TeacherSide(_signals(rows, labels, ends), DIGITS, END)
    pairs = [ends[1::2], ends[1::2] if len(text) % 2 == 0 else np.append(ends[1::2], len(text))]
    for student_ends, own in ((ends, labels), (pairs[1], [0] * len(pairs[1]) + [END])):
        carried = carry(teacher, text, student_ends, own, _prefixes(DIGITS))
        found = continuations(teacher, text, student_ends, own, _prefixes(DIGITS))
        for one, other in zip(carried, found, strict=True):
            total = sum(other.values())
            assert total <= 1 + 1e-3
            assert {index: chance / total for index, chance in other.items()} == pytest.approx(one)
