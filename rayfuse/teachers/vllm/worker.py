"""What rayfuse adds to vLLM's own worker, by the hook that vLLM has for it (worker_extension_cls)."""

from __future__ import annotations

from typing import Any


class PaddingMask:
    """Makes a model blind to the rows that pad its output layer beyond the tokenizer.

    vLLM takes every row of the weight matrix for a token: without the mask padding takes part in the softmax and can
    stand among the K likeliest.
    """

    get_model: Any

    def mask_padding(self, vocabulary: int) -> int:
        """Set the logits of rows from `vocabulary` on to -inf, in every later step; returns the worker's own rank."""
        model = self.get_model()
        compute = model.compute_logits

        def masked(*args: Any, **kwargs: Any) -> Any:
            logits = compute(*args, **kwargs)
            if logits is not None:  # with tensor parallelism only some workers gather them
                logits[..., vocabulary:] = -float("inf")
            return logits

        model.compute_logits = masked
        return int(getattr(self, "rank", 0))
