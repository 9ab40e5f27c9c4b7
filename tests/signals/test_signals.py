"""TopKSignals: the contract at the boundary, packing, and the safetensors object."""

import dataclasses
import hashlib
import json
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load, save

from rayfuse.errors import SignalError
from rayfuse.signals.codec import FORMAT, decode, encode, pack, read_signals, unpack
from rayfuse.signals.topk import FIELDS, TopKSignals

VOCABULARY = 1000
ABOUT = {"fingerprint": "f" * 32, "key": "a" * 64}


def make(rows=4, k=3, seed=0, vocabulary=VOCABULARY, lse_known=True):
    """A valid answer: the top k of random logits, as a teacher would compute it."""
    random = np.random.default_rng(seed)
    logits = random.normal(0, 4, (rows, vocabulary)).astype(np.float32)
    lse = np.log(np.exp(logits.astype(np.float64)).sum(1)).astype(np.float32)
    ids = np.argsort(-logits, axis=1, kind="stable")[:, :k].astype(np.int32)
    logps = np.take_along_axis(logits, ids, 1) - lse[:, None]
    return TopKSignals(
        logps=logps.astype(np.float16),
        ids=ids,
        lse=lse if lse_known else np.full(rows, np.nan, np.float32),
        token_logps=logps[:, 0].astype(np.float32),
        byte_ends=np.cumsum(random.integers(0, 5, rows - 1)).astype(np.int64),
    )


def equal(a, b):
    for field in dataclasses.fields(TopKSignals):
        mine, theirs = getattr(a, field.name), getattr(b, field.name)
        assert mine.dtype == theirs.dtype
        np.testing.assert_array_equal(mine, theirs)


answers = st.builds(
    make,
    rows=st.integers(1, 20),
    k=st.integers(1, 12),
    seed=st.integers(0, 2**32 - 1),
    lse_known=st.booleans(),
)


# --- the contract ------------------------------


@given(answers)
def test_a_teachers_answer_is_valid(signals):
    size = int(signals.byte_ends[-1]) if len(signals) > 1 else 0
    assert signals.validate(VOCABULARY, size) is signals


def test_logits_are_logps_plus_lse():
    random = np.random.default_rng(3)
    logits = random.normal(0, 4, (4, VOCABULARY)).astype(np.float32)
    signals = make(seed=3)
    np.testing.assert_allclose(
        signals.logps + signals.lse[:, None], np.take_along_axis(logits, signals.ids, 1), atol=0.01
    )


@pytest.mark.parametrize("k", [1, 2, 10, 100])
def test_rounding_to_float16_never_breaks_the_mass(k):
    """All mass in the kept k, rounded to float16: the sum may exceed 1 by rounding and must pass."""
    for seed in range(50):
        signals = make(rows=8, k=k, seed=seed, vocabulary=k)
        signals.validate(k)


def changed(**values):
    return dataclasses.replace(make(), **values)


def at(name, index, value):
    array = getattr(make(), name).copy()
    array[index] = value
    return changed(**{name: array})


ENDS = np.array([1, 3, 6], np.int64)
BROKEN = {
    "logps as float32": (changed(logps=make().logps.astype(np.float32)), "logps has dtype float32, not float16"),
    "ids as int64": (changed(ids=make().ids.astype(np.int64)), "ids has dtype int64, not int32"),
    "lse as float64": (changed(lse=make().lse.astype(np.float64)), "lse has dtype float64, not float32"),
    "byte ends as int32": (changed(byte_ends=ENDS.astype(np.int32)), "byte_ends has dtype int32, not int64"),
    "flat logps": (changed(logps=make().logps[0]), r"logps has shape \(3,\), not \[L, K\]"),
    "no row": (changed(logps=make().logps[:0]), r"logps has shape \(0, 3\), not \[L, K\]"),
    "no rank": (changed(logps=make().logps[:, :0]), r"logps has shape \(4, 0\), not \[L, K\]"),
    "fewer ids": (changed(ids=make().ids[:, :2]), r"ids has shape \(4, 2\), not \(4, 3\)"),
    "fewer lse": (changed(lse=make().lse[:3]), r"lse has shape \(3,\), not \(4,\)"),
    "fewer token_logps": (changed(token_logps=make().token_logps[:1]), r"token_logps has shape \(1,\), not \(4,\)"),
    "a byte end per row": (changed(byte_ends=np.arange(4)), r"byte_ends has shape \(4,\), not \(3,\)"),
    "nan": (at("logps", (2, 1), np.nan), "a log-probability is not finite, first in row 2"),
    "minus infinity": (at("logps", (1, 2), -np.inf), "a log-probability is not finite, first in row 1"),
    "token nan": (at("token_logps", 3, np.nan), "token_logps is not finite, first in row 3"),
    "unsorted": (at("logps", (0, 2), -0.001), "not sorted descending, first in row 0"),
    "mass": (at("logps", 1, [-0.1, -0.1, -8]), "the kept probabilities add up to more than 1, first in row 1"),
    "token above certain": (at("token_logps", 2, 0.5), "token_logps is above 0, first in row 2: 0.5"),
    "negative id": (at("ids", (3, 0), -1), "an id is outside 0..999, first in row 3"),
    "id of another vocabulary": (at("ids", (0, 1), VOCABULARY), "an id is outside 0..999, first in row 0"),
    "falling bytes": (changed(byte_ends=np.array([4, 3, 6])), "byte_ends is not increasing"),
    "negative bytes": (changed(byte_ends=np.array([-1, 3, 6])), "byte_ends is not increasing"),
    "another text": (changed(byte_ends=ENDS), "the teacher read 6 bytes of a response of 7 bytes"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_contract_is_named(name):
    signals, message = BROKEN[name]
    with pytest.raises(SignalError, match=message):
        signals.validate(VOCABULARY, 7)


# --- packing ------------------------------

lists = st.lists(answers, min_size=1, max_size=6).filter(lambda items: len({item.k for item in items}) == 1)


@given(lists)
def test_unpack_inverts_pack(items):
    packed = pack(items)
    assert packed["lengths"].tolist() == [len(item) for item in items]
    for item, again in zip(items, unpack(packed), strict=True):
        equal(item, again)


@given(lists)
def test_packed_arrays_are_what_the_numbers_say(items):
    """The naive twin: each value of the narrowed arrays computed alone, in Python's integers."""
    packed = pack(items)
    ids = [index for item in items for row in item.ids.tolist() for index in row]
    assert packed["ids_low"].ravel().tolist() == [index % 65536 for index in ids]
    assert packed["ids_high"].ravel().tolist() == [index // 65536 for index in ids]
    widths = [b - a for item in items for a, b in pairwise([0, *item.byte_ends.tolist()])]
    assert packed["widths"].tolist() == widths
    assert packed["widths"].dtype == packed["ids_high"].dtype == np.uint8


WIDE = {
    "ids of 3 bytes": (
        {"ids": np.array([[2**24 - 1, 65536, 65535], [0, 1, 2**16 + 1]] * 2, np.int32)},
        (np.uint8, np.uint8),
    ),
    "ids of 4 bytes": ({"ids": np.array([[2**31 - 1, 2**24, 0]] * 4, np.int32)}, (np.uint16, np.uint8)),
    "ids that are none": ({"ids": np.array([[-1, -(2**31), 70_000]] * 4, np.int32)}, (np.int16, np.uint8)),
    "a token of 300 bytes": ({"byte_ends": np.array([300, 300, 301], np.int64)}, (np.uint8, np.uint16)),
    "a token of 2^40 bytes": ({"byte_ends": np.array([1, 2**40, 2**62], np.int64)}, (np.uint8, np.uint64)),
    "ends that fall": ({"byte_ends": np.array([5, 2, -(2**62)], np.int64)}, (np.uint8, np.int64)),
}


@pytest.mark.parametrize("name", WIDE)
def test_what_does_not_fit_takes_a_wider_type_and_stays_exact(name):
    values, (high, widths) = WIDE[name]
    signals = changed(**values)
    packed = pack([signals, make(rows=2)])
    assert (packed["ids_high"].dtype, packed["widths"].dtype) == (high, widths)
    equal(unpack(packed)[0], signals)
    equal(unpack(packed)[1], make(rows=2))
    if widths != np.uint64:
        equal(decode(encode(signals, ABOUT), ABOUT), signals)


def test_unpacked_signals_are_views():
    packed = pack([make(seed=1), make(rows=7, seed=2)])
    for item in unpack(packed):
        assert item.logps.base is packed["logps"]
        assert item.token_logps.base is packed["token_logps"]


# --- the object ------------------------------


@given(answers)
def test_decode_inverts_encode(signals):
    equal(decode(encode(signals, ABOUT), ABOUT), signals)


@given(answers)
def test_the_object_is_what_the_safetensors_library_reads(signals):
    """The library's own reader, and the fields put together from its arrays without our code."""
    arrays = load(encode(signals, ABOUT))
    for name in ("logps", "lse", "token_logps"):
        assert arrays[name].dtype == getattr(signals, name).dtype
        np.testing.assert_array_equal(arrays[name], getattr(signals, name))
    np.testing.assert_array_equal(arrays["ids_low"] + 65536 * arrays["ids_high"].astype(int), signals.ids)
    np.testing.assert_array_equal([sum(arrays["widths"][: i + 1].tolist()) for i in range(len(signals) - 1)],
                                  signals.byte_ends)  # fmt: skip


def written_by_the_library(arrays, **about):
    """The object as the safetensors library writes it, each hash taken as the format says."""
    kinds = {"float16": "F16", "float32": "F32", "uint8": "U8", "uint16": "U16", "int64": "I64", "int32": "I32"}
    hashes = {
        name: hashlib.sha256(f"{name}{list(a.shape)}{kinds[str(a.dtype)]}".encode() + a.tobytes()).hexdigest()[:32]
        for name, a in arrays.items()
    }
    text = json.dumps({"fingerprint": ABOUT["fingerprint"], "key": ABOUT["key"]})
    return save(arrays, metadata={"format": FORMAT, "about": text, "hashes": json.dumps(hashes), **about})


@given(answers)
def test_an_object_that_the_safetensors_library_wrote_is_read(signals):
    narrow = {name: getattr(signals, name) for name in ("logps", "lse", "token_logps")}
    narrow["ids_low"] = (signals.ids % 65536).astype(np.uint16)
    narrow["ids_high"] = (signals.ids // 65536).astype(np.uint8)
    narrow["widths"] = np.diff(signals.byte_ends, prepend=0).astype(np.uint8)
    equal(decode(written_by_the_library(narrow), ABOUT), signals)


PARTS = {
    "ranks and where they stand": (("logps", "byte_ends"), 21),
    "ranks only": (("logps",), 20),
    "ranks with their tokens": (("logps", "ids"), 50),
    "log-probabilities of the response": (("token_logps",), 4),
    "everything": (FIELDS, 59),
}


@pytest.mark.parametrize("name", PARTS)
def test_a_part_is_read_alone(name):
    """The fields that were asked for, no other, and from no more bytes than they have beside the header."""
    fields, bytes_a_row = PARTS[name]
    signals = make(rows=1001, k=10)
    blob, taken = encode(signals, ABOUT), []

    def read(start, end):
        taken.append(end - start)
        return blob[start:end]

    part = read_signals(read, len(blob), ABOUT, fields)
    for field in FIELDS:
        if field in fields:
            np.testing.assert_array_equal(getattr(part, field), getattr(signals, field))
            assert getattr(part, field).dtype == getattr(signals, field).dtype
        else:
            assert getattr(part, field) is None
    assert sum(taken) <= 2048 + bytes_a_row * 1001


@pytest.mark.parametrize("fields", [("logps", "byte_ends"), ("token_logps",), ("ids",)])
def test_one_flipped_bit_of_a_part_is_found(fields):
    blob = encode(make(rows=3, k=2), ABOUT)
    for bit in range(8 * len(blob)):
        damaged = bytearray(blob)
        damaged[bit // 8] ^= 1 << bit % 8
        try:
            part = decode(bytes(damaged), ABOUT, fields)
        except SignalError:
            continue
        for field in fields:
            np.testing.assert_array_equal(getattr(part, field), getattr(make(rows=3, k=2), field))


def test_the_order_of_the_metadata_does_not_matter():
    equal(decode(encode(make(), ABOUT), dict(reversed(ABOUT.items()))), make())


def test_arrays_that_are_views_are_written_whole():
    wide = make(k=6)
    narrow = dataclasses.replace(wide, logps=wide.logps[:, :3], ids=wide.ids[:, :3])
    equal(decode(encode(narrow, ABOUT), ABOUT), narrow)


@pytest.mark.parametrize("part", range(20))
def test_one_flipped_bit_anywhere_is_found(part):
    """A part of all bits of length, header and content, each flipped alone."""
    blob = encode(make(rows=3, k=2), ABOUT)
    for bit in range(part, 8 * len(blob), 20):
        damaged = bytearray(blob)
        damaged[bit // 8] ^= 1 << bit % 8
        try:
            again = decode(bytes(damaged), ABOUT)
        except SignalError:
            continue
        equal(again, make(rows=3, k=2))  # a bit without meaning, for example white space


def test_every_truncation_is_found():
    blob = encode(make(), ABOUT)
    for length in range(len(blob)):
        with pytest.raises(SignalError):
            decode(blob[:length], ABOUT)
    with pytest.raises(SignalError):
        decode(blob + b"\0", ABOUT)


@given(st.binary(max_size=200))
def test_bytes_of_something_else_are_refused(blob):
    with pytest.raises(SignalError, match="not a readable signals object"):
        decode(blob, ABOUT)


def header_only(header):
    text = json.dumps(header).encode() if not isinstance(header, bytes) else header
    return len(text).to_bytes(8, "little") + text


@pytest.mark.parametrize(
    "header",
    [
        {},
        {"__metadata__": None},
        [1],
        5,
        b"[" * 100_000,
        {"a": {"dtype": "BF16", "shape": [0], "data_offsets": [0, 0]}},
    ],
    ids=["empty", "no metadata", "list", "number", "deep", "type that numpy lacks"],
)
def test_headers_of_something_else_are_refused(header):
    with pytest.raises(SignalError, match="not a readable signals object"):
        decode(header_only(header), ABOUT)


def test_content_that_does_not_have_its_hash():
    blob = bytearray(encode(make(), ABOUT))
    blob[-1] ^= 1
    with pytest.raises(SignalError, match=r"\w+ does not have the hash that its header gives"):
        decode(bytes(blob), ABOUT)


def test_another_teachers_or_samples_object():
    blob = encode(make(), ABOUT)
    with pytest.raises(SignalError, match=r"belongs to .*ffff.*, not to .*0000"):
        decode(blob, {**ABOUT, "fingerprint": "0" * 32})
    with pytest.raises(SignalError, match=r"belongs to .*aaaa.*, not to .*bbbb"):
        decode(blob, {**ABOUT, "key": "b" * 64})


def test_another_format():
    """Objects of the format before this one held the fields as they are."""
    arrays = {field.name: getattr(make(), field.name) for field in dataclasses.fields(TopKSignals)}
    with pytest.raises(SignalError, match=r"not a rayfuse-signals-2 object .*'rayfuse-signals-1'"):
        decode(save(arrays, metadata={"format": "rayfuse-signals-1"}), ABOUT)
    with pytest.raises(SignalError, match=r"not a rayfuse-signals-2 object .*'byte_ends', 'ids', 'logps'"):
        decode(written_by_the_library(arrays), ABOUT)


def test_size_at_k_10():
    """59 bytes a row at K = 10: 20 log-probabilities, 30 ids, 4 lse, 4 token, 1 width; and one header a sample."""
    small, large = (len(encode(make(rows=rows, k=10), ABOUT)) for rows in (101, 1101))
    assert (large - small) / 1000 == pytest.approx(59, abs=0.1)
    assert small - 59 * 101 < 1200
    packed = pack([make(rows=101, k=10), make(rows=51, k=10)])
    assert sum(array.nbytes for array in packed.values()) == 59 * 152 - 2 + 8 * 2
