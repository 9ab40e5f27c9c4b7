"""The engine in plain PyTorch, data-parallel with DDP: every rank holds the whole model, its gradients and moments."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from rayfuse.batch import FusionBatch
from rayfuse.config import Stage, Student
from rayfuse.errors import StudentError
from rayfuse.losses import HeadOutput
from rayfuse.models.folder import save_model
from rayfuse.models.loading import load_causal_lm, load_tokenizer, valid_vocabulary
from rayfuse.models.output_layer import check_output_layer, output_layer, output_rows
from rayfuse.stages.tensors import on_device
from rayfuse.student.checkpoint import State
from rayfuse.student.engines.base import Engine
from rayfuse.student.engines.head import Forward, HiddenToHead, router_coefficient


class DDPEngine(Engine):
    """Float32 weights and AdamW; the forward and backward pass in the student's dtype. See `Engine`."""

    def __init__(self, student: Student, path: str, stage: Stage, device: torch.device) -> None:
        self.device = device
        self.stage = stage
        self.world = dist.get_world_size() if dist.is_initialized() else 1
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        source = student if path == student.model else student.model_copy(update={"model": path, "gguf_file": None})
        self.tokenizer = load_tokenizer(student)
        self.model = load_causal_lm(source, dtype="float32").to(device)
        prepare_forward(self.model, dropout=not stage.uses_preferences, checkpointing=student.gradient_checkpointing)
        vocabulary = valid_vocabulary(self.tokenizer, output_rows(self.model))
        check_output_layer(self.model, output_layer(self.model, vocabulary))
        self.dtype = getattr(torch, student.dtype)
        router = router_coefficient(self.model, student.router_loss)
        module = HiddenToHead(self.model, vocabulary, self.dtype, router)
        self.module: nn.Module = nn.parallel.DistributedDataParallel(module) if self.world > 1 else module
        self.named = dict(self.model.named_parameters())
        self.optimizer = adamw(self.named.values(), stage)

    @staticmethod
    def backend(student: Student) -> str:
        """NCCL between GPUs, otherwise gloo."""
        return "nccl" if student.gpus else "gloo"

    def _forward(self, batch: FusionBatch, k: int | None, lse: bool) -> Forward:
        self.made: Forward = self.module(tensors_of(batch, self.device), k, lse)
        return self.made

    def score(self, batch: FusionBatch, k: int, *, lse: bool = False) -> HeadOutput:
        """Cross-entropy and top k of a micro-batch's N positions."""
        head = self._forward(batch, k, lse).head
        assert head is not None
        return head

    def log_probabilities(self, batch: FusionBatch) -> torch.Tensor:
        """Differentiable log-probabilities [N] of the labels."""
        logps = self._forward(batch, None, False).logps
        assert logps is not None
        return logps

    def router_loss(self) -> torch.Tensor | None:
        """The load-balancing loss of the last forward, times its coefficient."""
        return self.made.router

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
        update(self.optimizer, norm, learning_rate)
        return norm

    def take_gradient_norm(self) -> float:
        """The norm of the gradients of all workers' micro-batches, which are cleared; no weight changes."""
        norm = float(nn.utils.get_total_norm([p.grad for p in self.named.values() if p.grad is not None]))
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

    def state(self) -> State:
        """The weights and the optimiser's moments, on rank 0: all ranks hold the same."""
        if self.rank:
            return {}
        moments = {}
        for name, parameter in self.named.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                moments[f"{name}/{key}"] = value.detach().cpu().contiguous()
        weights = {name: p.detach().cpu().contiguous() for name, p in self.named.items()}
        return {"weights": weights, "optimizer": moments}

    def load_state(self, state: State) -> None:
        """The inverse of `state`.

        Raises:
            StudentError: the tensors are not those of this model.
        """
        weights = state["weights"]
        if set(weights) != set(self.named):
            odd = sorted(set(weights) ^ set(self.named))
            raise StudentError(f"the checkpoint is of another model: {len(odd)} tensors differ, for example {odd[:3]}")
        with torch.no_grad():
            for name, value in weights.items():
                self.named[name].copy_(value)
        for entry, value in state["optimizer"].items():
            name, key = entry.rsplit("/", 1)
            self.optimizer.state[self.named[name]][key] = value.to(self.device)

    @contextlib.contextmanager
    def whole_model(self) -> Iterator[Any]:
        """The model, to write with."""
        training = self.model.training
        self.model.eval()
        autocast = torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)
        try:
            with torch.no_grad(), autocast:
                yield self.model
        finally:
            self.model.train(training)

    def export(self, folder: Path) -> None:
        """Write a complete Hugging Face model in float32, on rank 0: all ranks hold the same."""
        if self.rank:
            return
        weights, seen = {}, set()
        for name, value in self.model.state_dict().items():
            if value.data_ptr() not in seen:  # a tied weight is stored once, under its first name
                seen.add(value.data_ptr())
                weights[name] = value.detach().cpu()
        save_model(self.model, weights, folder)
        self.tokenizer.save_pretrained(folder)


def tensors_of(batch: FusionBatch, device: torch.device) -> dict[str, torch.Tensor]:
    """What the forward reads of a batch, on the device."""
    fields = ("input_ids", "attention_mask", "positions", "labels", "picks", "row_weights")
    arrays = {name: getattr(batch, name) for name in fields if getattr(batch, name) is not None}
    return {name: on_device(array, device) for name, array in arrays.items()}


def adamw(parameters: Iterable[Any], stage: Stage, dim: Callable[[Any], int] = torch.Tensor.dim) -> torch.optim.AdamW:
    """The stage's optimiser; matrices decay, and vectors do not.

    Args:
        parameters: what it trains.
        stage: rates.
        dim: dimensions of a parameter, which an engine may have cut out of it.
    """
    every = list(parameters)
    groups = [
        {"params": [p for p in every if dim(p) >= 2], "weight_decay": stage.weight_decay},
        {"params": [p for p in every if dim(p) < 2], "weight_decay": 0.0},
    ]
    filled = [group for group in groups if group["params"]]
    return torch.optim.AdamW(filled, lr=stage.learning_rate, betas=stage.betas, fused=True)


def update(optimizer: torch.optim.Optimizer, norm: float, learning_rate: float) -> None:
    """One step at this rate with gradients whose norm before clipping was `norm`; they are cleared.

    Raises:
        StudentError: the norm is not finite.
    """
    if not np.isfinite(norm):
        raise StudentError(
            f"the gradient norm is {norm}: lower learning_rate (now {learning_rate:.2g}), or use dtype float32"
        )
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def prepare_forward(model: Any, *, dropout: bool, checkpointing: bool) -> None:
    """Set the model to train with its dropout or without, and with its layers' activations kept or recomputed.

    Without dropout is evaluation mode, in which transformers would keep all activations: the layers are then wrapped
    here. The recomputed layer is deterministic, so it needs no random state.
    """
    model.train(dropout)
    if not checkpointing:
        return
    model.gradient_checkpointing_enable({"use_reentrant": False})
    if not dropout:
        for layer in model.modules():
            if isinstance(layer, GradientCheckpointingLayer):
                layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
