"""Checkpoints whose weights are stored quantised: what can be loaded here, and what to do about the others."""

from __future__ import annotations

from typing import Any

from rayfuse.errors import ModelError
from rayfuse.models.text_config import text_config


def quantisation(config: Any) -> str | None:
    """The method by which a configuration's weights are quantised ("gptq", "fp8"); None: they are not."""
    found = _section(config)
    if found is None:
        return None
    if found.get("quant_method"):
        return str(found["quant_method"])
    return "bitsandbytes" if found.get("load_in_4bit") or found.get("load_in_8bit") else "an unnamed method"


def _section(config: Any) -> dict[str, Any] | None:
    for part in (config, text_config(config)):
        section = getattr(part, "quantization_config", None)
        if section is not None:
            return dict(section if isinstance(section, dict) else section.to_dict())
    return None


def refuse_quantised(name: str, config: Any, dtype: str, *, trained: bool) -> None:
    """Raises ModelError where the weights are quantised and cannot be used here.

    Args:
        name: the model's.
        config: its configuration.
        dtype: number format that it is to compute in.
        trained: whether it is to be trained; quantised weights never are.
    """
    method = quantisation(config)
    if method is None:
        return
    if trained:
        raise ModelError(
            f"the weights of {name} are quantised ({method}), and quantised weights cannot be trained. Name the "
            "repository with the unquantised weights, or save them dequantised (transformers: from_pretrained, "
            "dequantize, save_pretrained)"
        )
    fault = _environment_fault(config, dtype)
    if fault:
        raise ModelError(
            f"the weights of {name} are quantised ({method}), which transformers cannot run here: {fault}. Install "
            "what it asks for, use backend: vllm, whose engine runs quantised weights by itself, or name the "
            "repository with the unquantised weights"
        )


def _environment_fault(config: Any, dtype: str) -> str:
    """Why transformers cannot run these weights on this machine; empty where it can."""
    import torch
    from transformers.quantizers.auto import AutoHfQuantizer

    section = _section(config)
    assert section is not None
    try:
        quantizer = AutoHfQuantizer.from_config(section, pre_quantized=True)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        quantizer.validate_environment(dtype=getattr(torch, dtype), device_map={"": device}, weights_only=True)
    except Exception as error:  # packages, devices and versions each raise their own kind
        return f"{type(error).__name__}: {error}"
    return ""
