"""Checkpoints: complete or not there."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from rayfuse.errors import CheckpointError
from rayfuse.student.checkpoint import latest_checkpoint, restore_random_state, save_checkpoint

STATE = {"weights": {"w": torch.arange(6.0).reshape(2, 3)}, "optimizer": {"w/step": torch.tensor(3.0)}}


def _save(folder, step, keep=5):
    save_checkpoint(folder, step, "run-a", STATE, keep=keep)


def test_round_trip(tmp_path):
    torch.manual_seed(5)
    _save(tmp_path, 7)
    expected = torch.rand(4)
    checkpoint = latest_checkpoint(tmp_path, "run-a")
    assert checkpoint is not None
    assert checkpoint.step == 7
    assert torch.equal(checkpoint.load("weights")["w"], STATE["weights"]["w"])
    restore_random_state(checkpoint, rank=0)
    assert torch.equal(torch.rand(4), expected)
    manifest = json.loads((checkpoint.folder / "MANIFEST.json").read_text())
    assert set(manifest["files"]) == {"weights.safetensors", "optimizer.safetensors", "rng-0.safetensors"}
    history = [json.loads(line) for line in (tmp_path / "checkpoints.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in history] == [7]


def test_none_where_nothing_was_saved(tmp_path):
    assert latest_checkpoint(tmp_path, "run-a") is None


@pytest.mark.parametrize("damage", ["truncate", "flip", "no manifest", "half a manifest", "missing file"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path, damage, caplog):
    _save(tmp_path, 1)
    _save(tmp_path, 2)
    folder = tmp_path / "checkpoints" / "step_2"
    weights, manifest = folder / "weights.safetensors", folder / "MANIFEST.json"
    if damage == "truncate":
        weights.write_bytes(weights.read_bytes()[:-1])
    elif damage == "flip":
        blob = bytearray(weights.read_bytes())
        blob[-1] ^= 1
        weights.write_bytes(bytes(blob))
    elif damage == "no manifest":
        manifest.unlink()
    elif damage == "half a manifest":
        manifest.write_text(manifest.read_text()[:40])
    else:
        weights.unlink()
    checkpoint = latest_checkpoint(tmp_path, "run-a")
    assert checkpoint is not None
    assert checkpoint.step == 1
    assert "step_2 is damaged" in caplog.text


def test_what_a_killed_writer_left_is_no_checkpoint(tmp_path):
    _save(tmp_path, 1)
    half = tmp_path / "checkpoints" / ".step_2.half"
    half.mkdir()
    (half / "weights.safetensors").write_bytes(b"half")
    assert latest_checkpoint(tmp_path, "run-a").step == 1
    _save(tmp_path, 2)
    assert latest_checkpoint(tmp_path, "run-a").step == 2


def test_another_runs_checkpoint_is_refused(tmp_path):
    _save(tmp_path, 1)
    with pytest.raises(CheckpointError, match="belongs to another run"):
        latest_checkpoint(tmp_path, "run-b")


def test_only_the_newest_are_kept(tmp_path):
    for step in (1, 2, 3, 10):
        _save(tmp_path, step, keep=2)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step_10", "step_3"]


def test_every_rank_writes_its_own_part_and_the_manifest_names_all(tmp_path):
    """Two ranks that meet at real barriers; the state of a resumed run is that of both."""
    meet = threading.Barrier(2, timeout=30)

    def rank(number):
        part = {f"weights-{number}": {"w": torch.full((2,), float(number))}}
        save_checkpoint(tmp_path, 4, "run-a", part, rank=number, world=2, barrier=meet.wait)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(rank, range(2)))
    checkpoint = latest_checkpoint(tmp_path, "run-a")
    assert {name: part["w"].tolist() for name, part in checkpoint.state.items()} == {
        "weights-0": [0.0, 0.0],
        "weights-1": [1.0, 1.0],
    }
    files = json.loads((checkpoint.folder / "MANIFEST.json").read_text())["files"]
    assert set(files) == {f"{name}-{rank}.safetensors" for name in ("weights", "rng") for rank in (0, 1)}
    (checkpoint.folder / "weights-1.safetensors").unlink()
    assert latest_checkpoint(tmp_path, "run-a") is None


def test_a_part_that_is_there_already_is_not_overwritten(tmp_path):
    with pytest.raises(CheckpointError, match=r"rng-0\.safetensors"):
        save_checkpoint(tmp_path, 1, "run-a", {"rng-0": {"w": torch.zeros(1)}})
