"""Files: what is read, in which order, and the words for what is not there or not read."""

import bz2
import csv
import gzip
import json
import lzma

import datasets
import fsspec
import pyarrow
import pytest

from rayfuse.config import Data
from rayfuse.data.rows import read_samples
from rayfuse.data.sample import Sample
from rayfuse.errors import DataError

ROWS = [{"prompt": "2 + 2?", "response": "4"}, {"prompt": 'Say, "NA"\nor 007', "response": "NA"}]
SAMPLES = [Sample((("user", row["prompt"]),), row["response"]) for row in ROWS]
TOOL = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Lund"}}}
CHAT = [
    {"role": "user", "content": "Weather?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c1", "content": "7"},
    {"role": "assistant", "content": "7 degrees"},
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """`datasets` keeps what it converts: not in the home of whoever runs the tests; and the hub is not asked."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def read(*paths, **options):
    return read_samples(Data(path=str(paths[0]) if len(paths) == 1 else tuple(map(str, paths)), **options))


def responses(*paths, **options):
    return [sample.response for sample in read(*paths, **options)[0]]


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def table(rows, delimiter=","):
    import io

    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


TEXTS = {
    "rows.jsonl": lines(ROWS),
    "rows.ndjson": lines(ROWS),
    "rows.json": json.dumps(ROWS),
    "named.json": json.dumps({"version": 1, "data": ROWS}),
    "lines.json": lines(ROWS),
    "rows.csv": table(ROWS),
    "with a mark.csv": "\ufeff" + table(ROWS),
    "ROWS.JSONL": lines(ROWS),
    "rows.tsv": table(ROWS, "\t"),
}
PACK = {
    "": lambda data: data,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: pyarrow.compress(data, codec="zstd", asbytes=True),
}


@pytest.mark.parametrize("packed", PACK)
@pytest.mark.parametrize("name", TEXTS)
def test_texts_of_every_kind_and_packing(tmp_path, name, packed):
    path = tmp_path / f"{name}{packed}"
    path.write_bytes(PACK[packed](TEXTS[name].encode()))
    samples, counts = read(path)
    assert samples == SAMPLES
    assert counts.rows == 2


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "arrow", "saved"])
def test_tables_give_what_lines_give_though_every_row_has_all_keys_of_all_rows(tmp_path, kind):
    numbers = {"type": "object", "required": ["a"], "properties": {"a": {"type": "integer"}}}
    other = {"function": {"name": "add", "parameters": numbers}}
    call = {"id": "c2", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    chats = [CHAT, [CHAT[0], {"role": "assistant", "tool_calls": [call]}, *CHAT[2:]], CHAT[:1] + CHAT[3:]]
    rows = [{"messages": chat, "tools": [tool]} for chat, tool in zip(chats, [TOOL, other, TOOL], strict=True)]
    path = tmp_path / f"rows.{kind}"
    if kind == "jsonl":
        path.write_text(lines(rows))
    elif kind == "json":
        path.write_text(json.dumps(rows))
    else:
        made = datasets.Dataset.from_list(rows)
        if kind == "parquet":
            made.to_parquet(path)
        elif kind == "arrow":
            made.save_to_disk(tmp_path / "disk")
            path = next((tmp_path / "disk").glob("*.arrow"))
        else:
            made.save_to_disk(path)
    expected = [[json.loads(json.dumps(message)) for message in chat[:-1] if message is not None] for chat in chats]
    found = read(path)[0]
    assert [sample.response for sample in found] == ["7 degrees"] * 3
    for sample, chat in zip(found, expected, strict=True):
        assert [{k: v for k, v in turn.items() if v is not None} for turn in sample.turns] == [
            {k: v for k, v in turn.items() if v is not None} for turn in chat
        ]
    assert [json.loads(sample.tools) for sample in found] == [[TOOL], [other], [TOOL]]


def test_csv_cells_hold_texts_and_json_of_messages(tmp_path):
    rows = [{"messages": json.dumps(CHAT), "tools": json.dumps([TOOL]), "system": ""}]
    (tmp_path / "a.csv").write_text(table(rows))
    (sample,) = read(tmp_path / "a.csv")[0]
    assert json.loads(sample.tools) == [TOOL]
    assert len(sample.messages) == 3
    (tmp_path / "b.csv").write_text(table([{"prompt": "[1, 2]", "response": "[[1]]x"}]))
    assert read(tmp_path / "b.csv")[0] == [Sample((("user", "[1, 2]"),), "[[1]]x")]


def test_a_broken_line_of_a_csv_file_is_named(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("prompt,response\na,b\nc\nd,e\n")
    with pytest.raises(DataError, match=rf"^{path}:3: the line has 1 cells, and the first line names 2 columns"):
        read(path)
    assert responses(path, on_bad_row="skip") == ["b", "e"]
    path.write_text("prompt,prompt\na,b\n")
    with pytest.raises(DataError, match="the column 'prompt' is there twice"):
        read(path)


def several(folder):
    for name, answer in (("b.jsonl", "2"), ("a.jsonl", "1"), ("c.csv", "3")):
        row = {"prompt": "?", "response": answer}
        (folder / name).write_text(table([row]) if name.endswith("csv") else lines([row]))


def test_globs_lists_and_folders_are_read_in_order(tmp_path, monkeypatch, caplog):
    several(tmp_path)
    (tmp_path / "notes.md").write_text("nothing")
    assert responses(tmp_path / "*.jsonl") == ["1", "2"]
    assert responses(tmp_path / "[bc].*") == ["2", "3"]
    assert responses(tmp_path / "c.csv", tmp_path / "*.jsonl") == ["3", "1", "2"]
    caplog.clear()
    assert responses(tmp_path) == ["1", "2", "3"]
    assert "1 files are of no kind that is read: notes.md" in caplog.text
    assert responses(f"file://{tmp_path}/*.jsonl") == ["1", "2"]
    assert responses(tmp_path / "*.jsonl", limit=1) == ["1"]
    monkeypatch.chdir(tmp_path)
    assert responses("?.jsonl") == ["1", "2"]
    odd = tmp_path / "odd [1].jsonl"
    odd.write_text(lines(ROWS))
    assert read(odd)[0] == SAMPLES


def test_the_splits_of_a_folder(tmp_path):
    (tmp_path / "train.jsonl").write_text(lines(ROWS))
    (tmp_path / "test.jsonl").write_text(lines([{"prompt": "a", "response": "held out"}]))
    assert read(tmp_path)[0] == SAMPLES
    assert responses(tmp_path, split="test") == ["held out"]
    with pytest.raises(DataError, match=r"the folder has no split 'dev' \(it has \['test', 'train'\]\)"):
        read(tmp_path, split="dev")


def test_urls_of_other_file_systems():
    memory = fsspec.filesystem("memory")
    for name, answer in (("/rows/a.jsonl", "1"), ("/rows/b.jsonl", "2")):
        with memory.open(name, "w") as file:
            file.write(lines([{"prompt": "?", "response": answer}]))
    assert responses("memory://rows/b.jsonl") == ["2"]
    assert responses("memory://rows/*.jsonl") == ["1", "2"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.csv", "No such file or folder"),
        ("missing.jsonl.gz", "No such file or folder"),
        ("missing/deep/folder", "No such file or folder"),
        ("missing.txt", "No such file or folder"),
        ("*.arrow", "no file matches"),
        ("notes.txt", "a .txt file is not read; use .jsonl, "),
        ("notes.md", "a .md file is not read; use .jsonl, "),
        ("table.xlsx", "a .xlsx file is not read"),
        ("rows.zip", "a .zip file is not read"),
        ("rows.parquet.gz", "a .parquet.gz file is not read"),
        ("rows", "a file without a suffix is not read"),
        ("texts", "the folder has no data files (its files are: .txt); use"),
        ("object.json", "it is an object with ['a'], and no single list of rows"),
        ("number.json", "it is int, and no single list of rows"),
        ("broken.json", "Expecting"),
        ("not packed.jsonl.gz", "Not a gzipped file"),
        ("broken.parquet", "smaller than the minimum file footer"),
    ],
)
def test_what_is_not_there_or_not_read_is_said_as_such(tmp_path, name, message):
    for other in ("notes.txt", "notes.md", "table.xlsx", "rows.zip", "rows.parquet.gz", "rows"):
        (tmp_path / other).write_text("hello")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("hello")
    for other, text in (("object", '{"a": 1}'), ("number", "4"), ("broken", "[1,")):
        (tmp_path / f"{other}.json").write_text(text)
    (tmp_path / "not packed.jsonl.gz").write_text(lines(ROWS))
    (tmp_path / "broken.parquet").write_text("hello")
    with pytest.raises(DataError) as refused:
        read(tmp_path / name)
    assert str(refused.value).startswith(f"cannot read the data set {tmp_path / name}: ")
    assert message in str(refused.value)


def test_a_name_that_is_no_file_is_one_of_the_hub():
    with pytest.raises(
        DataError, match="cannot read the data set nobody/nothing: no file or folder is called so, and as"
    ):
        read("nobody/nothing")


def test_several_data_sets_each_with_its_columns_and_limit(tmp_path):
    several(tmp_path)
    (tmp_path / "d.jsonl").write_text(lines([{"q": "?", "a": "4"}, {"q": "?", "a": "5"}]))
    sources = [{"path": f"{tmp_path}/d.jsonl", "columns": {"prompt": "q", "response": "a"}}, f"{tmp_path}/a.jsonl"]
    data = Data.model_validate(sources)
    samples, counts = read_samples(data)
    assert [sample.response for sample in samples] == ["4", "5", "1"]
    assert (counts.rows, counts.forms) == (3, {"'prompt' + 'response'": 3})
    limited = data.model_copy(update={"limit": 1})
    assert [sample.response for sample in read_samples(limited)[0]] == ["4", "1"]
    unknown = {"path": f"{tmp_path}/a.jsonl", "columns": {"system": "persona"}}
    with pytest.raises(DataError, match=r"no row of the data set .*a.jsonl has the columns \['persona'\] that"):
        read_samples(Data.model_validate(unknown))
    (tmp_path / "e.jsonl").write_text(lines([{"prompt": "?", "response": "6", "persona": "a"}, ROWS[0]]))
    samples, _ = read_samples(Data.model_validate({**unknown, "path": f"{tmp_path}/e.jsonl"}))
    assert [[message.role for message in sample.messages] for sample in samples] == [["system", "user"], ["user"]]
    with pytest.raises(DataError, match=r"d.jsonl:1: a row needs"):
        read_samples(Data.model_validate([f"{tmp_path}/a.jsonl", f"{tmp_path}/d.jsonl"]))
