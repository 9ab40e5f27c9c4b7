"""The engine of DeepSpeed: ZeRO 1, 2 or 3, with the optimiser and the weights in the host's memory where asked for.

ZeRO shares out, over the ranks, AdamW's moments and the float32 weights (1), the gradients too (2), and the weights
that the forward computes with (3). In bfloat16 the float32 weights are masters beside those of the forward.

ZeRO-3 gathers a module's parameters around its forward. The fused head reads the output layer's weight without calling
that layer, so the weight is registered with the module that holds model and head: it is gathered around that module's
forward and backward, and a tied one is not let go by the embedding in between.
"""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from typing import Any

import numpy as np
import torch

from rayfuse.config import Stage, Student
from rayfuse.errors import StudentError
from rayfuse.student.checkpoint import State
from rayfuse.student.engines.ddp import adamw
from rayfuse.student.engines.head import Forward, forward_of
from rayfuse.student.engines.ranges import MOMENTS, WEIGHT
from rayfuse.student.engines.sharded import ShardedEngine, layers_of

INSTALL = "DeepSpeed is not installed (pip install 'rayfuse[deepspeed]'); or use student.engine: fsdp2 or ddp"


class DeepSpeedEngine(ShardedEngine):
    """Float32 weights and AdamW, sharded by ZeRO; the forward in the student's dtype. See `Engine`."""

    def __init__(self, student: Student, path: str, stage: Stage, device: torch.device) -> None:
        deepspeed = _import_deepspeed(student)
        super().__init__(student, path, stage, device)
        self.zero = student.zero_stage or 3
        self.dtype = getattr(torch, student.dtype)
        layers = [sum(p.numel() for p in layer.parameters()) for layer in layers_of(self.model)]
        settings = _settings(
            student, stage, self.zero, max(layers, default=sum(p.numel() for p in self.model.parameters()))
        )
        deepspeed.init_distributed(dist_backend=self.backend(student), auto_mpi_discovery=False, verbose=False)
        kept = {} if self.streamed.streams else {n: p.detach().clone() for n, p in self.model.named_parameters()}
        for unit in (*layers_of(self.model), self.model):
            self.streamed.fill(unit, device if self.zero == 3 else torch.device("cpu"))
            for parameter in unit.parameters():
                if not hasattr(parameter, "ds_id"):
                    parameter.data = parameter.data.to(self.dtype)
            if self.zero == 3:
                deepspeed.zero.Init(module=unit, config_dict_or_path=settings, dtype=self.dtype)
        if self.zero == 3:
            for parameter in self.model.get_output_embeddings().parameters():
                deepspeed.zero.register_external_parameter(self.module, parameter)
        buffers = {name: value.clone() for name, value in self.model.named_buffers()}
        self.named: dict[str, Any] = dict(self.model.named_parameters())
        trained = [p for p in self.named.values() if p.requires_grad]
        self.optimizer = adamw(trained, stage, dim=lambda p: len(getattr(p, "ds_shape", p.shape)))
        self.engine, *_ = deepspeed.initialize(model=self.module, optimizer=self.optimizer, config=settings)
        for name, value in buffers.items():  # bfloat16 was given to them too: to the frequencies of rotary embeddings
            self.model.get_buffer(name).data = value.to(device)
        if self.dtype != torch.float32:
            self._masters_from_files(kept)
        self.engine(None, None, False)  # checks the architecture

    def _masters_from_files(self, kept: dict[str, torch.Tensor]) -> None:
        """Set the float32 masters, which DeepSpeed made from rounded weights."""
        for name, parameter in self.named.items():
            if parameter.requires_grad:
                whole = kept[name] if kept else self.streamed.tensor(name)
                start, values = self._held(name, WEIGHT)
                self._hold(name, WEIGHT, whole.flatten()[start : start + values.numel()].float())

    def _call(self, batch: dict[str, torch.Tensor], k: int | None, lse: bool) -> Forward:
        return forward_of(self.engine(batch, k, lse))

    def backward(self, loss: torch.Tensor) -> None:
        """Add this micro-batch's gradients; call it inside `accumulate`."""
        # Gradients are averaged over the workers, but the losses are shares of one sum.
        self.engine.backward(loss * self.world, scale_wrt_gas=False)

    def accumulate(self, *, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Around forward and backward of a micro-batch: DeepSpeed finishes the gradients in the step's last one."""
        self.engine.set_gradient_accumulation_boundary(last)
        return contextlib.nullcontext()

    def step(self, learning_rate: float) -> float:
        """Clip, update, clear the gradients.

        Returns:
            The norm of the whole gradient before clipping.

        Raises:
            StudentError: it is not finite.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.engine.step()
        norm = float(self.engine.get_global_grad_norm()) if self.engine.was_step_applied() else float("inf")
        if not np.isfinite(norm):
            raise StudentError(
                f"the gradient norm is {norm}: lower learning_rate (now {learning_rate:.2g}), or use dtype float32"
            )
        return norm

    def take_gradient_norm(self) -> float:
        """The norm of the gradients of all workers' micro-batches, which are cleared; no weight changes."""
        from deepspeed.utils import safe_get_full_grad

        squares = 0.0
        for parameter in self.named.values():
            if parameter.requires_grad:
                squares += float(safe_get_full_grad(parameter).float().square().sum())
        self._clear_gradients()
        return float(np.sqrt(squares))

    def _clear_gradients(self) -> None:
        """Forget the gradients of this step without a step."""
        zero = self.engine.optimizer
        zero.zero_grad()
        if self.zero != 3:
            zero.micro_step_id = -1  # the next backward overwrites
            zero.averaged_gradients = {}

    def _held(self, name: str, key: str) -> tuple[int, torch.Tensor]:
        from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state

        parameter = self.named[name]
        if self.zero != 3:
            mapping = parameter._hp_mapping
            if mapping is None:  # all of it is another rank's
                return 0, torch.empty(0)
            # Not the mapping's own view of the moments: of all groups but the first, DeepSpeed links it too early.
            flat = self._flat_masters()[mapping.param_group_index]
            values = flat.detach() if key == WEIGHT else self.optimizer.state[flat][key]
            held = mapping.get_hp_fragment_address()
            return mapping.lp_fragment_address.start, values.narrow(0, held.start, held.numel)
        local = (
            safe_get_local_fp32_param(parameter) if key == WEIGHT else safe_get_local_optimizer_state(parameter, key)
        )
        start = min(self.rank * local.numel(), parameter.ds_numel)
        return start, local[: parameter.ds_numel - start]  # the last rank's part is padded

    def _hold(self, name: str, key: str, values: torch.Tensor) -> None:
        from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

        parameter = self.named[name]
        if self.zero != 3:
            self._held(name, key)[1].copy_(values)
            return
        whole = torch.zeros(parameter.ds_tensor.numel())
        whole[: values.numel()] = values
        if key == WEIGHT:
            safe_set_local_fp32_param(parameter, whole)
            parameter.ds_tensor.data.copy_(whole)  # the part of the forward's weights
        else:
            safe_set_local_optimizer_state(parameter, whole, key)

    def _steps_done(self) -> int:
        return next((int(state["step"]) for state in self.optimizer.state.values() if "step" in state), 0)

    def _prepare_moments(self, step: int) -> None:
        for flat in self._flat_masters():
            moments = {key: torch.zeros_like(flat, requires_grad=False) for key in MOMENTS}
            self.optimizer.state[flat] = {"step": torch.tensor(float(step), device=flat.device), **moments}

    def _flat_masters(self) -> list[torch.Tensor]:
        """This rank's float32 weights, one tensor for each group of parameters."""
        names = ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition")
        flats: list[torch.Tensor] = next(
            value for name in names if (value := getattr(self.engine.optimizer, name, None))
        )
        return flats

    def load_state(self, state: State) -> None:
        """See `ShardedEngine`; the forward's weights follow from those that are held."""
        super().load_state(state)
        zero = self.engine.optimizer
        if self.zero != 3:
            zero.update_lp_params()
        elif zero.persistent_parameters:  # small ones, which stay gathered
            zero.persistent_parameters[0].partition(zero.persistent_parameters)
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)

    def _whole(self, name: str) -> torch.Tensor:
        from deepspeed.utils import safe_get_full_fp32_param

        parameter = self.named[name]
        if parameter.requires_grad:
            whole: torch.Tensor = safe_get_full_fp32_param(parameter)
            return whole.detach().cpu()
        return self.streamed.tensor(name)  # as it was read, and not as it is rounded


def _settings(student: Student, stage: Stage, zero: int, layer: int) -> dict[str, Any]:
    """DeepSpeed's own configuration for a model whose largest layer has `layer` parameters.

    Its defaults are numbers of elements for models of any size, below which nothing is let go, and a bucket takes 2 GB.
    """
    host = {"device": "cpu", "pin_memory": bool(student.gpus)}
    sharding: dict[str, Any] = {"stage": zero, "contiguous_gradients": True, "overlap_comm": bool(student.gpus)}
    sharding |= {"reduce_bucket_size": layer, "allgather_bucket_size": layer}
    if zero == 3:  # the layer in work, and the next one on its way
        sharding |= {"stage3_max_live_parameters": 2 * layer, "stage3_prefetch_bucket_size": layer}
        sharding |= {"stage3_max_reuse_distance": layer, "stage3_param_persistence_threshold": min(10**5, layer // 100)}
    if student.offload != "none":
        sharding["offload_optimizer"] = host
    if student.offload == "all":
        sharding["offload_param"] = host
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,  # the boundary of a step is told
        "gradient_clipping": stage.grad_clip,
        "zero_optimization": sharding,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's needs no compiler
        "bf16": {"enabled": student.dtype == "bfloat16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "steps_per_print": 2**62,
    }


def _import_deepspeed(student: Student) -> Any:
    """The package, made ready for the student's device.

    Raises:
        StudentError: it is not installed.
    """
    os.environ.setdefault("LOCAL_RANK", "0")
    if not student.gpus:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        import deepspeed
    except ImportError as error:
        raise StudentError(f"student.engine is deepspeed: {INSTALL}") from error
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed calls what torch has renamed, and torch says so at every call.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    if not student.gpus:  # its sums through shared memory would be compiled on the first use; gloo's need no compiler
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
