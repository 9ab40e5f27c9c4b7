"""Writing with a transformers model: one batch of prompts, token by token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import LogitsProcessor


def generate_ids(
    model: Any, prompts: Sequence[np.ndarray], *, max_new_tokens: int, end: int, processors: Sequence[LogitsProcessor]
) -> list[list[int]]:
    """The tokens that the model writes after each prompt: the likeliest ones, or what the processors leave.

    Args:
        model: in evaluation mode; what its generation_config says counts too.
        prompts: token ids [p] of each; padded on the left.
        max_new_tokens: at most so many.
        end: the id that ends a turn.
        processors: applied to the scores in this order; one that samples leaves one token to choose from.

    Returns:
        Per prompt its tokens, up to and with `end` where the model wrote it.
    """
    T = max(map(len, prompts))
    input_ids_BT = torch.zeros(len(prompts), T, dtype=torch.long)
    mask_BT = torch.zeros(len(prompts), T, dtype=torch.long)
    for b, ids in enumerate(prompts):
        input_ids_BT[b, T - len(ids) :] = torch.from_numpy(ids)
        mask_BT[b, T - len(ids) :] = 1
    out_BT = model.generate(
        input_ids=input_ids_BT.to(model.device),
        attention_mask=mask_BT.to(model.device),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        logits_processor=list(processors),
        eos_token_id=end,
        pad_token_id=end,
    )
    written = [row[T:].tolist() for row in out_BT]
    return [ids[: ids.index(end) + 1] if end in ids else ids for ids in written]


class LikelyTokens(LogitsProcessor):  # type: ignore[misc]
    """Notes the `count` likeliest tokens of every row and step, and changes nothing.

    Attributes:
        steps: per step [B, count] ids, best first.
    """

    def __init__(self, count: int, vocab_size: int) -> None:
        self.count = min(count, vocab_size)
        self.vocab_size = vocab_size
        self.steps: list[np.ndarray] = []

    def __call__(self, input_ids: Any, scores: torch.Tensor) -> torch.Tensor:
        """scores [B, V] of the next token, as they are."""
        if self.count:
            self.steps.append(scores[:, : self.vocab_size].topk(self.count).indices.cpu().numpy())
        return scores

    def rows(self, b: int, count: int) -> tuple[tuple[int, ...], ...]:
        """The noted tokens of row b at its first `count` steps; nothing for steps that were not taken."""
        noted = [tuple(step[b].tolist()) for step in self.steps[:count]]
        return tuple(noted + [()] * (count - len(noted)))
