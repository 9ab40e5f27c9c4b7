"""The engine of PyTorch's fully_shard (FSDP2): every rank holds its rows of each weight, gradient and moment.

Units: each decoder layer, the embedding where it is not tied to the output layer, and the rest, which holds the output
layer. A unit's weights are gathered around its forward and its backward. The rest is the root, which stays gathered
from forward to backward: the fused head reads the output layer's weight as if it were whole, and a tied weight is in
one unit with both of its uses.
"""

from __future__ import annotations

import contextlib
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from rayfuse.config import Stage, Student
from rayfuse.student.engines.ddp import adamw, update
from rayfuse.student.engines.head import Forward, forward_of
from rayfuse.student.engines.ranges import MOMENTS, WEIGHT
from rayfuse.student.engines.sharded import ShardedEngine, layers_of


class FSDP2Engine(ShardedEngine):
    """Float32 weights and AdamW, both sharded; the layers are gathered in the student's dtype. See `Engine`."""

    def __init__(self, student: Student, path: str, stage: Stage, device: torch.device) -> None:
        super().__init__(student, path, stage, device)
        offloaded = student.offload == "all"
        shard = partial(
            fully_shard,
            mesh=init_device_mesh(device.type, (self.world,)),
            offload_policy=CPUOffloadPolicy() if offloaded else OffloadPolicy(),
        )
        layers = MixedPrecisionPolicy(
            param_dtype=getattr(torch, student.dtype), reduce_dtype=torch.float32, cast_forward_inputs=False
        )
        for unit in layers_of(self.model):
            self.streamed.fill(unit, device)
            shard(unit, mp_policy=layers)
        # Embedding, last norm and output layer stay float32, as in DDP under autocast: so does the residual stream.
        root = MixedPrecisionPolicy(cast_forward_inputs=False)
        embedding = self.model.get_input_embeddings()
        if embedding.weight is not self.model.get_output_embeddings().weight:
            self.streamed.fill(embedding, device)
            shard(embedding, mp_policy=root)
        self.streamed.fill(self.model, device)
        shard(self.module, mp_policy=root, reshard_after_forward=False)
        self.module(None, None, False)  # checks the architecture
        self.module.reshard()  # type: ignore[operator]
        self.named: dict[str, Any] = dict(self.model.named_parameters())
        self.optimizer = adamw(self.named.values(), stage)

    def _call(self, batch: dict[str, torch.Tensor], k: int | None, lse: bool) -> Forward:
        return forward_of(self.module(batch, k, lse))

    def backward(self, loss: torch.Tensor) -> None:
        """Add this micro-batch's gradients to those that this rank holds."""
        # Gradients are averaged over the workers, but the losses are shares of one sum.
        (loss * self.world).backward()  # type: ignore[no-untyped-call]

    def accumulate(self, *, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Every micro-batch's gradients are shared out at once: kept whole, they would take the room of the model."""
        return contextlib.nullcontext()

    def step(self, learning_rate: float) -> float:
        """Clip, update, clear the gradients.

        Returns:
            The norm of the whole gradient before clipping.

        Raises:
            StudentError: it is not finite.
        """
        norm = _number(nn.utils.clip_grad_norm_(self.named.values(), self.stage.grad_clip))
        update(self.optimizer, norm, learning_rate)
        return norm

    def take_gradient_norm(self) -> float:
        """The norm of the gradients of all workers' micro-batches, which are cleared; no weight changes."""
        norm = _number(nn.utils.get_total_norm([p.grad for p in self.named.values() if p.grad is not None]))
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def _held(self, name: str, key: str) -> tuple[int, torch.Tensor]:
        parameter = self.named[name]
        tensor = parameter if key == WEIGHT else self.optimizer.state[parameter][key]
        rows = -(-parameter.shape[0] // self.world)  # as torch.chunk cuts
        first = min(self.rank * rows, parameter.shape[0])
        values = tensor.to_local().detach()
        assert len(values) == min(rows, parameter.shape[0] - first)
        return first * (parameter.numel() // parameter.shape[0]), values.view(-1)

    def _hold(self, name: str, key: str, values: torch.Tensor) -> None:
        self._held(name, key)[1].copy_(values)

    def _steps_done(self) -> int:
        return next((int(state["step"]) for state in self.optimizer.state.values()), 0)

    def _prepare_moments(self, step: int) -> None:
        for parameter in self.named.values():
            if parameter.requires_grad:
                count = torch.tensor(float(step), device=parameter.to_local().device)
                moments = {key: torch.zeros_like(parameter) for key in MOMENTS}
                self.optimizer.state[parameter] = {"step": count, **moments}

    def _whole(self, name: str) -> torch.Tensor:
        whole: torch.Tensor = self.named[name].detach().to(self.device).full_tensor()
        return whole.cpu()


def _number(norm: torch.Tensor) -> float:
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
