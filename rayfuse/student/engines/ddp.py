"""The student's engine: forward to the fused head, backward, step. Plain PyTorch, data-parallel with DDP.

This is the one seam where another engine stands (`ENGINES`): what the training loop asks of it is the small set of
public methods below.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from rayfuse.batch import FusionBatch
from rayfuse.config import Stage, Student
from rayfuse.errors import StudentError
from rayfuse.losses import HeadOutput
from rayfuse.models.loading import load_causal_lm, load_tokenizer, vocabulary_size
from rayfuse.models.output_layer import check_output_layer, output_layer
from rayfuse.stages.tensors import on_device
from rayfuse.student.engines.head import HiddenToHead


class TorchEngine:
    """Float32 weights and AdamW; the forward and backward pass in the student's dtype.

    Args:
        student: dtype, gradient checkpointing.
        path: folder or id of the model that the stage starts from.
        stage: weight decay and clipping.
        device: where this worker computes.
    """

    def __init__(self, student: Student, path: str, stage: Stage, device: torch.device) -> None:
        self.device = device
        self.stage = stage
        self.world = dist.get_world_size() if dist.is_initialized() else 1
        source = student if path == student.model else student.model_copy(update={"model": path, "gguf_file": None})
        self.tokenizer = load_tokenizer(student)
        self.model = load_causal_lm(source, dtype="float32").to(device).train()
        if student.gradient_checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.export_dtype = getattr(torch, student.dtype)
        vocabulary = vocabulary_size(self.tokenizer)
        check_output_layer(self.model, output_layer(self.model, vocabulary))
        module = HiddenToHead(self.model, vocabulary, self.export_dtype)
        self.module: nn.Module = nn.parallel.DistributedDataParallel(module) if self.world > 1 else module
        self.named = dict(self.model.named_parameters())
        matrices = [p for p in self.named.values() if p.dim() >= 2]
        others = [p for p in self.named.values() if p.dim() < 2]
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": stage.weight_decay}, {"params": others, "weight_decay": 0.0}],
            lr=stage.learning_rate,
            betas=(0.9, 0.95),
            fused=True,
        )

    def forward(self, batch: FusionBatch, k: int | None, lse: bool = False) -> HeadOutput | torch.Tensor:
        """Of one micro-batch: cross-entropy and top k, or (k None) differentiable log-probabilities [N] of the labels.

        A preference loss weighs a response by how the whole pair scored, so it needs the second form. `lse`: the head's
        log-sum-exp is differentiable, for losses on probabilities.
        """
        fields = ("input_ids", "attention_mask", "positions", "labels", "picks")
        arrays = {name: getattr(batch, name) for name in fields if getattr(batch, name) is not None}
        tensors = {name: on_device(array, self.device) for name, array in arrays.items()}
        output: HeadOutput | torch.Tensor = self.module(tensors, k, lse)
        return output

    def backward(self, loss: torch.Tensor) -> None:
        """Add this micro-batch's gradients; call it inside `accumulate`."""
        # DDP averages over the workers, but the losses are shares of one sum.
        (loss * self.world).backward()  # type: ignore[no-untyped-call]

    def accumulate(self, *, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Around forward and backward of a micro-batch: the workers exchange gradients with the last of a step."""
        if isinstance(self.module, nn.parallel.DistributedDataParallel) and not last:
            return self.module.no_sync()
        return contextlib.nullcontext()

    def step(self, learning_rate: float) -> float:
        """Clip, update, clear the gradients.

        Returns:
            The gradient norm before clipping.

        Raises:
            StudentError: it is not finite.
        """
        norm = float(nn.utils.clip_grad_norm_(self.named.values(), self.stage.grad_clip))
        if not np.isfinite(norm):
            raise StudentError(
                f"the gradient norm is {norm}: lower learning_rate (now {learning_rate:.2g}), or use dtype float32"
            )
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def sum_over_workers(self, values: np.ndarray) -> np.ndarray:
        """float64 values summed over the workers."""
        if self.world == 1:
            return values
        tensor = torch.from_numpy(values).to(self.device)
        dist.all_reduce(tensor)
        return tensor.cpu().numpy()

    def barrier(self) -> None:
        """Wait for all workers."""
        if self.world > 1:
            dist.barrier()

    def state(self) -> dict[str, dict[str, torch.Tensor]]:
        """What a checkpoint holds, by file: the weights and the optimiser's moments."""
        moments = {}
        for name, parameter in self.named.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                moments[f"{name}/{key}"] = value.detach().cpu().contiguous()
        weights = {name: p.detach().cpu().contiguous() for name, p in self.named.items()}
        return {"weights": weights, "optimizer": moments}

    def load_state(self, state: dict[str, dict[str, torch.Tensor]]) -> None:
        """The inverse of `state`.

        Raises:
            StudentError: the tensors are not those of this model.
        """
        if set(state["weights"]) != set(self.named):
            odd = sorted(set(state["weights"]) ^ set(self.named))
            raise StudentError(f"the checkpoint is of another model: {len(odd)} tensors differ, for example {odd[:3]}")
        with torch.no_grad():
            for name, value in state["weights"].items():
                self.named[name].copy_(value)
        for entry, value in state["optimizer"].items():
            name, key = entry.rsplit("/", 1)
            self.optimizer.state[self.named[name]][key] = value.to(self.device)

    def export(self, folder: Path) -> None:
        """Write a complete Hugging Face model: safetensors, tokenizer, chat template, generation configuration."""
        weights, seen = {}, set()
        for name, value in self.model.state_dict().items():
            if value.data_ptr() not in seen:  # a tied weight is stored once, under its first name
                seen.add(value.data_ptr())
                dtype = self.export_dtype if value.is_floating_point() else value.dtype
                weights[name] = value.detach().to("cpu", dtype)
        config = self.model.config
        previous, config.dtype = config.dtype, self.export_dtype
        self.model.save_pretrained(folder, state_dict=weights, safe_serialization=True)
        config.dtype = previous
        self.tokenizer.save_pretrained(folder)
