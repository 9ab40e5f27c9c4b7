"""Files: from a path to rows, each with its place.

Texts (JSON lines, JSON, CSV) are read here, line by line where they can be: a broken line is named, the rest is used,
and values keep their types (a .csv cell "4" is text, and a key that a row does not have is not null). Tables (Parquet,
Arrow, data sets of the hub) go through the `datasets` library.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import fsspec
from fsspec.core import url_to_fs

from rayfuse.config.data import Source
from rayfuse.errors import DataError

log = logging.getLogger(__name__)

PACKED = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd"}
LINES = (".jsonl", ".ndjson")
TABLES = {".parquet": "parquet", ".arrow": "arrow"}
KINDS = (*LINES, ".json", ".csv", ".tsv", *TABLES)
READ = f"{', '.join(KINDS)} (texts also packed: {', '.join(PACKED)})"
_OTHER_KINDS = """
.txt .md .rst .html .xml .yaml .yml .toml .pdf .doc .docx .xls .xlsx .ods .pkl .pickle .pt .npy .npz .h5 .hdf5 .db
.sqlite .zip .tar .tgz .7z .rar .safetensors .gguf .py .avro .orc .lance .feather
"""
OTHER_KINDS = frozenset(_OTHER_KINDS.split())
"""Kinds that are refused by name; any other unknown suffix may be part of a hub id."""
_MAGIC = re.compile(r"[*?[]")

Located = tuple[str, Mapping[str, Any] | DataError]
"""A place (file:line, or name and row) and its row, or why it is none."""


def read_source(source: Source) -> Iterator[Located]:
    """The rows of a source, in the order of its paths, of the files' names, and of the rows; at most `source.limit`.

    Raises:
        DataError: a path does not exist, is of a kind that is not read, or cannot be read.
    """
    count = 0
    for path in source.paths:
        for located in _read_path(path, source):
            if source.limit is not None and count >= source.limit:
                return
            count += 1
            yield located


def kind_of(path: str) -> tuple[str, str]:
    """(suffix of the kind, how it is packed) of a path: ("", "") where there is none."""
    bare = re.split(r"[?#]", path, maxsplit=1)[0] if path.startswith(("http://", "https://")) else path
    name = bare.rstrip("/").rsplit("/", 1)[-1].lower()
    packed = next((suffix for suffix in PACKED if name.endswith(suffix)), "")
    return Path(name.removesuffix(packed)).suffix, packed


def _read_path(path: str, source: Source) -> Iterator[Located]:
    with _named(path):
        fs, inner = url_to_fs(path)
        local = "://" not in path
        remote_file = path.startswith(("http://", "https://"))  # listing a web server is no use
        exists = not remote_file and fs.exists(inner)
        folder = exists and fs.isdir(inner)
    kind, _ = kind_of(path)
    if folder:
        yield from _read_folder(path, fs, inner, source)
    elif exists or remote_file:
        yield from read_file(path)
    elif _MAGIC.search(path):
        with _named(path):
            found = [name for name in sorted(fs.glob(inner)) if fs.isfile(name)]
        if not found:
            raise DataError(f"cannot read the data set {path}: no file matches")
        yield from _read_files([name if local else fs.unstrip_protocol(name) for name in found])
    elif kind in (*KINDS, *OTHER_KINDS) or not local or path.startswith(("/", ".", "~")) or path.count("/") > 1:
        raise DataError(f"cannot read the data set {path}: No such file or folder")
    else:
        yield from _read_hub(path, source)


def _read_files(paths: Iterable[str]) -> Iterator[Located]:
    for path in paths:
        yield from read_file(path)


def read_file(path: str) -> Iterator[Located]:
    """The rows of one file, by its kind.

    Raises:
        DataError: it is of no kind that is read, or cannot be read.
    """
    kind, packed = kind_of(path)
    if kind not in KINDS or (kind in TABLES and packed):
        what = f"a {kind}{packed} file" if kind else "a file without a suffix"
        raise DataError(f"cannot read the data set {path}: {what} is not read; use {READ}")
    with _named(path):
        if kind in TABLES:
            yield from _read_table(path, TABLES[kind])
        elif kind in (".csv", ".tsv"):
            yield from _read_csv(path, "," if kind == ".csv" else "\t")
        elif kind == ".json":
            yield from _read_json(path)
        else:
            yield from _read_lines(path)


@contextmanager
def _named(path: str) -> Iterator[None]:
    """Faults of the many libraries that read, named by the path."""
    try:
        yield
    except DataError:
        raise
    except GeneratorExit:
        raise
    except FileNotFoundError as error:
        raise DataError(f"cannot read the data set {path}: No such file or folder") from error
    except Exception as error:  # file systems, decompressors and parsers raise many kinds
        kind = "" if isinstance(error, (OSError, ValueError, ImportError)) else f"{type(error).__name__}: "
        raise DataError(f"cannot read the data set {path}: {kind}{error}") from error


@contextmanager
def _opened(path: str) -> Iterator[IO[bytes]]:
    packing = PACKED.get(kind_of(path)[1])
    with fsspec.open(path, "rb", compression=None if packing == "zstd" else packing) as file:
        if packing == "zstd":
            import pyarrow

            with pyarrow.CompressedInputStream(pyarrow.PythonFile(file, "r"), "zstd") as unpacked:
                yield io.BufferedReader(unpacked)  # type: ignore[arg-type]
        else:
            yield file


# --- texts ------------------------------


def _read_lines(path: str) -> Iterator[Located]:
    with _opened(path) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield f"{path}:{number}", _row_of_line(line)


def _row_of_line(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        return DataError(f"not valid JSON in UTF-8 ({error})")


def _read_json(path: str) -> Iterator[Located]:
    """A list of rows, an object with one list of rows in it, or (many files are called so) JSON lines."""
    with _opened(path) as file:
        text = file.read()
    try:
        value = json.loads(text)
    except ValueError as error:
        if "Extra data" not in str(error):
            raise
        yield from _read_lines(path)
        return
    if isinstance(value, dict):
        lists = {
            key: rows for key, rows in value.items() if isinstance(rows, list) and rows and isinstance(rows[0], dict)
        }
        if _is_row(value):
            value = [value]
        elif len(lists) == 1:
            value = next(iter(lists.values()))
        else:
            raise DataError(
                f"cannot read the data set {path}: it is an object with {sorted(value)[:8]}, and no single list of rows"
            )
    if not isinstance(value, list):
        raise DataError(f"cannot read the data set {path}: it is {type(value).__name__}, and no single list of rows")
    for number, row in enumerate(value):
        yield f"{path}, row {number}", row


def _is_row(value: Mapping[str, Any]) -> bool:
    """Whether an object is one row, and no list of rows under a name: its list is one of messages."""
    lists = [item for item in value.values() if isinstance(item, list) and item and isinstance(item[0], dict)]
    return any({"role", "from"} & rows[0].keys() for rows in lists) or (not lists and len(value) > 1)


def _read_csv(path: str, delimiter: str) -> Iterator[Located]:
    """Rows under the names of the first line; a cell is text, or JSON where it is a list of messages or of tools."""
    csv.field_size_limit(2**31 - 1)
    with _opened(path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
        reader = csv.reader(text, delimiter=delimiter, strict=True)
        names = next(reader, [])
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise DataError(f"cannot read the data set {path}: the column {twice[0]!r} is there twice")
        for cells in reader:
            place = f"{path}:{reader.line_num}"
            if not cells:
                continue
            if len(cells) != len(names):
                yield (
                    place,
                    DataError(f"the line has {len(cells)} cells, and the first line names {len(names)} columns"),
                )
            else:
                yield place, {name: _cell(cell) for name, cell in zip(names, cells, strict=True)}


def _cell(text: str) -> Any:
    if not re.match(r"\s*\[\s*[\[{]", text):
        return text
    try:
        return json.loads(text)
    except ValueError:
        return text


# --- tables ------------------------------


def _read_table(path: str, builder: str) -> Iterator[Located]:
    import datasets

    table = datasets.load_dataset(builder, data_files=path, split="train", streaming=True)
    for number, row in enumerate(table):
        yield f"{path}, row {number}", _top(row)


def without_nulls(value: Any) -> Any:
    """A table's value without the keys that are null: in a table every object has the keys of all others."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def _top(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row whose columns may be null, and the keys inside them are not."""
    return {name: without_nulls(value) for name, value in row.items()}


def _read_folder(path: str, fs: Any, inner: str, source: Source) -> Iterator[Located]:
    """A data set saved by `datasets`, a folder that describes itself as those of the hub, or a folder of files."""
    import datasets

    with _named(path):
        saved, several = (fs.exists(f"{inner}/{name}") for name in ("dataset_info.json", "dataset_dict.json"))
        if saved or several:
            table = datasets.load_from_disk(path)
            if several:
                table = table[source.split]
            for number, row in enumerate(table):
                yield f"{path}, row {number}", _top(row)
            return
    if source.name is not None or _describes_itself(fs, inner):
        yield from _read_hub(path, source)
        return
    with _named(path):
        yield from _read_files(_files_of_split(path, fs, inner, source.split))


def _files_of_split(path: str, fs: Any, inner: str, split: str) -> list[str]:
    """The files of a split in a folder, by the names that `datasets` knows (train, test ...); else all are `train`."""
    from datasets.data_files import DataFilesDict, EmptyDatasetError, get_data_patterns

    found = [name for name in sorted(fs.find(inner)) if not name.rsplit("/", 1)[-1].startswith((".", "_"))]
    kinds = ", ".join(sorted({"".join(kind_of(name)) or "without a suffix" for name in found})) or "none"
    if not any(kind_of(name)[0] in KINDS for name in found):
        raise DataError(
            f"cannot read the data set {path}: the folder has no data files (its files are: {kinds}); use {READ}"
        )
    try:
        splits = DataFilesDict.from_patterns(get_data_patterns(path), base_path=path)
    except (EmptyDatasetError, FileNotFoundError) as error:
        raise DataError(f"cannot read the data set {path}: the folder has no data files ({error})") from error
    if split not in splits:
        raise DataError(
            f"cannot read the data set {path}: the folder has no split {split!r} (it has {sorted(map(str, splits))})"
        )
    names = list(map(str, splits[split]))
    left_out = [name.rsplit("/", 1)[-1] for name in names if kind_of(name)[0] not in KINDS]
    if left_out:
        log.warning("%s: %d files are of no kind that is read: %s", path, len(left_out), ", ".join(left_out[:8]))
    return [name for name in names if kind_of(name)[0] in KINDS]


def _describes_itself(fs: Any, inner: str) -> bool:
    """Whether a folder's README.md says which files are which data, as data sets of the hub do."""
    card = f"{inner}/README.md"
    return bool(fs.exists(card)) and b"\nconfigs:" in fs.cat_file(card)[:65536]


def _read_hub(path: str, source: Source) -> Iterator[Located]:
    import datasets

    try:
        table = datasets.load_dataset(path, source.name, split=source.split, revision=source.revision)
    except Exception as error:  # the hub, its files and its parsers raise many kinds
        raise DataError(
            f"cannot read the data set {path}: no file or folder is called so, and as a data set of the hub it gives "
            f"{type(error).__name__}: {error}"
        ) from error
    for number, row in enumerate(table):
        yield f"{path}, row {number}", _top(row)
