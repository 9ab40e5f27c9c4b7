"""Files and folders that are there completely or not at all."""

from __future__ import annotations

import pytest

from rayfuse.files import folder_whole, write_whole


def test_a_file_is_replaced_at_once_and_leaves_nothing_beside_it(tmp_path):
    path = tmp_path / "config.json"
    write_whole(path, "ä")
    write_whole(path, b"second")
    assert path.read_bytes() == b"second"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_cannot_be_encoded_leaves_the_old_one(tmp_path):
    path = tmp_path / "config.json"
    write_whole(path, "first")
    with pytest.raises(UnicodeEncodeError):
        write_whole(path, "\ud800")
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]


def _fill(folder, text, **options):
    with folder_whole(folder, **options) as half:
        assert not (half / "a").exists()
        (half / "sub").mkdir()
        (half / "sub" / "a").write_text(text)
        if text == "fails":
            raise OSError("disk full")


def test_a_folder_appears_when_it_is_complete(tmp_path):
    folder = tmp_path / "new" / "model"
    _fill(folder, "one")
    assert (folder / "sub" / "a").read_text() == "one"
    _fill(folder, "two")
    assert (folder / "sub" / "a").read_text() == "two"
    assert list(folder.parent.iterdir()) == [folder]


def test_a_folder_that_fails_leaves_the_old_one(tmp_path):
    folder = tmp_path / "model"
    _fill(folder, "one")
    with pytest.raises(OSError, match="disk full"):
        _fill(folder, "fails")
    assert (folder / "sub" / "a").read_text() == "one"
    assert list(tmp_path.iterdir()) == [folder]


def test_the_faster_writer_stays_where_it_is_asked_to(tmp_path):
    folder = tmp_path / "model"
    with folder_whole(folder, replace=False) as half:
        folder.mkdir()
        (folder / "theirs").touch()
        (half / "mine").touch()
    assert [path.name for path in folder.iterdir()] == ["theirs"]
    assert list(tmp_path.iterdir()) == [folder]
