"""From an engine's log-probabilities of a prompt to TopKSignals.

Serving engines answer each position with the log-probability of the token that follows, and those of the K likeliest
tokens. Where the following token is one of the K it stands there twice; an engine that knows the model's padded
vocabulary rows only as tokens may name those too. They know no raw logits, so `lse` is NaN.

Shapes: L rows (predicted positions), C columns (candidates of a row), K kept.
"""

from __future__ import annotations

import numpy as np

from rayfuse.errors import SignalError
from rayfuse.signals.topk import TopKSignals


def signals_from_logprobs(
    next_logps: np.ndarray,
    ids: np.ndarray,
    logps: np.ndarray,
    byte_ends: np.ndarray,
    *,
    k: int,
    vocab_size: int,
) -> TopKSignals:
    """The signals of one sample.

    Args:
        next_logps: [L] log-probability of the token that follows.
        ids: [L, C] candidate tokens of each row in any order, repetitions allowed; -1 fills rows that have fewer.
        logps: [L, C] their log-probabilities.
        byte_ends: [L - 1] bytes of the response read after each of its tokens.
        k: candidates kept per row; equal ones stay in the order in which they came.
        vocab_size: candidates from here on are padding of the model's vocabulary, and left out.

    Raises:
        SignalError: a row has fewer than k different tokens of the vocabulary, or the result breaks the contract.
    """
    logps = np.asarray(logps, dtype=np.float32)
    ids = np.asarray(ids, dtype=np.int64)
    usable = (ids >= 0) & (ids < vocab_size) & ~_repeated(ids)
    fewest = int(usable.sum(1).min())
    if fewest < k:
        row = int(usable.sum(1).argmin())
        raise SignalError(
            f"row {row} has {fewest} different tokens below {vocab_size}, not {k}: {ids[row].tolist()}; "
            "the engine must return more log-probabilities (max_logprobs), or signals.k be lower"
        )
    # NaN sorts first, so that it is kept and refused below instead of being lost.
    order = np.where(usable, np.where(np.isnan(logps), np.inf, logps), -np.inf)
    kept = np.argsort(-order, axis=1, kind="stable")[:, :k]
    # The float32 rounding of a softmax can leave a certain token a hair above 0.
    return TopKSignals(
        logps=np.minimum(np.take_along_axis(logps, kept, 1), 0.0).astype(np.float16),
        ids=np.take_along_axis(ids, kept, 1).astype(np.int32),
        lse=np.full(len(ids), np.nan, dtype=np.float32),
        token_logps=np.asarray(next_logps, dtype=np.float32),
        byte_ends=byte_ends,
    ).validate(vocab_size)


def _repeated(ids: np.ndarray) -> np.ndarray:
    """[L, C] bool: whether the same token stands further left in its row. Time O(L C log C)."""
    order = np.argsort(ids, axis=1, kind="stable")
    ordered = np.take_along_axis(ids, order, 1)
    again = np.zeros(ids.shape, dtype=bool)
    again[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
    repeated = np.empty_like(again)
    np.put_along_axis(repeated, order, again, 1)
    return repeated
