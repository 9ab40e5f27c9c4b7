"""The output layer of every architecture that scales or caps its logits, against the model's own logits."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch
from transformers import BertConfig, BertLMHeadModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

from rayfuse.errors import ModelError
from rayfuse.losses import teacher_topk
from rayfuse.models.output_layer import (
    EXCEPTIONS,
    SCALES,
    SOFTCAPS,
    check_architecture,
    check_output_layer,
    output_layer,
    text_decoder,
)
from rayfuse.models.text_config import text_config
from tests.models.architectures import FACTORS, configuration, make_model

TEXT = [
    "beam",
    "cohere",
    "cohere2",
    "cohere2_moe",
    "cohere_compass_text",
    "falcon_h1",
    "gemma2",
    "gemma3_text",
    "gemma3n_text",
    "gemma4_text",
    "gemma4_unified_text",
    "granite",
    "granite_swa",
    "granitemoe",
    "granitemoe_swa",
    "granitemoehybrid",
    "granitemoeshared",
    "hyperclovax",
    "inkling2_loop_text",
    "inkling2_text",
    "inkling_text",
    "minicpm3",
    "mpt",
    "nanochat",
    "recurrent_gemma",
    "vaultgemma",
    "xlstm",
]
INSIDE = [
    "aya_vision",
    "cohere2_vision",
    "gemma3",
    "gemma4",
    "gemma4_unified",
    "granite_docling",
    "hyperclovax_vision_v2",
    "muse_glimmer",
]
NOT_BUILT = {
    "cohere_compass": "an encoder of its own inside",
    "gemma3n": "its vision tower needs timm",
    "granite4_vision": "its text is granite",
    "granite_speech": "its text is granite",
    "granite_speech_plus": "its text is granite",
    "inkling2": "its text is inkling2_text",
    "inkling2_loop": "its text is inkling2_loop_text",
    "inkling_mm_model": "its text is inkling_text",
    "mistral_large4": "its latent attention has no small form",
    "muse_spark": "as muse_glimmer",
    "paligemma": "its text is gemma",
    "perception_lm": "its vision tower needs timm",
    "shieldgemma2": "as gemma3",
    "diffusion_gemma": "no causal model",
    "t5gemma": "an encoder and a decoder",
    "t5gemma2": "an encoder and a decoder",
}
"""Architectures with such a key of which no tiny model is made here, and why."""


def _here(names: list[str]) -> list[str]:
    """Those that the installed transformers has."""
    return [name for name in names if name in CONFIG_MAPPING]


@pytest.mark.parametrize("name", _here([*TEXT, *INSIDE]))
def test_fused_logits_are_the_models_own(name):
    model = make_model(configuration(name, **FACTORS))
    check_architecture(model)
    layer = output_layer(model, 99)
    check_output_layer(model, layer)
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        hidden = text_decoder(model)(input_ids=ids, use_cache=False).last_hidden_state[0]
        expected = model(input_ids=ids, use_cache=False).logits[0, :, :99].float()
        top = teacher_topk(hidden, layer.weight, ids[0], 5, **layer.options())
    best = expected.log_softmax(-1).topk(5)
    torch.testing.assert_close(top.logps, best.values, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(top.lse, expected.logsumexp(-1), atol=1e-4, rtol=1e-4)


def _text(name: str):
    config = CONFIG_MAPPING[name]()
    return config.text_config if "text_config" in type(config).sub_configs else config


ALL = sorted(
    name
    for name in {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES}
    if not name.endswith("assistant")  # drafts for speculative decoding, not models of their own
)


def test_every_architecture_with_such_a_key_is_tried():
    keys = {*SCALES, *SOFTCAPS}
    having = {name for name in ALL if keys & {key for key, value in _text(name).to_dict().items() if value is not None}}
    assert having - {*TEXT, *INSIDE, *NOT_BUILT} == set()


def test_no_key_of_transformers_scales_logits_unseen():
    """Names of keys that speak of the output's scale are known, or are something else."""
    scaling = re.compile(r"^(?!attn|attention|moe|router|gate)(\w*logits?|lm_head|output)_\w*(scal|multipl|cap)")
    found = {key for name in ALL for key in _text(name).to_dict() if scaling.match(key)}
    assert found - {*SCALES, *SOFTCAPS} == {"attn_logit_softcapping", "moe_router_logit_softcapping"} & found


@pytest.mark.parametrize("key", sorted({*SCALES, *SOFTCAPS} & FACTORS.keys()))
def test_every_factor_is_read_by_a_model_of_these_tests(key):
    """Without the factor, a model that has it is refused: the check can fail."""
    for name in _here([*TEXT, *INSIDE]):
        config = configuration(name, **FACTORS)
        unread = any((kind, key) in EXCEPTIONS for kind in (name, text_config(config).model_type))
        if getattr(text_config(config), key, None) is None or unread:
            continue
        model = make_model(config)
        layer = output_layer(model, 99)
        less = {"softcap": None} if key in SOFTCAPS else {"scale": 1.0}
        with pytest.raises(ModelError, match="not supported"):
            check_output_layer(model, dataclasses.replace(layer, **less))
        return
    pytest.skip(f"no architecture of the installed transformers has {key}")


def test_a_head_with_layers_of_its_own_is_refused():
    config = BertConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64, is_decoder=True
    )
    with pytest.raises(ModelError, match=r"BertLMHeadModel does more than an output layer.*transform"):
        check_architecture(BertLMHeadModel(config))
