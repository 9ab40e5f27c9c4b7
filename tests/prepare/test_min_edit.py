"""MinED against plain implementations: edit distances, nearest tokens, time warping, and the target made of them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayfuse.prepare.min_edit import WORD, NearestTokens, Texts, edit_distances, lowest_entropy, mined_target, warp
from rayfuse.signals.topk import TopKSignals

SETTINGS = settings(deadline=None, max_examples=60)
WORDS = st.lists(st.text("abc ", max_size=9).map(str.encode), min_size=1, max_size=12)


def _levenshtein(a, b):
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (x != y))
    return row[-1]


def _by_length(texts):
    return sorted(texts, key=len, reverse=True)


@SETTINGS
@given(WORDS, WORDS)
def test_edit_distances_are_levenshteins(patterns, texts):
    texts = _by_length(texts)
    expected = [[_levenshtein(pattern, text) for text in texts] for pattern in patterns]
    np.testing.assert_array_equal(edit_distances(patterns, Texts(texts)), expected)


def test_edit_distances_of_long_tokens():
    """Up to the word's 64 bytes they are exact; beyond, the first 64 bytes are compared."""
    make = np.random.default_rng(0)
    words = _by_length([bytes(make.integers(97, 101, size=n).tolist()) for n in (1, 31, 62, 63, 64, 70, 128)])
    expected = [[_levenshtein(a[:WORD], b[:WORD]) for b in words] for a in words]
    np.testing.assert_array_equal(edit_distances(words, Texts(words)), expected)


@SETTINGS
@given(WORDS, WORDS)
def test_the_nearest_token_is_that_of_a_full_search(vocabulary, pieces):
    ids = {piece: 7 * index for index, piece in enumerate(dict.fromkeys(vocabulary)) if piece}
    if ids:
        nearest = NearestTokens(ids)
        for piece in pieces:
            expected = min(ids.items(), key=lambda item: (_levenshtein(piece, item[0]), item[1]))[1]
            assert nearest(piece) == expected
            assert nearest(piece) == expected  # the kept answer


def _naive_warp(teacher, student):
    """Dynamic time warping cell by cell, and the way back that prefers both sides, then the teacher's."""
    costs = [[_levenshtein(a.replace(b" ", b""), b.replace(b" ", b"")) for b in student] for a in teacher]
    total = np.full((len(teacher) + 1, len(student) + 1), np.inf)
    total[0, 0] = 0
    for i, row in enumerate(costs):
        for j, cost in enumerate(row):
            total[i + 1, j + 1] = cost + min(total[i, j + 1], total[i + 1, j], total[i, j])
    total = total[1:, 1:]
    partners = [[] for _ in student]
    i, j = len(teacher) - 1, len(student) - 1
    while i > 0 or j > 0:
        partners[j].append(i)
        options = [
            total[i - 1, j - 1] if i and j else np.inf,
            total[i - 1, j] if i else np.inf,
            total[i, j - 1] if j else np.inf,
        ]
        move = int(np.argmin(options))
        i, j = i - (move != 2), j - (move != 1)
    partners[0].append(0)
    return [of[0] if len(of) == 1 else -1 for of in partners]


@SETTINGS
@given(WORDS, WORDS)
def test_warping_takes_the_path_of_the_plain_algorithm(teacher, student):
    assert warp(teacher, student).tolist() == _naive_warp(teacher, student)


def test_warping_of_nothing():
    assert warp([], [b"a", b"b"]).tolist() == [-1, -1]
    assert warp([b"a"], []).tolist() == []


def _signals(rows, ends):
    """rows: per teacher row [(id, probability), ...] in descending order."""
    logps = np.log(np.array([[p for _, p in row] for row in rows])).astype(np.float16)
    ids = np.array([[i for i, _ in row] for row in rows], dtype=np.int32)
    return TopKSignals(logps, ids, np.zeros(len(rows), np.float32), logps[:, 0].astype(np.float32), np.array(ends))


STUDENT = {b"the": 0, b" cat": 1, b" cats": 2, b" s": 3, b"at": 4, b" sat": 5, b"!": 6}
END = 9
TEACHER = [b"the", b" cat", b" sat", b" catzs", b"??", b""]  # id 5 ends the turn


def _to_student(ids):
    return np.vectorize(lambda i: END if i == 5 else NearestTokens(STUDENT)(TEACHER[i]))(ids)


def test_the_target_of_a_matched_and_of_an_unmatched_position():
    """The student writes " sat" as " s" + "at", so two of its tokens share a teacher token that is neither's match."""
    answer = _signals(
        [
            [(0, 0.9), (1, 0.05)],
            [(3, 0.5), (1, 0.25)],  # " catzs" is nearest to " cats", " cat" is itself
            [(2, 0.5), (5, 0.125)],
            [(5, 0.8), (4, 0.1)],  # "??" is nearest to "!"
        ],
        [3, 7, 11],
    )
    labels = np.array([0, 1, 3, 4, END])
    ends = np.array([3, 7, 9, 11])
    ids, mass = mined_target(answer, b"the cat sat", ends, labels, _to_student, NearestTokens(STUDENT))
    rows = [
        {int(i): round(float(m), 3) for i, m in zip(*row, strict=True) if m > 0} for row in zip(ids, mass, strict=True)
    ]
    assert rows[0] == {0: 0.947, 1: 0.053}
    assert rows[1] == {2: 0.667, 1: 0.333}
    assert rows[2] == {5: 0.8, END: 0.2}
    assert rows[3] == {4: 1.0}
    assert rows[4] == {END: 1.0}
    np.testing.assert_array_equal(ids[:, 0], labels)
    np.testing.assert_allclose(mass.sum(1), 1, rtol=1e-5)


def test_of_two_tokens_with_one_nearest_token_the_likelier_counts():
    answer = _signals([[(1, 0.6), (0, 0.2)], [(5, 0.9), (0, 0.1)]], [4])
    vocabulary = {b" cat": 1}
    to_student = np.vectorize(lambda i: END if i == 5 else 1)
    ids, mass = mined_target(answer, b" cat", np.array([4]), np.array([1, END]), to_student, NearestTokens(vocabulary))
    assert mass[0].tolist() == [1, 0, 0]
    np.testing.assert_allclose(mass[1], [0.9, 0, 0.1], atol=1e-3)
    assert ids[1].tolist() == [END, END, 1]


def test_a_row_of_special_tokens_only_leaves_the_written_token():
    answer = _signals([[(3, 0.6), (4, 0.2)], [(5, 0.9), (4, 0.1)]], [1])
    to_student = np.vectorize(lambda i: END if i == 5 else -1)
    _, mass = mined_target(answer, b"!", np.array([1]), np.array([6, END]), to_student, NearestTokens(STUDENT))
    assert mass.tolist() == [[1, 0, 0], [1, 0, 0]]


def test_mince_takes_the_lowest_cross_entropy_per_token_of_its_own():
    short = _signals([[(0, 0.5), (1, 0.1)]] * 2, [3])
    long = _signals([[(0, 0.6), (1, 0.1)]] * 8, list(range(1, 8)))
    assert short.token_logps.sum() > long.token_logps.sum()
    assert lowest_entropy([short, long]) == 1
    assert lowest_entropy([short, short]) == 0


@pytest.mark.parametrize("seed", range(3))
def test_the_target_equals_one_made_row_by_row(seed):
    """Random texts cut in two ways, against a plain reading of the rules."""
    make = np.random.default_rng(seed)
    text = bytes(make.choice(list(b"ab c"), size=30).tolist())
    pieces = [bytes([x, y]) for x in b"ab c" for y in b"ab c"] + [bytes([x]) for x in b"ab c"]
    student = {piece: i for i, piece in enumerate(pieces)}
    teacher = [*pieces[::2], b"aba", b"c a", b"bb", b""]

    def cut(vocabulary):
        ends = [0]
        while ends[-1] < len(text):
            fitting = [piece for piece in vocabulary if piece and text.startswith(piece, ends[-1])]
            ends.append(ends[-1] + len(fitting[make.integers(len(fitting))]))
        return np.array(ends[1:])

    ends = cut(student)
    teacher_ends = cut([*teacher, *(bytes([x]) for x in b"ab c")])
    labels = np.array([student[text[a:b]] for a, b in zip([0, *ends], ends, strict=False)] + [END + 90])
    rows = []
    for _ in range(len(teacher_ends) + 1):
        chances = np.sort(make.dirichlet(np.ones(5)))[::-1]
        rows.append(list(zip(make.choice(len(teacher), 4, replace=False).tolist(), chances[:4], strict=True)))
    answer = _signals(rows, teacher_ends)
    nearest = NearestTokens(student)
    special = len(teacher) - 1
    to_student = np.vectorize(lambda i: -1 if i == special else nearest(teacher[i]))
    ids, mass = mined_target(answer, text, ends, labels, to_student, nearest)

    of_teacher = [text[a:b] for a, b in zip([0, *teacher_ends], teacher_ends, strict=False)]
    of_student = [text[a:b] for a, b in zip([0, *ends], ends, strict=False)]
    partners = _naive_warp(of_teacher, of_student)
    for row, label in enumerate(labels.tolist()):
        expected = {label: 1.0}
        teacher_row = 0
        if row:
            j = partners[row - 1]
            match = j >= 0 and min(student, key=lambda p: (_levenshtein(of_teacher[j], p), student[p]))
            teacher_row = j + 1 if match == of_student[row - 1] else None
        if teacher_row is not None:
            found = {}
            for i, logp in zip(answer.ids[teacher_row].tolist(), answer.logps[teacher_row].tolist(), strict=True):
                if i != special:
                    target = student[min(student, key=lambda p: (_levenshtein(teacher[i], p), student[p]))]
                    found.setdefault(target, np.exp(logp))
            expected = {i: p / sum(found.values()) for i, p in found.items()}
        got = {int(i): float(m) for i, m in zip(ids[row], mass[row], strict=True) if m > 0}
        assert got == pytest.approx(expected, rel=1e-3)
