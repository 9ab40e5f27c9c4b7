"""The section `data`: one data set or several, by path, list or sources."""

import pytest

from rayfuse.config import Data, parse_config
from rayfuse.errors import ConfigError


def config(data, **changes):
    tree = {"student": "a/b", "data": data, "stages": ["sft"], "output": "out", **changes}
    return parse_config(tree)


def paths(data):
    return [part.paths for part in config(data).data.parts]


def test_a_path_a_list_of_paths_and_several_sources():
    assert paths("a.jsonl") == [("a.jsonl",)]
    assert paths(["a.jsonl", "b.csv"]) == paths({"path": ["a.jsonl", "b.csv"]}) == [("a.jsonl", "b.csv")]
    sources = ["a.jsonl", {"path": ["b.csv", "c.csv"], "weight": 0.5, "columns": {"prompt": "q"}}]
    assert paths(sources) == paths({"sources": sources}) == [("a.jsonl",), ("b.csv", "c.csv")]
    data = config({"sources": sources, "limit": 7}).data
    assert [part.weight for part in data.parts] == [1, 0.5]
    assert [part.limit for part in data.parts] == [7, 7]
    assert data.parts[1].columns == {"prompt": "q"}
    assert (data.file, data.label, data.weighted) == (None, "a.jsonl, b.csv, c.csv", True)
    assert (config("a.jsonl").data.file, config("a.jsonl").data.weighted) == ("a.jsonl", False)


def test_the_written_configuration_reads_as_the_same():
    for data in ("a.jsonl", ["a.jsonl", "b.csv"], {"sources": [{"path": "a.jsonl", "weight": 2}], "unit_size": 4}):
        one = config(data)
        assert parse_config(one.model_dump(mode="json")) == one


def test_every_local_path_becomes_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").touch()
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "b.jsonl").touch()
    whole = config([{"path": ["a.jsonl", "rows/*.jsonl"]}, "s3://bucket/b.jsonl", "org/data"]).absolute()
    expected = [(f"{tmp_path}/a.jsonl", f"{tmp_path}/rows/*.jsonl"), ("s3://bucket/b.jsonl",), ("org/data",)]
    assert [part.paths for part in whole.data.parts] == expected


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"unit_size": 4}, "data: say where the data are: `path`, or `sources`"),
        ({"path": "a", "sources": ["b"]}, "data: say where the data are: `path`, or `sources`"),
        ({"path": []}, "data.path: .* at least 1 character"),
        ({"path": ["a", ""]}, "data.path: .* at least 1 character"),
        ({"sources": [{"weight": 2}]}, "data.sources.0.path: is missing"),
        ({"sources": [{"path": "a", "weight": 0}]}, "data.sources.0.weight: .*greater than 0"),
        ({"sources": [{"path": "a", "weight": True}]}, "data.sources.0.weight: must be a number"),
        ({"sources": ["a"], "columns": {"prompt": "q"}}, "data: columns belongs into each of `sources`"),
        ({"sources": ["a"], "split": "test"}, "data: split belongs into each of `sources`"),
        (
            {"path": "a", "columns": {"question": "prompt"}},
            "data.columns: 'question' is no column that is read; there are",
        ),
        ({"path": "a", "columns": {"prompt": "q", "response": "q"}}, "data.columns: the column 'q' is named twice"),
        (
            {"path": "a", "columns": {"messages": "m", "prompt": "q"}},
            "data.columns: messages, and prompt with response",
        ),
    ],
)
def test_faults_are_named(data, message):
    with pytest.raises(ConfigError, match=message):
        config(data)


def test_a_list_may_be_anywhere_a_data_set_is():
    whole = config("a", preferences=["p.jsonl", "q.jsonl"], stages=["dpo"])
    assert whole.preferences.label == "p.jsonl, q.jsonl"
    assert Data(path="a").parts[0].paths == ("a",)
