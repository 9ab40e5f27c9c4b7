"""What a forward pass keeps for its backward pass, found by running it on tensors without values.

The student's own code runs, on shapes alone (torch's FakeTensorMode), so that fused projections, grouped attention,
autocast's copies and experts are counted as they are. Two layers are run and the second one stands for the others.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from rayfuse.errors import PlanError
from rayfuse.models.output_layer import text_decoder
from rayfuse.models.text_config import text_config
from rayfuse.plan.shapes import Shape


@dataclass(frozen=True)
class Activations:
    """Bytes of one micro-step on one rank.

    Attributes:
        outside: kept by embedding and last norm.
        layer: kept by one layer where its activations are not recomputed.
        inputs: a layer's input, all that is kept of it where they are.
        largest: the largest tensor that a layer keeps: its gradient is as large.
        casts: of `layer`, the weights' copies in the pass's number format, which autocast makes.
    """

    outside: int
    layer: int
    inputs: int
    largest: int
    casts: int = 0

    def kept(self, layers: int, *, checkpointing: bool) -> int:
        """At the end of the forward pass."""
        return self.outside + layers * (self.inputs if checkpointing else self.layer)

    def work(self, *, checkpointing: bool) -> int:
        """On top of it, while the backward pass is in a layer: gradients, and what is computed again."""
        return 3 * self.largest + (self.layer if checkpointing else 0)


def activations(shape: Shape, batch: int, length: int, dtype: str, *, autocast: bool) -> Activations:
    """What a micro-step of `batch` x `length` tokens keeps.

    Args:
        shape: the model.
        batch: sequences.
        length: tokens of each, padding included.
        dtype: number format of the pass, "float32" or "bfloat16".
        autocast: the weights are float32 and are cast as they are used; otherwise they have that format.

    Raises:
        PlanError: the architecture's forward depends on values, so that it cannot be run on shapes.
    """
    key = (shape.name, shape.origin, shape.parameters, batch, length, dtype, autocast)
    if key not in _counted:
        _counted[key] = _count(shape, batch, length, dtype, autocast)
    return _counted[key]


_counted: dict[tuple[object, ...], Activations] = {}


def _count(shape: Shape, batch: int, length: int, dtype: str, autocast: bool) -> Activations:
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    precision = getattr(torch, dtype)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = _two_layers(shape, torch.float32 if autocast else precision)
        decoder = text_decoder(model).train()
        watch = _Kept(list(model.parameters()))
        for layer in getattr(decoder, "layers", None) or decoder.h:
            layer.register_forward_pre_hook(lambda *_: watch.mark())
            layer.register_forward_hook(lambda *_: watch.mark())
        ids = torch.zeros(batch, length, dtype=torch.long)
        try:
            with (
                torch.autograd.graph.saved_tensors_hooks(watch.pack, lambda tensor: tensor),
                torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast and dtype == "bfloat16"),
            ):
                out = decoder(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).last_hidden_state
        except Exception as error:  # what cannot be run on shapes says so in many ways
            raise PlanError(
                f"the activations of {shape.name} ({shape.config.model_type}) cannot be counted without its weights: "
                f"{type(error).__name__}: {error}"
            ) from error
        before, first, between, second = watch.marks[:4]
        layer = second - between
        element = out.element_size()
        return Activations(
            outside=before + (first - before - layer) + watch.total - second,
            layer=layer,
            inputs=batch * length * shape.hidden * element,
            largest=watch.largest,
            casts=watch.casts // 2,
        )


def _two_layers(shape: Shape, precision: Any) -> Any:
    """The model with its first two layers only, its weights in this number format."""
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(text_config(shape.config))
    config.num_hidden_layers = 2
    for key in ("layer_types", "mlp_layer_types", "layers_block_type"):
        if getattr(config, key, None):
            setattr(config, key, getattr(config, key)[:2])
    try:
        return AutoModelForCausalLM.from_config(config, dtype=precision)
    except Exception as error:  # as above
        raise PlanError(
            f"the architecture of {shape.name} cannot be built with two layers: {type(error).__name__}: {error}"
        ) from error


class _Kept:
    """Bytes of the storages that autograd keeps, parameters left out, each counted once."""

    def __init__(self, parameters: list[Any]) -> None:
        self.parameters = {p.untyped_storage()._cdata for p in parameters}
        self.shapes = {frozenset(p.shape) for p in parameters if p.dim() == 2}
        self.seen: dict[int, Any] = {}  # the storages themselves, so that no number is used again
        self.total = self.largest = self.casts = 0
        self.marks: list[int] = []

    def pack(self, tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.parameters and storage._cdata not in self.seen:
            self.seen[storage._cdata] = storage
            self.total += storage.nbytes()
            self.largest = max(self.largest, storage.nbytes())
            if tensor.dim() == 2 and frozenset(tensor.shape) in self.shapes:
                self.casts += storage.nbytes()
        return tensor

    def mark(self) -> None:
        self.marks.append(self.total)
