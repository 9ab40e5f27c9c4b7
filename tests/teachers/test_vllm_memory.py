"""The engine's tokens per step, from memory and vocabulary; figures worked out by hand."""

import dataclasses

import pytest
from transformers import LlamaConfig

from rayfuse.errors import TeacherError
from rayfuse.teachers.vllm.memory import Shape, cpu_cache, cpu_tokens, engine_share, gpu_tokens, model_shape

GIB = 2**30
QWEN_14B = Shape(vocabulary=152_064, dtype="bfloat16", weights=29 * GIB, cache_per_token=196_608)


def test_the_shape_of_a_model():
    config = LlamaConfig(
        vocab_size=49_152, hidden_size=576, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3
    )
    shape = model_shape(config, "float32", 5)
    assert shape == Shape(49_152, "float32", 5, 2 * 30 * 3 * 64 * 4)
    assert shape.logits_per_token == 49_152 * 9


def test_logits_fit_beside_the_engine_on_a_gpu():
    """80 GiB, 15% left, 1 GiB of it reserved: 11 GiB for 152,064 logits of 2 + 4 + 1 bytes each."""
    tokens = gpu_tokens(QWEN_14B, 80 * GIB, 1.0, engine_share(1.0, None))
    assert tokens == int(0.15 * 80 * GIB - GIB) // (152_064 * 7) == 11_096
    assert engine_share(4.0, None) == engine_share(1.0, None) == pytest.approx(0.85)


def test_a_share_of_a_gpu_has_its_share_of_the_memory():
    share = engine_share(0.5, None)
    assert share == pytest.approx(0.425)
    tokens = gpu_tokens(QWEN_14B, 80 * GIB, 0.5, share)
    assert tokens == pytest.approx((0.075 * 80 * GIB - GIB) / (152_064 * 7), abs=1)


def test_an_engine_that_takes_all_is_refused_with_the_figures():
    with pytest.raises(TeacherError, match=r"0\.00 GiB are left .* lower vllm.gpu_memory_utilization, or set vllm"):
        gpu_tokens(QWEN_14B, 80 * GIB, 1.0, 0.995)


def test_a_cpu_keeps_a_quarter_of_what_weights_and_cache_leave():
    shape = Shape(vocabulary=50_000, dtype="float32", weights=2 * GIB, cache_per_token=2**16)
    assert cpu_cache(shape, 8192) == 2 * 8192 * 2**16 == GIB
    assert cpu_cache(shape, 16) == 2**26
    assert cpu_tokens(shape, 11 * GIB, 8192) == 2 * GIB // 450_000
    with pytest.raises(TeacherError, match=r"free some memory, or lower vllm.max_model_len"):
        cpu_tokens(dataclasses.replace(shape, weights=11 * GIB), 11 * GIB, 8192)
