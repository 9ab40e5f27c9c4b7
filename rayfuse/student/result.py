"""What a stage leaves: `model/`, and beside it what it was made of and what its files are.

STAGE/identity.json   what the stage is made of, by name; written before it begins
STAGE/model/          the model in float32, complete
STAGE/model.json      size and sha256 of the model's files; written last: a stage is finished where it is there

Whoever resumes compares: a run whose data, weights or code changed since would end with a model of two runs.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from rayfuse.data.render import Renderer
from rayfuse.errors import CheckpointError
from rayfuse.files import sync_folder, sync_tree, write_whole
from rayfuse.models.loading import load_tokenizer
from rayfuse.student.checkpoint import describe
from rayfuse.student.job import StageJob
from rayfuse.student.stopping import stop_at


def half_model(job: StageJob) -> Path:
    """Where the stage's model is put together; every worker knows the folder."""
    return job.folder / ".model.half"


def commit_model(job: StageJob) -> Path:
    """Give the complete model in `half_model` its name. It stops where the student was taught to.

    Returns:
        The folder of the model.

    Raises:
        OSError: it cannot be written; the stage is then not finished.
    """
    half, model = half_model(job), job.folder / "model"
    student = job.config.student
    tokenizer = load_tokenizer(student)
    if student.tokenizer is not None:  # a merge copies the tokenizer of its base
        tokenizer.save_pretrained(half)
    stop_at(half, tokenizer, Renderer(tokenizer, student.template).end_of_turn)
    sync_tree(half)
    files = _described(half)
    (job.folder / "model.json").unlink(missing_ok=True)
    shutil.rmtree(model, ignore_errors=True)
    half.rename(model)
    sync_folder(job.folder)
    write_whole(job.folder / "model.json", json.dumps({"files": files}, indent=2) + "\n")
    return model


def is_finished(job: StageJob) -> bool:
    """Whether the stage's model is there and whole; what it is made of is written down for those who come later.

    Raises:
        CheckpointError: what is there was made of something else, or its files changed.
    """
    _same_as_before(job)
    model = job.folder / "model"
    if not model.exists() or not (job.folder / "model.json").exists():
        return False  # a model without model.json: its writer was killed, and a checkpoint continues
    if damaged := _differences(_read(job.folder / "model.json").get("files"), model):
        raise CheckpointError(
            f"{model} is not what stage {job.name} wrote ({damaged}): delete this folder and resume, and the stage "
            "continues from its last checkpoint"
        )
    return True


def identity_of_model(folder: Path) -> str:
    """The hash of all files of a finished stage's model, as they were written.

    Raises:
        CheckpointError: there is none in the stage's folder `folder`.
    """
    files = _read(folder / "model.json").get("files")
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def _same_as_before(job: StageJob) -> None:
    path = job.folder / "identity.json"
    begun = (job.folder / "model.json").exists() or any((job.folder / "checkpoints").glob("step_*"))
    if begun and path.exists():
        before = _read(path)
        names = before.keys() | job.made_of.keys()
        changed = sorted(name for name in names if before.get(name) != job.made_of.get(name))
        if changed:
            raise CheckpointError(
                f"{job.folder} was made with other inputs: {', '.join(changed)} changed since. Undo the change, or use "
                "another `output`"
            )
    job.folder.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(dict(job.made_of), indent=2) + "\n")


def _described(folder: Path) -> dict[str, Any]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): describe(path) for path in paths}


def _differences(written: Any, model: Path) -> str:
    """The files of a model that are not as they were written, in words; empty where all are."""
    if not isinstance(written, dict):
        return f"{model}.json is damaged"
    found = _described(model)
    odd = sorted(name for name in written.keys() | found.keys() if written.get(name) != found.get(name))
    return ", ".join(odd[:3]) + (f" and {len(odd) - 3} more" if len(odd) > 3 else "")


def _read(path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(tree, dict):
            raise ValueError("it is no object")
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({error}): delete the folder {path.parent} to train this stage again"
        ) from error
    return tree
