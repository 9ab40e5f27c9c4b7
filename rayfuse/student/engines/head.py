"""The model and its fused head as one module, so that every engine sees one forward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from rayfuse.errors import ModelError
from rayfuse.losses import HeadOutput, fused_head, token_logps
from rayfuse.models.output_layer import check_output_layer, output_layer, text_decoder
from rayfuse.models.text_config import text_config


@dataclass
class Forward:
    """What a forward made: one of the first two, as asked for, and the router loss where the model has one.

    Attributes:
        head: cross-entropy and top k.
        logps: [N] log-probabilities of the labels.
        router: the load-balancing loss, times its coefficient.
    """

    head: HeadOutput | None = None
    logps: torch.Tensor | None = None
    router: torch.Tensor | None = None


class HiddenToHead(nn.Module):
    """The model and its fused head as one module, so that an engine which wraps modules sees one forward.

    Args:
        model: a transformers causal language model.
        vocabulary: tokens of its tokenizer; rows of the output layer from there on are padding.
        dtype: number format of the forward and backward pass.
        router: coefficient of the load-balancing loss; 0: none.
    """

    def __init__(self, model: Any, vocabulary: int, dtype: torch.dtype, router: float = 0.0) -> None:
        super().__init__()
        self.model = model
        self.vocabulary = vocabulary
        self.dtype = dtype
        self.router = router

    def forward(self, batch: dict[str, torch.Tensor], k: int | None, lse: bool) -> Forward:
        """The top k (`lse`: with a differentiable log-sum-exp) or, k None, the labels' log-probabilities."""
        device = batch["labels"].device.type
        with torch.autocast(device, dtype=self.dtype, enabled=self.dtype != torch.float32):
            hidden_BTH, balance = _hidden(self.model, batch["input_ids"], batch["attention_mask"], self.router > 0)
        made = Forward(router=None if balance is None else self.router * balance)
        layer = output_layer(self.model, self.vocabulary)
        hidden_NH = hidden_BTH.flatten(0, 1)[batch["positions"]].to(self.dtype)
        weight = layer.weight.to(self.dtype)
        options = layer.options() | {"bias": None if layer.bias is None else layer.bias.to(self.dtype)}
        labels = batch["labels"]
        if k is None:
            made.logps = token_logps(hidden_NH, weight, labels, **options)
        else:
            picks, weights = batch.get("picks"), batch.get("row_weights")
            made.head = fused_head(
                hidden_NH, weight, labels, k, picks=picks, lse_gradient=lse, weights=weights, **options
            )
        return made


class ShardedForward(HiddenToHead):
    """HiddenToHead for engines that gather the weights around a module's forward, and that hook what it returns.

    Their hooks find tensors in a dictionary, and not in a dataclass. All that reads the output layer's weight is here,
    so that it is gathered once per micro-step.
    """

    def forward(self, batch: dict[str, torch.Tensor] | None, k: int | None, lse: bool) -> dict[str, Any]:  # type: ignore[override]
        """The fields of a Forward and of its HeadOutput; without a batch nothing, and the architecture is checked."""
        if batch is None:
            device = next(self.model.parameters()).device.type
            with torch.no_grad(), torch.autocast(device, dtype=self.dtype, enabled=self.dtype != torch.float32):
                check_output_layer(self.model, output_layer(self.model, self.vocabulary))
                if self.router:
                    check_router_loss(self.model)
            return {}
        made = super().forward(batch, k, lse)
        head = {} if made.head is None else {f"head.{name}": value for name, value in vars(made.head).items()}
        return {**head, "logps": made.logps, "router": made.router}


def forward_of(fields: dict[str, Any]) -> Forward:
    """The Forward whose fields a ShardedForward returned."""
    head = {name.removeprefix("head."): value for name, value in fields.items() if name.startswith("head.")}
    return Forward(HeadOutput(**head) if head else None, fields["logps"], fields["router"])


def _hidden(
    model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, balanced: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The last hidden states [B, T, H] and, where asked for, the model's own load-balancing loss.

    That loss is made by the causal model, not by its base; all it adds is the logits of one position per sample.
    """
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
    if not balanced:
        return text_decoder(model)(**inputs).last_hidden_state, None
    out = model(**inputs, output_router_logits=True, output_hidden_states=True, logits_to_keep=1)
    return out.hidden_states[-1], out.aux_loss


def router_coefficient(model: Any, asked: float | None, *, check: bool = True) -> float:
    """Coefficient of the load-balancing loss: as asked, or the model's own; 0 where the model has no router.

    Args:
        model: the student.
        asked: student.router_loss.
        check: run the model to see that its code returns the loss; otherwise `check_router_loss` is still to be called.

    Raises:
        ModelError: it is asked for, and the model has none; or the model's code does not return it.
    """
    own = getattr(model, "router_aux_loss_coef", None)  # every class of transformers that has such a loss has it
    if own is None:
        if asked:
            raise ModelError(f"student.router_loss is {asked:g}, but {type(model).__name__} has no router loss; use 0")
        return 0.0
    coefficient = float(own if asked is None else asked)
    if coefficient and check:
        check_router_loss(model)
    return coefficient


def check_router_loss(model: Any) -> None:
    """Raises ModelError where the way with the load-balancing loss gives other hidden states, or no such loss."""
    ids = torch.arange(1, 5, device=model.device)[None] % text_config(model.config).vocab_size
    mask = torch.ones_like(ids)
    training = model.training
    model.eval()
    with torch.no_grad():
        plain, _ = _hidden(model, ids, mask, balanced=False)
        hidden, balance = _hidden(model, ids, mask, balanced=True)
    model.train(training)
    if balance is None or not torch.is_tensor(balance) or not torch.allclose(plain, hidden, rtol=1e-4, atol=1e-5):
        raise ModelError(
            f"the load-balancing loss of {type(model).__name__} cannot be had from its forward; set "
            "student.router_loss: 0 to train without it"
        )
