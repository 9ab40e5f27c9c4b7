"""Units: what is too long for which model, and how often the samples of weighted data sets are in an epoch."""

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayfuse.config import parse_config
from rayfuse.errors import DataError
from rayfuse.prepare import units
from rayfuse.prepare.measure import measure
from rayfuse.prepare.units import draw, load_units


@pytest.fixture(autouse=True)
def measured_here(monkeypatch):
    """Samples are measured in this process: no cluster."""

    def measure_here(config, groups):
        return [measure(config.student, config.teachers, group) for group in groups]

    monkeypatch.setattr(units, "measure_all", measure_here)


@pytest.fixture
def short_math(tiny, tmp_path):
    """The teacher math with a context of 40 tokens."""
    folder = tmp_path / "short-math"
    shutil.copytree(tiny.model("math"), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 40}))
    return str(folder)


def write(path, rows):
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def config(tiny, tmp_path, data, **changes):
    return parse_config(tiny.tree(tmp_path / "run", data=data, **changes))


def kept(found):
    return sorted(sample.response for unit in found.samples for sample in unit)


# --- lengths ------------------------------

ROWS = [
    {"prompt": "a", "response": "short"},
    {"prompt": "2 " * 60, "response": "long prompt"},
    {"prompt": "a", "response": "9 " * 60},
]


@pytest.mark.parametrize(
    ("too_long", "left", "counts"),
    [("drop", ["short"], {"math": 2}), ("cut", ["long prompt", "short"], {"math": 1})],
)
def test_longer_than_a_teachers_context_is_counted_and_dropped_or_cut_as_the_data_say(
    tiny, tmp_path, short_math, too_long, left, counts
):
    data = {"path": write(tmp_path / "rows.jsonl", ROWS), "unit_size": 2, "max_length": 190, "too_long": too_long}
    teachers = [{"model": short_math, "name": "math"}, {"model": tiny.model("code")}]
    found, counted = load_units(config(tiny, tmp_path, data, teachers=teachers, stages=["sft"]))
    assert kept(found) == left
    assert (counted.too_long_for, counted.too_long, counted.unreadable) == (counts, sum(counts.values()), 0)
    assert counted.cut == (too_long == "cut")
    assert f"; {counted.too_long} too long, dropped ({counted.too_long} for math)" in counted.lost


def test_the_student_comes_first_and_a_length_before_a_fault(tiny, tmp_path, short_math):
    """A response that is too long for the student is left out, whatever a teacher says of it."""
    rows = [ROWS[0], {"prompt": "a", "response": "9 " * 300}]
    data = {"path": write(tmp_path / "rows.jsonl", rows), "unit_size": 1, "max_length": 100}
    _, counted = load_units(config(tiny, tmp_path, data, teachers=[short_math]))
    assert counted.too_long_for == {"the student": 1}
    template = Path(short_math) / "chat_template.jinja"
    chat = [{"role": role, "content": "9 " * 300} for role in ("user", "assistant", "user", "assistant")]
    one_turn = "{% if messages|length > 2 %}{{ raise_exception('one message only') }}{% endif %}"
    template.write_text(one_turn + template.read_text())
    data = {**data, "path": write(tmp_path / "chats.jsonl", [ROWS[0], {"messages": chat}])}
    other = config(tiny, tmp_path, data, teachers=[{"model": short_math, "name": "strict"}])
    _, counted = load_units(other)
    assert (counted.too_long_for, counted.unreadable) == ({"the student": 2}, 0)


def test_nothing_left_says_for_which_models(tiny, tmp_path, short_math):
    data = {"path": write(tmp_path / "rows.jsonl", ROWS[1:]), "unit_size": 1, "max_length": 190}
    with pytest.raises(DataError, match=r"none is left: too long: 2 for short-math \(data.max_length is 190"):
        load_units(config(tiny, tmp_path, data, teachers=[short_math]))


# --- weights ------------------------------


def weighted(tmp_path, *weights):
    sources = []
    for name, weight in zip("abc", weights, strict=False):
        rows = [{"prompt": "?", "response": f"{name} {number}"} for number in range(10)]
        sources.append({"path": write(tmp_path / f"{name}.jsonl", rows), "weight": weight})
    return {"sources": sources, "unit_size": 4, "max_length": 190}


def test_a_weight_is_how_often_samples_are_in_an_epoch(tiny, tmp_path):
    data = weighted(tmp_path, 2, 0.5, 1.3)
    found, counts = load_units(config(tiny, tmp_path, data, seed=3))
    times = Counter(kept(found))
    assert [times[f"a {n}"] for n in range(10)] == [2] * 10
    assert sorted(times[f"b {n}"] for n in range(10)) == [0] * 5 + [1] * 5
    assert sorted(times[f"c {n}"] for n in range(10)) == [1] * 7 + [2] * 3
    assert (counts.rows, counts.samples, counts.drawn) == (30, 30, 38)
    for unit in found.samples:
        assert len({sample.key for sample in unit}) == len(unit), "no sample is twice in a unit"
    again, _ = load_units(config(tiny, tmp_path, data, seed=3))
    assert again == found
    other, _ = load_units(config(tiny, tmp_path, data, seed=4))
    assert kept(other) != kept(found)
    assert len(kept(other)) == 38


def test_weights_of_1_and_one_data_set_give_the_units_of_today(tiny, tmp_path):
    data = weighted(tmp_path, 1, 1)
    paths = [source["path"] for source in data["sources"]]
    one = write(
        tmp_path / "both.jsonl", [json.loads(line) for path in paths for line in Path(path).read_text().splitlines()]
    )
    for same in (data, {**data, "sources": paths}, {"path": paths, "unit_size": 4, "max_length": 190}):
        assert (
            load_units(config(tiny, tmp_path, same))[0]
            == load_units(config(tiny, tmp_path, {"path": one, "unit_size": 4, "max_length": 190}))[0]
        )


parts = st.lists(st.tuples(st.integers(1, 30), st.floats(0.01, 5)), min_size=1, max_size=4)


@given(parts, st.integers(0, 99))
def test_every_data_set_is_drawn_by_its_own_weight(sizes, seed):
    weights = [(number, weight) for number, (size, weight) in enumerate(sizes) for _ in range(size)]
    keys = [str(index) for index in range(len(weights))]
    rounds = draw(keys, weights, seed)
    assert all(len(set(one)) == len(one) and one for one in rounds)
    times = Counter(index for one in rounds for index in one)
    for number, (size, weight) in enumerate(sizes):
        mine = [times[index] for index, (part, _) in enumerate(weights) if part == number]
        assert abs(sum(mine) - max(1, weight * size)) <= 1
        assert max(mine) - min(mine) <= 1
    assert draw(keys, None, seed) == [list(range(len(keys)))]
