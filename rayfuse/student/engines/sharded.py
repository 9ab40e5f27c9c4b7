"""What the engines have in common of which no rank holds the whole model: loading, forward, checkpoints and export.

An engine of this kind says which range of elements this rank holds of a parameter and of its moments, and gathers a
parameter. The rest follows:

- loading: a unit's weights are read from the files, cut, and let go before those of the next unit are read;
- checkpoint: each rank writes the ranges that it holds (ranges.py), and reads the ranges that it needs, whoever wrote
  them;
- export: the parameters are gathered one after the other, and rank 0 writes each before it asks for the next.
"""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from rayfuse.batch import FusionBatch
from rayfuse.config import Stage, Student
from rayfuse.losses import HeadOutput
from rayfuse.models.loading import load_tokenizer, valid_vocabulary
from rayfuse.models.output_layer import output_rows
from rayfuse.models.shards import Kind, name_of_dtype
from rayfuse.models.streamed import StreamedModel
from rayfuse.student.checkpoint import State
from rayfuse.student.engines.base import Engine
from rayfuse.student.engines.ddp import prepare_forward, tensors_of
from rayfuse.student.engines.head import Forward, ShardedForward, router_coefficient
from rayfuse.student.engines.ranges import MOMENTS, STEP, WEIGHT, Ranges, part_name, range_key


class ShardedEngine(Engine):
    """The part of an engine that does not depend on how the model is cut. See `Engine`."""

    made: Forward

    def __init__(self, student: Student, path: str, stage: Stage, device: torch.device) -> None:
        self.device = device
        self.stage = stage
        if not dist.is_initialized():  # one worker: a group of its own
            dist.init_process_group(self.backend(student), store=dist.HashStore(), rank=0, world_size=1)
        self.world, self.rank = dist.get_world_size(), dist.get_rank()
        self.source = (
            student if path == student.model else student.model_copy(update={"model": path, "gguf_file": None})
        )
        self.dtype = getattr(torch, student.dtype)
        self.tokenizer = load_tokenizer(student)
        self.streamed = StreamedModel(self.source)
        self.model = self.streamed.model
        prepare_forward(self.model, dropout=not stage.uses_preferences, checkpointing=student.gradient_checkpointing)
        vocabulary = valid_vocabulary(self.tokenizer, output_rows(self.model))
        router = router_coefficient(self.model, student.router_loss, check=False)
        self.module = ShardedForward(self.model, vocabulary, self.dtype, router)
        self.shapes = {name: parameter.shape for name, parameter in self.model.named_parameters()}
        self.trained = [name for name, parameter in self.model.named_parameters() if parameter.requires_grad]

    @staticmethod
    def backend(student: Student) -> str:
        """NCCL between GPUs, otherwise gloo; both where a part of the state is in the host's memory."""
        if not student.gpus:
            return "gloo"
        return "nccl" if student.offload == "none" else "cpu:gloo,cuda:nccl"

    @abstractmethod
    def _held(self, name: str, key: str) -> tuple[int, torch.Tensor]:
        """The range that this rank holds of `WEIGHT` or of a moment: its first element, and its values, flat."""

    @abstractmethod
    def _hold(self, name: str, key: str, values: torch.Tensor) -> None:
        """Overwrite what `_held` returns, with as many values on the CPU."""

    @abstractmethod
    def _steps_done(self) -> int:
        """The optimiser's steps; 0 where it has no moments yet."""

    @abstractmethod
    def _prepare_moments(self, step: int) -> None:
        """Make the optimiser's state, so that `_held` finds the moments, after `step` steps."""

    @abstractmethod
    def _whole(self, name: str) -> torch.Tensor:
        """A parameter in float32 on the CPU, on every rank. Collective."""

    @abstractmethod
    def _call(self, batch: dict[str, torch.Tensor], k: int | None, lse: bool) -> Forward:
        """The forward of the module that the engine wrapped."""

    def score(self, batch: FusionBatch, k: int, *, lse: bool = False) -> HeadOutput:
        """Cross-entropy and top k of a micro-batch's N positions."""
        self.made = self._call(tensors_of(batch, self.device), k, lse)
        assert self.made.head is not None
        return self.made.head

    def log_probabilities(self, batch: FusionBatch) -> torch.Tensor:
        """Differentiable log-probabilities [N] of the labels."""
        self.made = self._call(tensors_of(batch, self.device), None, False)
        assert self.made.logps is not None
        return self.made.logps

    def router_loss(self) -> torch.Tensor | None:
        """The load-balancing loss of the last forward, times its coefficient."""
        return self.made.router

    def sum_over_workers(self, values: np.ndarray) -> np.ndarray:
        """float64 values summed over the workers."""
        tensor = torch.from_numpy(values).to(self.device)
        dist.all_reduce(tensor)
        return tensor.cpu().numpy()

    def barrier(self) -> None:
        """Wait for all workers."""
        dist.barrier()

    def state(self) -> State:
        """The ranges of weights and moments that this rank holds; what takes no gradients is in the model's files."""
        step = self._steps_done()
        tensors = {STEP: torch.tensor(step)}
        for name in self.trained:
            for key in (WEIGHT, *(MOMENTS if step else ())):
                start, values = self._held(name, key)
                if values.numel():
                    tensors[range_key(name, key, start, values)] = values.detach().cpu().contiguous()
        return {part_name(self.rank): tensors}

    def load_state(self, state: State) -> None:
        """The inverse of `state`: each rank reads the ranges that it holds from the files of all.

        Raises:
            StudentError: the tensors are not those of this model, or another engine wrote them.
        """
        ranges = Ranges(state, self.trained)
        if ranges.step:
            self._prepare_moments(ranges.step)
        with torch.no_grad():
            for name in self.trained:
                for key in (WEIGHT, *(MOMENTS if ranges.step else ())):
                    start, values = self._held(name, key)
                    if values.numel():
                        self._hold(name, key, ranges.read(name, key, start, start + values.numel()))

    @contextlib.contextmanager
    def whole_model(self) -> Iterator[Any]:
        """A copy to write with: as much memory on each rank as the whole model takes in the student's number format."""
        copy = StreamedModel(self.source).model
        with torch.no_grad():
            weights = {name: self._whole(name).to(self.device, self.dtype) for name in self.shapes}
            copy.load_state_dict(weights, strict=False, assign=True)
            copy.tie_weights()
            copy.to(self.device)  # buffers
            yield copy.eval()

    def export(self, folder: Path) -> None:
        """Write a complete Hugging Face model in float32: rank 0 holds one parameter at a time."""
        aliases = {name for name, _ in self.model.named_parameters(remove_duplicate=False)}
        buffers = {name: value for name, value in self.model.state_dict().items() if name not in aliases}
        kinds = {name: Kind("F32", tuple(shape)) for name, shape in self.shapes.items()}
        kinds |= {name: Kind(name_of_dtype(value.dtype), tuple(value.shape)) for name, value in buffers.items()}

        def tensor_of(name: str) -> torch.Tensor:
            return buffers[name].cpu() if name in buffers else self._whole(name)

        with torch.no_grad():
            self.streamed.write(folder, tensor_of, kinds, self.rank)
        if self.rank == 0:
            self.tokenizer.save_pretrained(folder)


def layers_of(model: nn.Module) -> Iterator[nn.Module]:
    """The model's layers, of text and of other media, none inside another."""
    for child in model.children():
        if isinstance(child, GradientCheckpointingLayer):
            yield child
        else:
            yield from layers_of(child)
