"""A stage's result: finished where its model is whole and was made of what is there now."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from rayfuse.config import parse_config
from rayfuse.errors import CheckpointError
from rayfuse.prepare.spec import PrepareSpec
from rayfuse.student.job import StageJob
from rayfuse.student.result import commit_model, half_model, identity_of_model, is_finished

MADE_OF = {"code (rayfuse)": "1.0", "data": "rows", "student (the pivot)": "p", "teacher math": "m", "settings": "s"}


@pytest.fixture
def job(tiny, tmp_path):
    config = parse_config({"student": tiny.model("pivot"), "data": "d", "stages": ["sft"], "output": str(tmp_path)})
    spec = PrepareSpec(config.student, (), "", 4, "bytes", 200)
    return StageJob(config, 0, config.student.model, "identity", spec, (), (), made_of=MADE_OF)


@pytest.fixture
def finished(job):
    """A stage that went through: the pivot's files as its result."""
    assert not is_finished(job)
    shutil.copytree(job.start, half_model(job))
    assert commit_model(job) == job.folder / "model"
    return job


def test_a_stage_is_finished_when_its_model_has_its_name_and_its_manifest(finished):
    assert is_finished(finished)
    files = json.loads((finished.folder / "model.json").read_text())["files"]
    assert set(files) == {path.name for path in (finished.folder / "model").iterdir()}
    assert not half_model(finished).exists()


def test_a_model_whose_writer_was_killed_before_the_manifest_is_not_finished(finished):
    (finished.folder / "model.json").unlink()
    assert not is_finished(finished)


def test_a_model_that_somebody_removed_is_made_again(finished):
    shutil.rmtree(finished.folder / "model")
    assert not is_finished(finished)


@pytest.mark.parametrize("part", MADE_OF)
def test_what_changed_after_a_finished_stage_is_named(finished, part):
    changed = replace(finished, made_of={**MADE_OF, part: "another"})
    with pytest.raises(CheckpointError, match=re.escape(f"made with other inputs: {part} changed since")):
        is_finished(changed)
    assert is_finished(finished), "what is refused must not be written down"


def test_a_teacher_that_came_or_went_is_named(finished):
    without = {name: value for name, value in MADE_OF.items() if name != "teacher math"}
    with pytest.raises(CheckpointError, match="teacher code, teacher math changed"):
        is_finished(replace(finished, made_of={**without, "teacher code": "c"}))


def test_checkpoints_hold_a_stage_to_its_inputs_and_an_empty_folder_does_not(job):
    assert not is_finished(job)
    other = replace(job, made_of={**MADE_OF, "data": "other rows"})
    assert not is_finished(other), "nothing was trained yet"
    (job.folder / "checkpoints/step_3").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="data changed since"):
        is_finished(job)


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda model: _flip(model / "model.safetensors"), "model.safetensors"),
        (lambda model: (model / "model.safetensors").write_bytes(b"short"), "model.safetensors"),
        (lambda model: (model / "tokenizer.json").unlink(), "tokenizer.json"),
        (lambda model: (model / "pytorch_model.bin").write_bytes(b"x"), "pytorch_model.bin"),
    ],
)
def test_a_damaged_model_is_noticed_and_the_error_says_what_to_delete(finished, damage, named):
    model = finished.folder / "model"
    damage(model)
    with pytest.raises(
        CheckpointError, match=rf"{model} is not what .* wrote \({named}\): delete this folder and resume"
    ):
        is_finished(finished)
    shutil.rmtree(model)
    assert not is_finished(finished)


@pytest.mark.parametrize("name", ["model.json", "identity.json"])
@pytest.mark.parametrize("content", ["", '{"files": {', "[]", "\udc00"])
def test_a_torn_record_is_an_error_of_ours_that_names_the_file(finished, name, content):
    (finished.folder / name).write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(CheckpointError, match=rf"{name} cannot be read"):
        is_finished(finished)


def test_the_next_stage_knows_the_weights_that_it_starts_from(finished):
    before = identity_of_model(finished.folder)
    weights = load_file(finished.folder / "model/model.safetensors")
    shutil.copytree(finished.folder / "model", half_model(finished))
    commit_model(finished)
    assert identity_of_model(finished.folder) == before
    shutil.copytree(finished.folder / "model", half_model(finished))
    save_file({name: value + 1 for name, value in weights.items()}, half_model(finished) / "model.safetensors")
    commit_model(finished)
    assert identity_of_model(finished.folder) != before
