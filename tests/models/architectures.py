"""Tiny random models of architectures that do something of their own to their logits, or that read images as well."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

V = 99
SMALL = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "shared_expert_intermediate_size": 32,
    "sliding_window": 16,
    "rotary_dim": 4,
    "lru_width": 32,
    "attention_window_size": 8,
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 16,
    "mamba_d_ssm": 64,
    "num_heads": 4,
    "embedding_dim": 32,
    "num_blocks": 2,
    "d_model": 32,
    "n_heads": 4,
    "n_layers": 2,
    "global_head_dim": 8,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": V,
    "num_kv_shared_layers": 0,
    "laurel_rank": 4,
    "chunk_size": 8,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_layers": 1,
    "num_attention_heads": 2,
    "num_heads": 2,
    "attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
    "depth": 1,
    "embed_dim": 32,
    "out_hidden_size": 32,
    "num_global_layers": 1,
    "vision_output_dim": 32,
    "projector_input_dim": 32,
    "projector_output_dim": 32,
    "intermediate_layers_indices": [0],
}
FACTORS = {
    "logit_scale": 0.3,
    "lm_head_multiplier": 0.4,
    "output_multiplier": 0.35,
    "logits_scaling": 3.0,
    "logits_mup_width_multiplier": 2.5,
    "final_logit_softcapping": 1.5,
    "logits_soft_cap": 1.5,
    "output_logit_soft_cap": 1.5,
}
"""Values that no architecture has by default, so that a factor which is not read shows."""
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
HYBRID = {"layer_types": ["sliding_attention", "full_attention"]}
OVERRIDES: dict[str, dict[str, Any]] = {
    "gemma3n_text": {"num_hidden_layers": 10, "layer_types": None, "activation_sparsity_pattern": None},
    "gemma4_text": HYBRID,
    "gemma4_unified_text": HYBRID,
    "minicpm3": {"num_key_value_heads": 4, "head_dim": 16, "dim_model_base": 16},
    "cohere_compass_text": {**HYBRID, "rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE}},
    "qwen2_5_vl_text": {"rope_parameters": {**ROPE, "mrope_section": [1, 1, 2]}},
    "mllama_text_model": {"cross_attention_layers": [1]},
}


def known_keys(kind: type, table: dict[str, Any]) -> dict[str, Any]:
    """The entries of a table that a configuration class has."""
    keys = kind().to_dict()
    return {key: value for key, value in table.items() if key in keys}


def text_configuration(kind: type, **factors: float) -> Any:
    """A small configuration of a text model; `factors` are set where it has them."""
    overrides = OVERRIDES.get(kind.model_type, {})
    table = {**known_keys(kind, SMALL), **known_keys(kind, factors)}
    if "num_blocks" in table:  # xLSTM calls its layers so
        table.pop("num_hidden_layers", None)
    return kind(**{**table, **overrides})


def configuration(name: str, **factors: float) -> Any:
    """A small configuration of a model type, with a text of its own and towers where it has them."""
    kind = CONFIG_MAPPING[name]
    if "text_config" not in kind.sub_configs:
        return text_configuration(kind, **factors)
    base = kind()
    parts = {"text_config": text_configuration(type(base.text_config), **factors)}
    for key in kind.sub_configs:
        tower = getattr(base, key, None)
        if key.startswith(("vision", "audio")) and tower is not None:
            parts[key] = type(tower)(**known_keys(type(tower), VISION))
    return kind(**parts)


def make_model(config: Any) -> Any:
    """A random model in evaluation mode, with weights large enough for soft caps to show."""
    torch.manual_seed(0)
    auto = AutoModelForCausalLM if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING else AutoModelForMultimodalLM
    model = auto.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            torch.nn.init.normal_(parameter, std=0.3)
    return model
