"""The model and its fused head as one module, so that every engine sees one forward."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from rayfuse.losses import HeadOutput, fused_head, token_logps
from rayfuse.models.output_layer import output_layer


class HiddenToHead(nn.Module):
    """The model and its fused head as one module, so that DDP sees one forward."""

    def __init__(self, model: Any, vocabulary: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.model = model
        self.vocabulary = vocabulary
        self.dtype = dtype

    def forward(self, batch: dict[str, torch.Tensor], k: int | None, lse: bool = False) -> HeadOutput | torch.Tensor:
        """The fused head's output with the top k, or (k None) the labels' log-probabilities [N].

        `lse`: its log-sum-exp is differentiable.
        """
        device = batch["labels"].device.type
        with torch.autocast(device, dtype=self.dtype, enabled=self.dtype != torch.float32):
            hidden_BTH = self.model.base_model(
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
            ).last_hidden_state
        layer = output_layer(self.model, self.vocabulary)
        hidden_NH = hidden_BTH.flatten(0, 1)[batch["positions"]].to(self.dtype)
        weight = layer.weight.to(self.dtype)
        options = layer.options() | {"bias": None if layer.bias is None else layer.bias.to(self.dtype)}
        if k is None:
            return token_logps(hidden_NH, weight, batch["labels"], **options)
        return fused_head(hidden_NH, weight, batch["labels"], k, picks=batch.get("picks"), lse_gradient=lse, **options)
