"""Weights in safetensors, one tensor at a time: what a model folder holds, and files written without holding them.

The library's own writer wants all of a file in memory; a merge of large models must not.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from rayfuse.errors import ModelError
from rayfuse.models.weight_files import INDEX, SINGLE, read_index, some_of

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Number formats that can be computed with, by their names in safetensors."""
OTHERS = {
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Other formats of buffers."""


@dataclass(frozen=True)
class Kind:
    """What safetensors says of a tensor: its dtype's name ("BF16") and its shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def bits(self) -> int:
        """Bits per element, which safetensors writes into the name of every dtype but BOOL."""
        digits = re.search(r"\d+", self.dtype)
        return int(digits[0]) if digits else 8

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.bits // 8

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)}"


def name_of_dtype(dtype: torch.dtype) -> str:
    """The name of a dtype in safetensors."""
    return next(name for name, value in {**FLOATS, **OTHERS}.items() if value == dtype)


@dataclass(frozen=True)
class Shards:
    """The safetensors of one model folder.

    Attributes:
        path: the folder.
        files: file name of each tensor.
        kinds: dtype and shape of each tensor.
        index: content of model.safetensors.index.json; None where the weights are one file.
    """

    path: Path
    files: dict[str, str]
    kinds: dict[str, Kind]
    index: dict[str, Any] | None

    @classmethod
    def open(cls, path: Path) -> Shards:
        """Read which tensors a folder has, and none of their values.

        Raises:
            ModelError: there are no safetensors, or they are damaged or incomplete.
        """
        if (path / INDEX).is_file():
            index = read_index(path)
            files = dict(index["weight_map"])
        elif (path / SINGLE).is_file():
            index, files = None, {}
        else:
            raise ModelError(f"{path} has neither {SINGLE} nor {INDEX}; a merge needs complete models in safetensors")
        kinds: dict[str, Kind] = {}
        for file in sorted(set(files.values())) or [SINGLE]:
            try:
                with safe_open(path / file, framework="pt") as shard:
                    found = {name: shard.get_slice(name) for name in shard.keys()}  # noqa: SIM118
                    for name, part in found.items():
                        if index is None or files.get(name) == file:
                            kinds[name] = Kind(part.get_dtype(), tuple(part.get_shape()))
            except (SafetensorError, OSError) as error:
                raise ModelError(f"cannot read {path / file}: {type(error).__name__}: {error}") from error
        if index is None:
            files = dict.fromkeys(kinds, SINGLE)
        lost = sorted(files.keys() - kinds.keys())
        if lost:
            raise ModelError(f"{path}: {INDEX} promises {some_of(lost)}, but {files[lost[0]]} lacks {lost[0]}")
        return cls(path, files, kinds, index)

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor, memory-mapped: the mapping goes with the tensor."""
        with safe_open(self.path / self.files[name], framework="pt") as shard:
            tensor: torch.Tensor = shard.get_tensor(name)
        return tensor


def in_order(kinds: dict[str, Kind]) -> list[str]:
    """Names of a file's tensors in the order in which they are written: wide numbers first, so that all are aligned."""
    return sorted(kinds, key=lambda name: (-kinds[name].bits, name))


def write_shard(path: Path, kinds: dict[str, Kind], tensor_of: Callable[[str], torch.Tensor]) -> None:
    """Write a safetensors file one tensor at a time (the library's own writer wants all of a file in memory).

    The format: 8 bytes little-endian length of the header, the header in JSON, padded to 8 bytes, then the values.
    They are asked for and written `in_order`.
    """
    names = in_order(kinds)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        begin, end = end, end + kinds[name].size
        header[name] = {"dtype": kinds[name].dtype, "shape": list(kinds[name].shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in names:
            values = tensor_of(name).contiguous().reshape(-1).view(torch.uint8).numpy()
            assert values.nbytes == kinds[name].size, name
            values.tofile(file)
            del values  # or two tensors would be in memory while the next one is computed
