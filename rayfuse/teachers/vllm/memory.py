"""How many tokens a vLLM engine may take at a time, computed from memory and vocabulary.

For prompt log-probabilities the engine makes the logits of all tokens of a step at once, and vLLM does not count that
buffer when it divides the memory: it must fit into what the engine leaves free. Pure arithmetic; bytes throughout.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rayfuse.errors import TeacherError
from rayfuse.models.text_config import text_config

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
GPU_RESERVE = 2**30
"""Of what the engine leaves free: CUDA's own context, and the activations of other processes."""
CPU_SHARE = 0.25
"""Of what is free after weights and cache: a CPU's memory is shared with the student and other teachers."""
ENGINE_SHARE = 0.85
"""Of a GPU (or of the share of it that a replica reserves), for weights, activations and cache."""
FEWEST_TOKENS = 64


@dataclass(frozen=True)
class Shape:
    """What memory depends on.

    Attributes:
        vocabulary: rows of the output layer, padding included.
        dtype: number format of weights and cache.
        weights: bytes of the weights as the engine holds them.
        cache_per_token: bytes of keys and values of one token, all layers.
    """

    vocabulary: int
    dtype: str
    weights: int
    cache_per_token: int

    @property
    def logits_per_token(self) -> int:
        """Logits in the model's format, their log-softmax in float32, and a byte for counting ranks."""
        return self.vocabulary * (DTYPE_BYTES[self.dtype] + 4 + 1)


def model_shape(config: Any, dtype: str, weights: int) -> Shape:
    """The shape of a transformers configuration; `weights` as in Shape."""
    config = text_config(config)
    heads = config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    cache = 2 * config.num_hidden_layers * groups * head_size * DTYPE_BYTES[dtype]
    return Shape(config.vocab_size, dtype, weights, cache)


def engine_share(gpus: float, asked: float | None) -> float:
    """Share of each GPU's memory that the engine takes: what the configuration asks for, or ENGINE_SHARE of `gpus`.

    Where several replicas share a GPU each has only its own share of it.
    """
    return asked if asked is not None else ENGINE_SHARE * min(gpus, 1.0)


def gpu_tokens(shape: Shape, total: int, gpus: float, share: float) -> int:
    """Tokens of a step whose logits fit beside the engine on a GPU of `total` bytes.

    Raises:
        TeacherError: fewer than FEWEST_TOKENS fit.
    """
    room = int((min(gpus, 1.0) - share) * total) - GPU_RESERVE
    return _at_least(room // shape.logits_per_token, room, shape, "lower vllm.gpu_memory_utilization")


def cpu_tokens(shape: Shape, free: int, context: int) -> int:
    """Tokens of a step whose logits fit into a CPU's free memory besides weights and cache.

    Raises:
        TeacherError: fewer than FEWEST_TOKENS fit.
    """
    room = int(CPU_SHARE * (free - shape.weights - cpu_cache(shape, context)))
    return _at_least(room // shape.logits_per_token, room, shape, "free some memory, or lower vllm.max_model_len")


def cpu_cache(shape: Shape, context: int) -> int:
    """Bytes for keys and values on a CPU: two sequences of full length, at least 64 MiB.

    Scoring needs no more: a sequence leaves the cache when its prompt is done.
    """
    return max(2 * context * shape.cache_per_token, 2**26)


def _at_least(tokens: int, room: int, shape: Shape, advice: str) -> int:
    if tokens < FEWEST_TOKENS:
        raise TeacherError(
            f"{max(0, room) / 2**30:.2f} GiB are left for the logits of a prompt: {max(0, tokens)} tokens of "
            f"{shape.logits_per_token / 2**20:.2f} MiB, but {FEWEST_TOKENS} are needed; {advice}, or set "
            "vllm.batched_tokens"
        )
    return tokens
