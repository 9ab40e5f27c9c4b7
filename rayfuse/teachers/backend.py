"""What every backend of a teacher is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from rayfuse.data.sample import Sample
from rayfuse.signals.topk import TopKSignals


class Backend(Protocol):
    """What a backend is: a loaded teacher that scores whole units, and writes answers to them."""

    vocab_size: int
    """Ids in its signals are below this."""

    def score(self, samples: Sequence[Sample]) -> list[TopKSignals]:
        """The teacher's signals for each sample, in order. The same samples give the same bits."""

    def generate(
        self,
        samples: Sequence[Sample],
        *,
        max_new_tokens: int,
        batch_size: int,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> list[str]:
        """One answer to each sample's prompt (its response is not read), in order, ended by the model or the length.

        Args:
            samples: whose messages are answered.
            max_new_tokens: longest answer.
            batch_size: prompts generated at a time, where the engine does not decide that itself.
            temperature: 0 is greedy; otherwise the whole distribution is sampled (no top-k, no top-p, whatever the
                model's own generation_config says).
            seed: of the sampling. An answer depends on its own prompt and the seed (see sampling.prompt_seed), so the
                same prompt twice in one call is answered twice alike; ask again with another seed for another answer.
        """

    def check_health(self) -> None:
        """Raise DeadEngineError where nothing can be answered any more; an engine in this process lives as it does."""
        return

    def close(self) -> None:
        """End what runs in processes of its own."""
        return
