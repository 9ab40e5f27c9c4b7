"""A sharded checkpoint: flat ranges of every tensor, each written by the rank that holds it, read by whoever needs it.

A parameter and its two moments are tensors of float32. Engines cut them differently (FSDP2 by rows, ZeRO by elements,
both with the number of ranks), but each rank always holds a contiguous range of the flattened tensor. So a file of a
rank holds, under `NAME/KEY@START:END`, the elements START to END of the tensor KEY of parameter NAME, and any number of
ranks can read what any other number wrote. KEY is `weight`, or a moment's name in AdamW.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch

from rayfuse.errors import StudentError
from rayfuse.student.checkpoint import State

WEIGHT = "weight"
MOMENTS = ("exp_avg", "exp_avg_sq")
STEP = "step"
"""Name of the scalar that counts AdamW's steps."""


def part_name(rank: int) -> str:
    """The file of a rank."""
    return f"part-{rank:05d}"


def range_key(name: str, key: str, start: int, values: torch.Tensor) -> str:
    """Under which a range of elements from `start` on is written."""
    return f"{name}/{key}@{start}:{start + values.numel()}"


@dataclass(frozen=True)
class _Range:
    start: int
    end: int
    file: str
    entry: str


class Ranges:
    """The tensors of a sharded checkpoint, read by ranges.

    Attributes:
        step: AdamW's steps; 0 where the optimiser has no state yet.
    """

    def __init__(self, state: State, names: Collection[str]) -> None:
        """Find out which file has which range.

        Args:
            state: the files of all ranks.
            names: the parameters of the model.

        Raises:
            StudentError: the checkpoint is another model's, or another engine's.
        """
        self.state = state
        self.found: dict[str, list[_Range]] = {}
        self.step = 0
        files = sorted(name for name in state if name.startswith("part-"))
        if not files:
            raise StudentError(
                f"the checkpoint was written by another engine (it holds {', '.join(sorted(state)) or 'no weights'}): "
                "go on with the engine that wrote it, or use another `output`"
            )
        for file in files:
            for entry in state[file]:
                if entry == STEP:
                    self.step = int(state[file][entry])
                    continue
                tensor, _, span = entry.rpartition("@")
                start, end = map(int, span.split(":"))
                self.found.setdefault(tensor, []).append(_Range(start, end, file, entry))
        weights = {tensor.removesuffix(f"/{WEIGHT}") for tensor in self.found if tensor.endswith(f"/{WEIGHT}")}
        if weights != set(names):
            odd = sorted(weights ^ set(names))
            raise StudentError(f"the checkpoint is of another model: {len(odd)} tensors differ, for example {odd[:3]}")

    def read(self, name: str, key: str, start: int, end: int) -> torch.Tensor:
        """Elements `start` to `end` of a tensor, flat, on the CPU.

        Raises:
            StudentError: the checkpoint lacks some of them.
        """
        pieces, at = [], start
        for one in sorted(self.found.get(f"{name}/{key}", ()), key=lambda one: one.start):
            if one.start <= at < min(one.end, end):
                values = self.state[one.file][one.entry]
                pieces.append(values[at - one.start : min(one.end, end) - one.start])
                at = min(one.end, end)
        if at < end:
            raise StudentError(
                f"the checkpoint lacks elements {at} to {end} of {name}/{key}; the model has another shape"
            )
        return torch.cat(pieces) if pieces else torch.empty(0)
