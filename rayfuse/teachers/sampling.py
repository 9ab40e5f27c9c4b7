"""Sampling whose result belongs to a prompt and a seed, and not to the batch or the replica that it happened in."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import LogitsProcessor

from rayfuse.data.sample import Sample


def prompt_seed(seed: int, sample: Sample) -> int:
    """The seed of one prompt's sampling, below 2^31: made of the call's seed and the prompt alone.

    A backend that takes a seed per request is given this one.
    """
    named = [seed, [message.identity() for message in sample.messages]]
    text = json.dumps(named, ensure_ascii=False, separators=(",", ":"))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little") >> 1


class SeededSampling(LogitsProcessor):  # type: ignore[misc]
    """Leaves one token per row: sampled at `temperature` by the row's own random numbers.

    Inverse of the cumulative distribution at one uniform number per row and step: whatever rows share the batch, a row
    reads the same numbers, so its answer changes by the rounding of its logits at most.
    """

    def __init__(
        self, samples: Sequence[Sample], *, seed: int, temperature: float, max_new_tokens: int, vocab_size: int
    ) -> None:
        """Args: the prompts in the batch's order; ids from `vocab_size` on are padding and never sampled."""
        generators = [np.random.default_rng(prompt_seed(seed, sample)) for sample in samples]
        self.uniforms_BT = torch.from_numpy(np.stack([g.random(max_new_tokens) for g in generators]))
        self.temperature = temperature
        self.vocab_size = vocab_size
        self.step = 0

    def __call__(self, input_ids: Any, scores: torch.Tensor) -> torch.Tensor:
        """scores [B, V] of the next token -> 0 at the sampled token, -inf elsewhere."""
        logits_BV = scores[:, : self.vocab_size].double() / self.temperature
        mass_BV = logits_BV.softmax(-1).cumsum(-1)
        uniform_B1 = self.uniforms_BT[:, self.step, None].to(scores.device) * mass_BV[:, -1:]
        self.step += 1
        picked_B1 = torch.searchsorted(mass_BV, uniform_B1, right=True).clamp_max(mass_BV.shape[1] - 1)
        return torch.full_like(scores, -torch.inf).scatter_(1, picked_B1, 0.0)
