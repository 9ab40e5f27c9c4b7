"""Data: rows to samples, what is refused and in which words, samples to units."""

import hashlib
import json
import math
import random
from collections import Counter

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayfuse.config import Data
from rayfuse.data.rows import compared_of_row, read_preferences, read_samples, samples_of_row
from rayfuse.data.sample import PAIR, Message, Sample
from rayfuse.errors import DataError
from rayfuse.prepare.units import LENGTH_WINDOW, make_units, share_out, unit_order

CHAT = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "2 + 2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "And in words, 世界?"},
    {"role": "assistant", "content": "four 🙂"},
]
ROWS = [{"messages": CHAT}, {"messages": CHAT[1:3]}]
SAMPLES = [
    Sample((("system", "Be short."), ("user", "2 + 2?")), "4"),
    Sample(
        (("system", "Be short."), ("user", "2 + 2?"), ("assistant", "4"), ("user", "And in words, 世界?")), "four 🙂"
    ),
    Sample((("user", "2 + 2?"),), "4"),
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """`datasets` keeps what it converts: not in the home of whoever runs the tests."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def read(path, **options):
    return read_samples(Data(path=str(path), **options))


# --- formats ------------------------------


def save(rows, folder, kind):
    """The rows in one of the formats; the path that a configuration names."""
    table = datasets.Dataset.from_list(rows)
    if kind == "folder":
        table.save_to_disk(folder / "saved")
        return folder / "saved"
    path = folder / f"rows.{kind}"
    if kind in ("jsonl", "ndjson"):
        write(path, rows)
    elif kind == "json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    else:
        table.to_parquet(path)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "ndjson", "json", "parquet", "folder"])
def test_every_format_gives_the_same_samples(tmp_path, kind):
    samples, counts = read(save(ROWS, tmp_path, kind))
    assert samples == SAMPLES
    assert (counts.rows, counts.samples, counts.bad_rows, counts.first_bad) == (2, 3, 0, "")
    assert read(save(ROWS, tmp_path, "jsonl"), limit=1)[0] == SAMPLES[:2]


def test_a_saved_data_set_with_splits(tmp_path):
    split = datasets.Dataset.from_list([{"prompt": "a", "response": "b"}])
    datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS), "test": split}).save_to_disk(tmp_path / "saved")
    assert read(tmp_path / "saved")[0] == SAMPLES
    assert read(tmp_path / "saved", split="test")[0] == [Sample((("user", "a"),), "b")]
    with pytest.raises(DataError, match=f"cannot read the data set {tmp_path}/saved: KeyError: 'dev'"):
        read(tmp_path / "saved", split="dev")


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
def test_prompt_and_response_in_every_format(tmp_path, kind):
    rows = [{"prompt": "a\r\n b", "response": " c ", "skill": "math"}, {"prompt": "d", "response": "e", "skill": None}]
    samples, _ = read(save(rows, tmp_path, kind))
    assert samples == [Sample((("user", "a\r\n b"),), " c ", "math"), Sample((("user", "d"),), "e")]
    assert samples[0].skill == "math"


@pytest.mark.parametrize("kind", ["json", "parquet", "folder"])
def test_a_malformed_row_of_a_table_is_named_by_its_number(tmp_path, kind):
    rows = [{"prompt": "a", "response": "b"}, {"prompt": "c", "response": ""}, {"prompt": "d", "response": "e"}]
    path = save(rows, tmp_path, kind)
    with pytest.raises(DataError, match=rf"^{path}, row 1: 'response' is empty; there is nothing to learn from it\. "):
        read(path)
    samples, counts = read(path, on_bad_row="skip")
    assert [sample.response for sample in samples] == ["b", "e"]
    assert (counts.rows, counts.bad_rows) == (3, 1)


def test_a_prompt_may_be_a_list_of_messages():
    row = {"prompt": CHAT[:2], "response": "4"}
    assert samples_of_row(row) == SAMPLES[:1]


def test_null_messages_are_no_form():
    assert samples_of_row({"messages": None, "prompt": "x", "response": "y"}) == [Sample((("user", "x"),), "y")]


def test_blank_lines_and_a_byte_order_mark_are_no_rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(ROWS[1]).encode() + b"\r\n\n  \n" + json.dumps(ROWS[1]).encode())
    samples, counts = read(path)
    assert samples == SAMPLES[2:] * 2
    assert counts.rows == 2


def test_limits_count_rows(tmp_path):
    path = write(tmp_path / "rows.jsonl", ROWS * 5)
    assert read(path, limit=3)[1].rows == 3
    assert read_samples(Data(path=path, limit=3), first=2)[1].rows == 2
    assert read_samples(Data(path=path, limit=3), first=50)[1].rows == 3


# --- malformed rows ------------------------------

MALFORMED = {
    "no JSON": ("{'prompt': 'a'}", "not valid JSON in UTF-8"),
    "cut off": ('{"prompt": "a", "resp', "not valid JSON in UTF-8"),
    "not UTF-8": (b'{"prompt": "\xff\xfe", "response": "b"}', "not valid JSON in UTF-8"),
    "nested too deep": ("[" * 100_000, "not valid JSON in UTF-8"),
    "a list": ('["a", "b"]', "a row must be an object with keys, not list"),
    "a number": ("3", "a row must be an object with keys, not int"),
    "other columns": (
        '{"ask": "a", "say": "b"}',
        r"a row needs 'messages', or 'prompt' and 'response'; it has \['ask', 'say'\]. Forms that are read: .*columns",
    ),
    "no response": ('{"prompt": "a"}', r"needs 'messages', or 'prompt' and 'response'; it has \['prompt'\]"),
    "empty response": ('{"prompt": "a", "response": ""}', "'response' is empty"),
    "null response": ('{"prompt": "a", "response": null}', "'response' must be text, not NoneType"),
    "number as response": ('{"prompt": "a", "response": 4}', "'response' must be text, not int"),
    "number as prompt": ('{"prompt": 4, "response": "a"}', "'prompt' must be a non-empty list of messages, not 4"),
    "empty prompt list": (
        '{"prompt": [], "response": "a"}',
        r"'prompt' must be a non-empty list of messages, not \[\]",
    ),
    "half a surrogate pair in the response": (
        r'{"prompt": "a", "response": "ab\ud83d"}',
        r"'response' is not valid Unicode \(half a surrogate pair at character 2\)",
    ),
    "half a surrogate pair in the prompt": (r'{"prompt": "\udc00", "response": "a"}', "'prompt' is not valid Unicode"),
    "half a surrogate pair in the skill": (
        r'{"prompt": "a", "response": "b", "skill": "\ud83d"}',
        "'skill' is not valid Unicode",
    ),
    "skill is no text": ('{"prompt": "a", "response": "b", "skill": 3}', "'skill' must be text, not int"),
    "no message": ('{"messages": []}', "'messages' must be a non-empty list of messages"),
    "messages as text": ('{"messages": "hello"}', "'messages' must be a non-empty list of messages, not 'hello'"),
    "message as text": (
        '{"messages": ["hello"]}',
        r"messages\[0\] must be an object with 'role' and 'content', not 'hello'",
    ),
    "unknown role": (
        '{"messages": [{"role": "user", "content": "a"}, {"role": "bot", "content": "b"}]}',
        r"messages\[1\]: role 'bot' is none of system, developer, user, assistant, tool",
    ),
    "no role": ('{"messages": [{"content": "a"}]}', r"messages\[0\]: role None is none of"),
    "a list as role": ('{"messages": [{"role": ["user"], "content": "a"}]}', r"messages\[0\]: role \['user'\] is none"),
    "a number as content": (
        '{"messages": [{"role": "user", "content": 4}]}',
        r"messages\[0\]: content must be text, not int",
    ),
    "no content and no call": (
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": null}]}',
        r"messages\[1\]: content must be text, not NoneType",
    ),
    "half a surrogate pair in a message": (
        r'{"messages": [{"role": "user", "content": "\ud800"}, {"role": "assistant", "content": "b"}]}',
        r"messages\[0\]: content is not valid Unicode",
    ),
    "no assistant turn": ('{"messages": [{"role": "user", "content": "a"}]}', "'messages' has no assistant turn"),
    "empty assistant turn": (
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}]}',
        "an assistant turn is empty",
    ),
}
GOOD = b'{"prompt": "a", "response": "b"}\n'


@pytest.mark.parametrize("kind", MALFORMED)
def test_a_malformed_line_is_named_with_file_line_and_reason(tmp_path, kind):
    line, reason = MALFORMED[kind]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD + b"\n" + (line if isinstance(line, bytes) else line.encode()) + b"\n" + GOOD)
    with pytest.raises(
        DataError, match=rf"^{path}:3: .*{reason}.*\. Correct the row, or set data.on_bad_row: skip to leave"
    ):
        read(path)

    samples, counts = read(path, on_bad_row="skip")
    assert samples == [Sample((("user", "a"),), "b")] * 2
    assert (counts.rows, counts.bad_rows, counts.samples) == (3, 1, 2)
    assert counts.first_bad.startswith(f"{path}:3: ")


def test_nothing_but_malformed_rows_is_an_error_even_when_they_are_skipped(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"a": 1}, {"b": 2}])
    with pytest.raises(DataError, match=r"gives no sample: all 2 rows are malformed, the first: .*rows.jsonl:1: a row"):
        read(path, on_bad_row="skip")


def test_an_empty_file_is_an_error(tmp_path):
    path = write(tmp_path / "rows.jsonl", [])
    with pytest.raises(DataError, match=rf"the data set {path} gives no sample: it has no rows"):
        read(path)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("missing.jsonl", "No such file"),
        ("missing.json", "No such file"),
        ("missing.parquet", "No such file"),
        ("missing folder", "No such file or folder"),
        ("empty folder", "the folder has no data files"),
        ("folder.jsonl", "the folder has no data files"),
        ("text.parquet", "."),
        ("text.json", "."),
    ],
)
def test_files_that_cannot_be_read_are_named(tmp_path, name, reason):
    for folder in ("empty folder", "folder.jsonl"):
        (tmp_path / folder).mkdir()
    for text in ("text.parquet", "text.json"):
        (tmp_path / text).write_text("hello")
    with pytest.raises(DataError, match=rf"cannot read the data set {tmp_path / name}: .*{reason}"):
        read(tmp_path / name)


def test_a_url_of_an_unknown_kind():
    with pytest.raises(DataError, match=r"cannot read the data set nowhere://a.jsonl: Protocol not known: nowhere"):
        read("nowhere://a.jsonl")


# --- keys ------------------------------


def test_the_key_is_the_hash_of_messages_and_response():
    text = '[[["user","2 + 2?"]],"4"]'
    assert SAMPLES[2].key == hashlib.sha256(text.encode()).hexdigest()
    assert Sample(SAMPLES[2].messages, "4", skill="math").key == SAMPLES[2].key


messages = st.lists(st.tuples(st.sampled_from(["user", "assistant"]), st.text(max_size=3)), min_size=1, max_size=3)
some_samples = st.builds(Sample, messages.map(tuple), st.text(min_size=1, max_size=3))


@given(some_samples, some_samples)
def test_keys_are_equal_exactly_where_the_text_is(a, b):
    assert (a.key == b.key) == ((a.messages, a.response) == (b.messages, b.response))


# --- units ------------------------------


@st.composite
def measured_samples(draw):
    """Samples, some of them twice, with their lengths, and a unit size."""
    texts = draw(st.lists(st.text("ab", min_size=1, max_size=6), min_size=1, max_size=60))
    samples = [Sample((("user", "?"),), text) for text in texts]
    return samples, [len(text) for text in texts], draw(st.integers(1, 9))


@given(measured_samples(), st.randoms())
def test_units_do_not_depend_on_the_order_of_the_rows(measured, random):
    samples, lengths, size = measured
    order = list(range(len(samples)))
    random.shuffle(order)
    shuffled = make_units([samples[i].key for i in order], [lengths[i] for i in order], size)
    contents = [[samples[order[i]].key for i in unit] for unit in shuffled]
    assert contents == [[samples[i].key for i in unit] for unit in make_units([s.key for s in samples], lengths, size)]


@given(measured_samples())
def test_units_cover_every_sample_once_and_are_full_and_sorted(measured):
    samples, lengths, size = measured
    units = make_units([s.key for s in samples], lengths, size)
    flat = [i for unit in units for i in unit]
    assert sorted(flat) == list(range(len(samples)))
    assert [len(unit) for unit in units[:-1]] == [size] * (len(units) - 1)
    assert 1 <= len(units[-1]) <= size
    assert [lengths[i] for i in flat] == sorted(lengths)  # one window


def test_lengths_are_sorted_inside_windows_only():
    samples = [Sample((("user", str(i)),), "x") for i in range(LENGTH_WINDOW + 100)]
    lengths = [1 + int(sample.key[:4], 16) % 97 for sample in samples]
    flat = [i for unit in make_units([s.key for s in samples], lengths, 8) for i in unit]
    assert sorted(flat) == list(range(len(samples)))
    assert {samples[i].key for i in flat[:LENGTH_WINDOW]} == set(sorted(s.key for s in samples)[:LENGTH_WINDOW])
    for window in (flat[:LENGTH_WINDOW], flat[LENGTH_WINDOW:]):
        assert [lengths[i] for i in window] == sorted(lengths[i] for i in window)


@given(st.integers(1, 40), st.integers(1, 5), st.integers(0, 2**32))
def test_every_epoch_visits_every_unit_once(units, epochs, seed):
    order = unit_order(units, units * epochs, seed)
    for epoch in range(epochs):
        assert sorted(order[epoch * units : (epoch + 1) * units]) == list(range(units))


@given(st.integers(1, 40), st.integers(1, 100), st.integers(0, 2**32))
def test_a_longer_run_begins_like_a_shorter_one(units, total, seed):
    order = unit_order(units, total, seed)
    assert len(order) == total
    assert unit_order(units, total + 17, seed)[:total] == order
    assert max(Counter(order).values()) - min((Counter(order)[i] for i in range(units)), default=0) <= 1


def test_the_order_depends_on_seed_and_epoch():
    orders = {tuple(unit_order(50, 50, seed)) for seed in range(20)}
    assert len(orders) == 20
    both = unit_order(50, 100, 0)
    assert both[:50] != both[50:]


@given(st.integers(1, 6), st.integers(1, 8), st.data())
def test_a_step_is_shared_out_in_equal_numbers_and_in_order(room, workers, data):
    count = room * workers
    units = data.draw(st.lists(st.integers(0, 99), min_size=count, max_size=count, unique=True))
    sizes = data.draw(st.lists(st.integers(1, 1000), min_size=100, max_size=100))
    shares = share_out(units, sizes, workers)
    assert [len(share) for share in shares] == [room] * workers
    assert sorted(unit for share in shares for unit in share) == sorted(units)
    assert all([unit for unit in units if unit in share] == share for share in shares), "in the order given"
    assert share_out(units, sizes, 1) == [units]


def test_a_step_shared_out_by_size_waits_less_than_one_dealt_in_turn():
    draw = random.Random(0)
    lost = {"in turn": 0.0, "by size": 0.0}
    for _ in range(200):
        sizes = [round(1000 * math.exp(draw.gauss(0, 0.3))) for _ in range(16)]
        for name, shares in (
            ("in turn", [range(16)[rank::4] for rank in range(4)]),
            ("by size", share_out(range(16), sizes, 4)),
        ):
            loads = [sum(sizes[unit] for unit in share) for share in shares]
            lost[name] += (1 - sum(loads) / (4 * max(loads))) / 200
    assert lost["in turn"] > 0.12
    assert lost["by size"] < 0.03


# --- preferences ------------------------------

TRIPLE = ("chosen", "chosen_pivot", "rejected")


def test_preferences_are_the_named_responses_to_one_prompt(tmp_path):
    """Text, or messages ending in the response; a row of three serves the stages that compare two."""
    chat = [{"role": "user", "content": "2 + 2?"}]
    row = {"prompt": "2 + 2?", "chosen": "4", "chosen_pivot": "four", "rejected": "5"}
    as_messages = {"prompt": chat, "chosen": [*chat, {"role": "assistant", "content": "4"}], "rejected": "5"}
    path = write(tmp_path / "pairs.jsonl", [row, as_messages])
    pairs, counts = read_preferences(Data(path=path))
    assert [[sample.response for sample in pair] for pair in pairs] == [["4", "5"], ["4", "5"]]
    assert {sample.messages for pair in pairs for sample in pair} == {(Message("user", "2 + 2?"),)}
    assert counts.samples == 2
    triples, counts = read_preferences(Data(path=path, on_bad_row="skip"), TRIPLE)
    assert [[sample.response for sample in triple] for triple in triples] == [["4", "four", "5"]]
    assert (counts.bad_rows, counts.samples) == (1, 1)


@pytest.mark.parametrize(
    ("row", "sides", "message"),
    [
        (
            {"prompt": "a", "chosen": "b"},
            PAIR,
            r"needs 'chosen' and 'rejected', and 'prompt'; it has \['chosen', 'prompt'\]",
        ),
        (
            {"prompt": "a", "chosen": "b", "rejected": "c"},
            TRIPLE,
            r"'chosen', 'chosen_pivot' and 'rejected', and 'prompt'; it has",
        ),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, PAIR, r"'chosen' and 'rejected' are the same: 'b'"),
        (
            {"prompt": "a", "chosen": "b", "chosen_pivot": "c", "rejected": "c"},
            TRIPLE,
            r"'chosen_pivot' and 'rejected' are the same: 'c'",
        ),
        ({"prompt": "a", "chosen": "", "rejected": "c"}, PAIR, "'chosen' is empty"),
        (
            {"prompt": "a", "chosen": [{"role": "user", "content": "b"}], "rejected": "c"},
            PAIR,
            "'chosen' must end with an assistant turn, not user",
        ),
    ],
)
def test_malformed_preferences_are_refused(row, sides, message):
    with pytest.raises(DataError, match=message):
        compared_of_row(row, sides)
