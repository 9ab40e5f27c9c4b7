"""Merging the students of a pairwise run (InfiFusion_p): one model from S students that were trained from one base.

A student is its base plus a task vector, delta_s = student_s - base. The three methods differ in how they add the task
vectors up, tensor by tensor. Weights are read and written one tensor at a time: the files are mapped, not loaded, and
the arithmetic takes the memory of about S + 4 copies of the largest tensor in float32, however large the model is.

Shapes: every tensor of the model is its own case; `students_S` and `deltas_S` are S tensors of the base tensor's shape.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch

from rayfuse.config import Dtype
from rayfuse.errors import ConfigError, ModelError
from rayfuse.files import folder_whole
from rayfuse.models.folder import copy_rest, in_format, write_index
from rayfuse.models.merge_formulas import DENSITIES, MERGES, Recipe
from rayfuse.models.shards import FLOATS, Kind, Shards, write_shard
from rayfuse.models.weight_files import some_of

Method = Literal["task_arithmetic", "ties", "sce"]


def merge(
    base: Path,
    students: Sequence[Path],
    output: Path,
    *,
    method: Method,
    weights: Sequence[float] | None = None,
    density: float | None = None,
    scale: float = 1.0,
    dtype: Dtype | None = None,
) -> Path:
    """Merge S students of one base into a new model folder, deterministically.

    Weights are computed in float32 (float64 where stored so) and rounded once. Tensors that are not floating point
    must be equal in all models. Configuration, tokenizer, chat template and generation configuration are the base's;
    so are the names of the shards and which tensor is in which. The folder gets its name when all of it is written.

    Args:
        base: Hugging Face folder of the model that every student was trained from.
        students: Hugging Face folders with safetensors.
        output: folder to make; it must not exist.
        method: one of MERGES.
        weights: a factor per student. Task arithmetic: any numbers; default 1/S each, the mean task vector (the paper's
            sum of task vectors is 1 each, with its factor lambda as scale). TIES: above 0, only their ratios matter.
            SCE calculates its own: None.
        density: share of a tensor's elements to keep, in (0, 1]; default 0.2 for TIES and 0.1 for SCE, the papers'
            values. Task arithmetic keeps all: None.
        scale: factor on the merged task vector.
        dtype: number format of the merged weights; default: each tensor's own, which all models must then share.

    Returns:
        output.

    Raises:
        ConfigError: no students (SCE: fewer than two), a number out of its range or for a method that has no use for
            it, or an output that exists or is one of the models.
        ModelError: a folder without safetensors or with damaged ones, a student whose tensors have other names, shapes
            or dtypes, values that are not finite.
    """
    base, students, output = Path(base), [Path(student) for student in students], Path(output)
    recipe = _recipe(method, len(students), weights, density, scale)
    for model in (base, *students):
        if model.resolve() == output.resolve():
            raise ConfigError(f"merge: the output {output} is one of the models to merge; name another folder")
    if output.exists():
        raise ConfigError(f"merge: the output {output} exists; remove it or name another folder")
    root, *leaves = [Shards.open(model) for model in (base, *students)]
    for leaf in leaves:
        _check_student(root, leaf, any_float=dtype is not None)
    with folder_whole(output) as half:
        copy_rest(base, half, dtype)
        _write_weights(half, root, leaves, method, recipe, dtype)
    return output


def _recipe(method: str, count: int, weights: Sequence[float] | None, density: float | None, scale: float) -> Recipe:
    if method not in MERGES:
        raise ConfigError(f"merge: method is {method!r}, it must be one of {', '.join(MERGES)}")
    if count < (2 if method == "sce" else 1):
        wanted = "at least 2 students (it keeps what they disagree on)" if method == "sce" else "students"
        raise ConfigError(f"merge: {method} needs {wanted}, got {count}")
    if weights is not None:
        if method == "sce":
            raise ConfigError("merge: sce calculates the weights of the students itself; leave weights out")
        if len(weights) != count:
            raise ConfigError(f"merge: {len(weights)} weights for {count} students; give one per student")
        if not all(math.isfinite(weight) and (weight > 0 or method == "task_arithmetic") for weight in weights):
            above = "" if method == "task_arithmetic" else " above 0"
            raise ConfigError(f"merge: weights are {list(weights)}; {method} needs finite numbers{above}")
    if density is not None:
        if method == "task_arithmetic":
            raise ConfigError("merge: task_arithmetic keeps every element; leave density out")
        if not 0 < density <= 1:
            raise ConfigError(f"merge: density is {density}, it must be in (0, 1]: the share of elements to keep")
    if not math.isfinite(scale):
        raise ConfigError(f"merge: scale is {scale}, it must be a finite number")
    return Recipe(
        weights=tuple(weights) if weights is not None else (1 / count,) * count,
        density=DENSITIES.get(method, 1.0) if density is None else density,
        scale=scale,
    )


def _check_student(base: Shards, student: Shards, *, any_float: bool) -> None:
    def fits(kind: Kind, other: Kind) -> bool:
        return kind == other or (
            any_float and kind.shape == other.shape and kind.dtype in FLOATS and other.dtype in FLOATS
        )

    complaints = []
    if lacks := sorted(base.kinds.keys() - student.kinds.keys()):
        complaints.append(f"it lacks {some_of(lacks)}")
    if extra := sorted(student.kinds.keys() - base.kinds.keys()):
        complaints.append(f"only it has {some_of(extra)}")
    both = sorted(base.kinds.keys() & student.kinds.keys())
    if other := [name for name in both if not fits(base.kinds[name], student.kinds[name])]:
        pairs = [f"{name} is {student.kinds[name]} instead of {base.kinds[name]}" for name in other]
        complaints.append(some_of(pairs))
    if complaints:
        advice = "students must be trained from this base"
        if other and all(base.kinds[name].shape == student.kinds[name].shape for name in other):
            advice += "; where only number formats differ, say with dtype which one the merged model gets"
        raise ModelError(f"{student.path} does not fit the base {base.path}: {'; '.join(complaints)} ({advice})")


def _write_weights(
    folder: Path, base: Shards, students: Sequence[Shards], method: str, recipe: Recipe, dtype: Dtype | None
) -> None:
    """The merged weights, in shards that hold what the base's shards hold."""
    kinds = {name: in_format(kind, dtype) for name, kind in base.kinds.items()}
    for file in sorted(set(base.files.values())):
        part = {name: kind for name, kind in kinds.items() if base.files[name] == file}
        write_shard(folder / file, part, lambda name: _merged_tensor(name, base, students, kinds[name], method, recipe))
    write_index(folder, base, kinds)


def _merged_tensor(
    name: str, base: Shards, students: Sequence[Shards], kind: Kind, method: str, recipe: Recipe
) -> torch.Tensor:
    """The merged tensor `name`, of dtype and shape `kind`."""
    base_tensor, *students_S = [model.tensor(name) for model in (base, *students)]
    if kind.dtype not in FLOATS:
        for student, tensor in zip(students, students_S, strict=True):
            if not torch.equal(base_tensor, tensor):
                raise ModelError(f"{name} is {kind}, which cannot be merged, and {student.path} differs from the base")
        return base_tensor
    for model, tensor in zip((base, *students), (base_tensor, *students_S), strict=True):
        if not torch.isfinite(tensor).all():
            raise ModelError(f"{name} of {model.path} has values that are not finite: was its training interrupted?")
    merged = MERGES[method](base_tensor, students_S, recipe).to(FLOATS[kind.dtype])
    if not torch.isfinite(merged).all():
        raise ModelError(f"the merged {name} leaves the range of {kind.dtype}: lower scale, or choose another dtype")
    return merged
