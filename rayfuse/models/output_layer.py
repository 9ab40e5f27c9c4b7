"""The output layer that the fused head computes with, and what the architecture does to its logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rayfuse.errors import ModelError


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


def output_layer(model: Any, vocabulary: int) -> OutputLayer:
    """The output layer of a transformers causal language model, cut at the tokenizer's `vocabulary`.

    Raises:
        ModelError: the model has none that is a plain linear layer, or more tokens than the layer has rows.
    """
    layer = model.get_output_embeddings()
    if layer is None or not hasattr(layer, "weight"):
        raise ModelError(f"{type(model).__name__} has no linear output layer; it cannot be a teacher or student")
    rows = layer.weight.shape[0]
    if vocabulary > rows:
        raise ModelError(
            f"the tokenizer has {vocabulary} tokens but the model predicts only {rows}; "
            "they do not belong together (or the embeddings were not resized)"
        )
    config = model.config
    scale = 1.0
    if getattr(config, "logit_scale", None) is not None:  # Cohere
        scale = float(config.logit_scale)
    elif getattr(config, "logits_scaling", None) is not None:  # Granite divides
        scale = 1.0 / float(config.logits_scaling)
    softcap = getattr(config, "final_logit_softcapping", None)  # Gemma
    bias = getattr(layer, "bias", None)
    return OutputLayer(layer.weight, bias, scale, None if softcap is None else float(softcap), vocabulary)


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
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
        expected = model(input_ids=ids, use_cache=False).logits[0].float()
        model.train(training)
        logits = (torch.nn.functional.linear(hidden, layer.weight, layer.bias).float()) * layer.scale
        if layer.softcap is not None:
            logits = layer.softcap * torch.tanh(logits / layer.softcap)
    scale = float(expected.abs().max().clamp_min(1e-6))
    difference = float((logits - expected).abs().max())
    if difference > scale * (1e-3 if hidden.dtype == torch.float32 else 3e-2):
        raise ModelError(
            f"{type(model).__name__} computes its logits in a way that is not supported: the output layer alone is off "
            f"by {difference:.3g} (logits up to {scale:.3g}). Use another model, or report the architecture"
        )
