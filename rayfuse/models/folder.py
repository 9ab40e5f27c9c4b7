"""Writing a model's folder: from a model in memory, or from another folder in another number format."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from rayfuse.config import Dtype
from rayfuse.errors import ModelError
from rayfuse.models.shards import FLOATS, Kind, Shards, write_shard
from rayfuse.models.weight_files import INDEX

TEMPLATES = "additional_chat_templates"
COPIED = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.py", "LICENSE*", "NOTICE*")


def save_model(model: Any, weights: dict[str, torch.Tensor], folder: Path) -> None:
    """Write configuration, generation configuration and `weights` of a transformers model, without a tokenizer.

    Makers ship generation settings that transformers reads but refuses to write (a temperature without sampling);
    they are written as they were read.
    """
    from transformers import GenerationConfig

    generation, model.generation_config = model.generation_config, GenerationConfig()
    try:
        model.save_pretrained(folder, state_dict=weights)
    finally:
        model.generation_config = generation
    (folder / "generation_config.json").write_text(generation.to_json_string(), encoding="utf-8")


def copy_rest(source: Path, folder: Path, dtype: Dtype | None) -> None:
    """Copy everything but the weights; config.json (and its text_config) says which number format they have."""
    for path in (path for pattern in COPIED for path in source.glob(pattern)):
        if path.is_file() and not path.name.endswith(".index.json"):
            shutil.copyfile(path, folder / path.name)
    if (source / TEMPLATES).is_dir():
        shutil.copytree(source / TEMPLATES, folder / TEMPLATES)
    config = folder / "config.json"
    if dtype is not None and config.exists():
        tree = {"dtype": dtype, **json.loads(config.read_text(encoding="utf-8"))}
        config.write_text(json.dumps(_with_dtype(tree, dtype), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _with_dtype(tree: dict[str, Any], dtype: Dtype) -> dict[str, Any]:
    return {
        key: dtype
        if key in ("dtype", "torch_dtype")
        else _with_dtype(value, dtype)
        if isinstance(value, dict)
        else value
        for key, value in tree.items()
    }


def in_format(kind: Kind, dtype: Dtype | None) -> Kind:
    """The kind of a tensor in another number format; what is not floating point stays, and all stays with None."""
    if dtype is None or kind.dtype not in FLOATS:
        return kind
    return next(Kind(name, kind.shape) for name, value in FLOATS.items() if value == getattr(torch, dtype))


def write_index(folder: Path, source: Shards, kinds: dict[str, Kind]) -> None:
    """The index of weights that are in shards as in `source`; none where they are one file."""
    if source.index is not None:
        metadata = {**source.index.get("metadata", {}), "total_size": sum(kind.size for kind in kinds.values())}
        index = {"metadata": metadata, "weight_map": source.files}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_in_format(source: Path, folder: Path, dtype: Dtype, start: Shards | None = None) -> float | None:
    """Write the model in `source` into the empty folder `folder`, its weights in another number format.

    One tensor is in memory at a time.

    Args:
        source: a model in safetensors.
        folder: an empty folder.
        dtype: number format of the new weights.
        start: the model that the training began with, of the same tensors; None: the rounding is not measured.

    Returns:
        The share of the training's update that survives the rounding, None where `start` is not given or nothing was
        trained. With the update u = source - start and what is left of it, v = rounded - start: <v, u> / <u, u>, the
        length of v along u in units of that of u. 0: the model is the start again.

    Raises:
        ModelError: a value leaves the range of the number format.
    """
    shards = Shards.open(source)
    copy_rest(source, folder, dtype)
    kinds = {name: in_format(kind, dtype) for name, kind in shards.kinds.items()}
    kept = asked = 0.0

    def rounded(name: str) -> torch.Tensor:
        nonlocal kept, asked
        tensor = shards.tensor(name)
        if kinds[name] == shards.kinds[name]:
            small = tensor
        else:
            small = tensor.to(FLOATS[kinds[name].dtype])
            if not torch.isfinite(small).all():
                raise ModelError(f"{name} of {source} leaves the range of {dtype}: choose another student.save_dtype")
        if start is not None and tensor.is_floating_point():
            begun = start.tensor(name).double()
            update = tensor.double() - begun
            kept += float((small.double() - begun).flatten() @ update.flatten())
            asked += float(update.flatten() @ update.flatten())
        return small

    for file in sorted(set(shards.files.values())):
        part = {name: kind for name, kind in kinds.items() if shards.files[name] == file}
        write_shard(folder / file, part, rounded)
    write_index(folder, shards, kinds)
    return kept / asked if asked else None
