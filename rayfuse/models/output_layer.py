"""The output layer that the fused head computes with, and what the architecture does to its logits."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from rayfuse.errors import ModelError
from rayfuse.models.text_config import text_config

SCALES = {
    "logit_scale": 1,  # Cohere
    "lm_head_multiplier": 1,  # Falcon-H1
    "output_multiplier": 1,  # Muse
    "logits_scaling": -1,  # Granite, MiniCPM3
    "logits_mup_width_multiplier": -1,  # Inkling, which divides the hidden states
}
"""Keys of a text configuration that scale the logits: 1 multiplies, -1 divides."""
EXCEPTIONS = {
    ("hyperclovax", "logits_scaling"): 1,
    ("mpt", "logit_scale"): 0,
    ("aya_vision", "logit_scale"): 0,
    ("cohere2_vision", "logit_scale"): 0,
    ("gemma3", "final_logit_softcapping"): 0,
    ("shieldgemma2", "final_logit_softcapping"): 0,
}
"""Model types, of the whole or of its text, that use a key otherwise; 0: their class in transformers does not read it,
as some classes of images and text do not read what their text model does."""
SOFTCAPS = (
    "final_logit_softcapping",  # Gemma, NanoChat, Mistral Large 4
    "logits_soft_cap",  # RecurrentGemma
    "output_logit_soft_cap",  # xLSTM
)
"""Keys of a text configuration that hold c of c * tanh(x / c)."""


@dataclass(frozen=True)
class OutputLayer:
    """The output layer of a causal language model: logits = softcap(scale * (hidden @ weight.T + bias)).

    Attributes:
        weight: [V, H].
        bias: [V] or None.
        scale: factor on the logits.
        softcap: c of c * tanh(x / c), or None.
        valid_vocab: rows from here on are padding.
    """

    weight: Any
    bias: Any
    scale: float
    softcap: float | None
    valid_vocab: int

    def options(self) -> dict[str, Any]:
        """Everything but the weight, as keyword arguments of `fused_head` and `teacher_topk`."""
        return {"bias": self.bias, "scale": self.scale, "softcap": self.softcap, "valid_vocab": self.valid_vocab}


def text_decoder(model: Any) -> Any:
    """The part of a model that turns token ids into the hidden states that its output layer reads.

    It takes `input_ids` and `attention_mask` and returns `last_hidden_state`. In a model of images or sound it is the
    text model alone, which asks for no image.
    """
    base = model.base_model
    if base is not model and text_config(model.config) is model.config:
        return base
    decoder = model.get_decoder()
    while decoder.get_output_embeddings() is not None:  # Llama 4's language model is a causal model of its own
        inner = decoder.get_decoder()
        decoder = decoder.model if inner is decoder else inner
    return decoder


def output_rows(model: Any) -> int:
    """Rows of a model's output layer: the tokens that it can predict, padding included."""
    return int(_linear(model).weight.shape[0])


def output_layer(model: Any, vocabulary: int) -> OutputLayer:
    """The output layer of a transformers causal language model, cut at the `vocabulary` that counts.

    Raises:
        ModelError: the model has none that is a plain linear layer, or more tokens than the layer has rows.
    """
    layer = _linear(model)
    rows = layer.weight.shape[0]
    if vocabulary > rows:
        raise ModelError(
            f"the tokenizer has {vocabulary} tokens but the model predicts only {rows}; "
            "they do not belong together (or the embeddings were not resized)"
        )
    scale, softcap = logit_factors(model.config)
    return OutputLayer(layer.weight, getattr(layer, "bias", None), scale, softcap, vocabulary)


def _linear(model: Any) -> Any:
    layer = model.get_output_embeddings()
    if layer is None or not hasattr(layer, "weight"):
        raise ModelError(f"{type(model).__name__} has no linear output layer; it cannot be a teacher or student")
    if not layer.weight.is_floating_point():
        raise ModelError(
            f"the output layer of {type(model).__name__} is quantised ({layer.weight.dtype}); fusion reads it as it "
            "is: use backend: vllm, or the repository with the unquantised weights"
        )
    return layer


def logit_factors(config: Any) -> tuple[float, float | None]:
    """What an architecture does to its logits: the factor on them, and c of c * tanh(x / c) or None."""
    text = text_config(config)
    types = {config.model_type, text.model_type}
    powers = {**SCALES, **{key: power for (kind, key), power in EXCEPTIONS.items() if kind in types}}
    found = {key: getattr(text, key, None) for key in (*SCALES, *SOFTCAPS) if powers.get(key, 1)}
    values = {key: float(value) for key, value in found.items() if value is not None}
    scale = 1.0
    for key in values.keys() & SCALES.keys():
        scale = scale * values[key] if powers[key] > 0 else scale / values[key]
    return scale, next((values[key] for key in SOFTCAPS if key in values), None)


def check_architecture(model: Any) -> None:
    """Refuse a model with parameters between its decoder and its output layer; the weights need no values.

    Raises:
        ModelError: it has some (the head of BERT), or no linear output layer, or reads more than a text.
    """
    layer, base, decoder = _linear(model), model.base_model, text_decoder(model)
    base = decoder if base is model else base
    needed = [
        name
        for name, parameter in inspect.signature(decoder.forward).parameters.items()
        if parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    ]
    if set(needed) - {"input_ids"}:
        raise ModelError(f"{type(model).__name__} cannot read a text alone: it needs {', '.join(needed)}")
    known = {id(layer.weight), id(getattr(layer, "bias", None)), *map(id, base.parameters())}
    unknown = sorted(name for name, parameter in model.named_parameters() if id(parameter) not in known)
    if unknown:
        raise ModelError(
            f"{type(model).__name__} does more than an output layer to its hidden states ({unknown[0]}), which is not "
            "supported. Use another model, or report the architecture"
        )


def check_output_layer(model: Any, layer: OutputLayer) -> None:
    """Compare the layer with the model's own logits on a few tokens.

    Raises:
        ModelError: they differ: the architecture does something to its logits that `OutputLayer` does not know.
    """
    import torch

    ids = torch.arange(1, 5, device=layer.weight.device)[None] % layer.valid_vocab
    training = model.training
    with torch.no_grad():
        model.eval()
        hidden = text_decoder(model)(input_ids=ids, use_cache=False).last_hidden_state[0]
        expected = model(input_ids=ids, use_cache=False).logits[0].float()[:, : layer.valid_vocab]
        model.train(training)
        logits = torch.nn.functional.linear(hidden, layer.weight, layer.bias).float()[:, : layer.valid_vocab]
        logits = logits * layer.scale
        if layer.softcap is not None:
            logits = layer.softcap * torch.tanh(logits / layer.softcap)
    scale = float(expected.abs().max().clamp_min(1e-6))
    difference = float((logits - expected).abs().max())
    if difference > scale * (1e-3 if hidden.dtype == torch.float32 else 3e-2):
        raise ModelError(
            f"{type(model).__name__} computes its logits in a way that is not supported: the output layer alone is off "
            f"by {difference:.3g} (logits up to {scale:.3g}). Use another model, or report the architecture"
        )
