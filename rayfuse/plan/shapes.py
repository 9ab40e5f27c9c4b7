"""What memory and time of a model depend on, from its configuration: no weights, no hub where that is not needed."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from rayfuse.config import Model, Teacher
from rayfuse.errors import ModelError, PlanError
from rayfuse.models.loading import empty_model, load_model_config
from rayfuse.models.output_layer import text_decoder
from rayfuse.models.quantised import quantisation
from rayfuse.models.shards import Shards
from rayfuse.models.text_config import context_length, text_config

KNOWN: dict[str, dict[str, Any]] = {
    "microsoft/phi-4": {
        "model_type": "phi3",
        "hidden_size": 5120,
        "intermediate_size": 17920,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "num_key_value_heads": 10,
        "vocab_size": 100352,
        "max_position_embeddings": 16384,
        "tie_word_embeddings": False,
        "pad_token_id": 100349,
    },
    "Qwen/Qwen2.5-14B-Instruct": {
        "model_type": "qwen2",
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 48,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "vocab_size": 152064,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": False,
    },
    "mistralai/Mistral-Small-24B-Instruct-2501": {
        "model_type": "mistral",
        "hidden_size": 5120,
        "intermediate_size": 32768,
        "num_hidden_layers": 40,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 131072,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": False,
    },
}
"""Sizes of models, as their published config.json has them."""
SAME_SHAPE = {
    "Qwen/Qwen2.5-14B": "Qwen/Qwen2.5-14B-Instruct",
    "Qwen/Qwen2.5-Coder-14B": "Qwen/Qwen2.5-14B-Instruct",
    "Qwen/Qwen2.5-Coder-14B-Instruct": "Qwen/Qwen2.5-14B-Instruct",
    "mistralai/Mistral-Small-24B-Base-2501": "mistralai/Mistral-Small-24B-Instruct-2501",
}
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
"""Keys of a configuration that count the experts of a layer."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a model, in parameters unless said otherwise.

    Attributes:
        name: the model, as the configuration names it.
        origin: where the sizes come from, in words.
        config: the transformers configuration.
        parameters: all of them, a tied one once.
        trained: those that a student trains: of the text model.
        active: what multiplies each token in the layers: without embeddings and output layer, of experts only those
            that a token visits.
        head: of the output layer, V x H.
        layers: how many.
        layer: of the largest layer, which a sharded engine gathers as a whole.
        hidden: H.
        attention: width of the queries of a layer.
        widest: width of the widest product inside a layer.
        cache: elements of keys and values per token, all layers.
        context: longest sequence in tokens, where the configuration tells.
        stored: bytes of the weights as stored; None where the files are not here.
    """

    name: str
    origin: str
    config: Any
    parameters: int
    trained: int
    active: int
    head: int
    layers: int
    layer: int
    hidden: int
    attention: int
    widest: int
    cache: int
    context: int | None
    stored: int | None

    @property
    def vocabulary(self) -> int:
        """Rows of the output layer."""
        return self.head // self.hidden

    def layer_flops(self, length: float) -> float:
        """Per token, forward, of all layers: two per weight, and attention to half of `length` tokens."""
        return 2.0 * self.active + 2.0 * self.layers * self.attention * length

    @property
    def head_flops(self) -> float:
        """Per token, forward, of the output layer."""
        return 2.0 * self.head


def read_shape(model: Model) -> Shape:
    """The sizes of a model: as `shape` says, from its folder, as published (KNOWN), or by the hub's config.json.

    Raises:
        PlanError: none of these can be read.
    """
    key = model.model_dump_json(include={"model", "revision", "shape", "gguf_file", "trust_remote_code"})
    return _read(key, model)


@lru_cache(maxsize=32)
def _read(key: str, model: Model) -> Shape:
    where = f"teacher {model.name}" if isinstance(model, Teacher) else "the student"
    try:
        config, origin = _configuration(model)
        return measure_shape(config, model.model, origin, _stored(model, config))
    except ModelError as error:
        raise PlanError(
            f"{where} ({model.model}) cannot be planned: {error}. Where it cannot be reached give its sizes: `shape: "
            "CONFIG.JSON`, or `shape: {model_type: ..., hidden_size: ..., num_hidden_layers: ...}` as that file has "
            f"them (known without: {', '.join([*KNOWN, *SAME_SHAPE])})"
        ) from error


def _configuration(model: Model) -> tuple[Any, str]:
    """The model's transformers configuration, and where it comes from."""
    if model.shape is not None:
        if isinstance(model.shape, str):
            return _from_file(model.shape), f"shape: {model.shape}"
        return from_sizes(model.shape), "shape in the configuration"
    known = SAME_SHAPE.get(model.model, model.model)
    if known in KNOWN and not Path(model.model).is_dir():
        return from_sizes(KNOWN[known]), "published sizes"
    here = Path(model.model).is_dir()
    return load_model_config(model), "config.json of its folder" if here else "config.json of the hub"


def _from_file(path: str) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(path)
    except Exception as error:  # transformers raises many kinds
        raise ModelError(f"cannot read the shape {path}: {type(error).__name__}: {error}") from error


def from_sizes(sizes: Mapping[str, Any]) -> Any:
    """A transformers configuration of keys and values as in a config.json, `model_type` among them.

    Raises:
        ModelError: transformers does not know this model_type, or refuses a value.
    """
    from transformers import CONFIG_MAPPING

    kind = str(sizes.get("model_type"))
    if kind not in CONFIG_MAPPING:
        raise ModelError(f"shape has model_type {kind!r}, which transformers does not know")
    values = {key: value for key, value in sizes.items() if key != "model_type"}
    try:
        return CONFIG_MAPPING[kind](**values)
    except Exception as error:  # dataclass-like configurations raise their own kinds
        raise ModelError(f"shape {dict(sizes)} is refused: {type(error).__name__}: {error}") from error


def measure_shape(config: Any, name: str, origin: str, stored: int | None = None) -> Shape:
    """The sizes of a transformers configuration, counted on its model on the meta device.

    Raises:
        ModelError: there is no causal language model of it, or not one made of layers.
    """
    empty = empty_model(config, name)
    decoder, text = text_decoder(empty), text_config(config)
    layers = getattr(decoder, "layers", None) or getattr(decoder, "h", None)
    if layers is None or not len(layers):
        raise ModelError(f"{type(decoder).__name__} has no list of layers to count")
    output = empty.get_output_embeddings().weight
    unique = {id(p): p.numel() for p in empty.parameters()}
    learnt = {id(p): p.numel() for p in [*decoder.parameters(), output]} if text is not config else unique
    heads = text.num_attention_heads
    head_size = getattr(text, "head_dim", None) or text.hidden_size // heads
    groups = getattr(text, "num_key_value_heads", None) or heads
    matrices = [p for layer in layers for p in layer.parameters() if p.dim() >= 2]
    return Shape(
        name=name,
        origin=origin,
        config=config,
        parameters=sum(unique.values()),
        trained=sum(learnt.values()),
        active=round(sum(_active(part, p.numel(), text) for layer in layers for part, p in layer.named_parameters())),
        head=output.numel(),
        layers=len(layers),
        layer=max(sum(p.numel() for p in layer.parameters()) for layer in layers),
        hidden=int(output.shape[1]),
        attention=heads * head_size,
        widest=max(int(p.shape[-2]) for p in matrices),
        cache=2 * len(layers) * groups * head_size,
        context=context_length(config),
        stored=stored,
    )


def _active(name: str, count: int, text: Any) -> float:
    """Of a layer's parameters those that a token meets."""
    experts = next((getattr(text, key) for key in EXPERTS if getattr(text, key, None)), None)
    if experts is None or not re.search(r"(^|\.)experts\.", name):
        return count
    return count * getattr(text, "num_experts_per_tok", experts) / experts


def _stored(model: Model, config: Any) -> int | None:
    """Bytes of the weights by the headers of the files; None where they are not here, or in another format."""
    folder = Path(model.model)
    if model.shape is not None or model.gguf_file or not folder.is_dir():
        return None
    try:
        return sum(kind.size for kind in Shards.open(folder).kinds.values())
    except ModelError:
        if quantisation(config) is not None:
            raise
        return None  # only config.json is here: enough to plan


def weight_bytes(shape: Shape, element: int) -> int:
    """Bytes of the weights in a number format of `element` bytes; as stored where they are quantised."""
    if quantisation(shape.config) is not None and shape.stored is not None:
        return shape.stored
    return shape.parameters * element


def short_count(number: float) -> str:
    """A count of parameters or tokens for people: 14.7B, 135M, 12.3k."""
    size = min(int(math.log10(max(number, 1))) // 3, 4)
    return f"{number / 10 ** (3 * size):.3g}{('', 'k', 'M', 'B', 'T')[size]}"
