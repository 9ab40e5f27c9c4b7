"""The contract between teachers and everything that learns from them: TopKSignals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from rayfuse.errors import SignalError

_DTYPES = {
    "logps": np.dtype(np.float16),
    "ids": np.dtype(np.int32),
    "lse": np.dtype(np.float32),
    "token_logps": np.dtype(np.float32),
    "byte_ends": np.dtype(np.int64),
}


FIELDS = tuple(_DTYPES)
"""What signals consist of; a reader may ask for some of it only."""


_MASS_SLACK = 5e-3
"""K float16 probabilities may add up to this much more than 1 by rounding alone (relative error 2^-11 of each logp)."""


@dataclass(frozen=True)
class TopKSignals:
    """One teacher's answer to one sample; packed arrays, L = n + 1 rows for a response of n teacher tokens.

    Where only some fields were asked of the store (see `decode`), the others are None: using one fails at once.

    Attributes:
        logps: [L, K] float16, top-K log-probabilities (nats), sorted descending.
        ids: [L, K] int32, the teacher's token ids of them.
        lse: [L] float32, log-sum-exp of the raw logits, so that raw logits are logps + lse; NaN where a backend knows
            log-probabilities only.
        token_logps: [L] float32, log-probability of the token that actually follows (the last one: end-of-turn).
        byte_ends: [L - 1] int64, bytes of the response read after each of its tokens.
    """

    logps: np.ndarray
    ids: np.ndarray
    lse: np.ndarray
    token_logps: np.ndarray
    byte_ends: np.ndarray

    def __len__(self) -> int:
        return len(self.logps)

    @property
    def k(self) -> int:
        """Kept logits per position."""
        return self.logps.shape[1]

    def validate(self, vocab_size: int, response_bytes: int | None = None) -> TopKSignals:
        """Check the contract and return self.

        Args:
            vocab_size: ids must be below it.
            response_bytes: where given, the last byte end must equal it.

        Raises:
            SignalError: naming the field, the row and the value.
        """
        for name, dtype in _DTYPES.items():
            if getattr(self, name).dtype != dtype:
                raise SignalError(f"signals: {name} has dtype {getattr(self, name).dtype}, not {dtype}")
        L = len(self.logps)
        if self.logps.ndim != 2 or L < 1 or self.logps.shape[1] < 1:
            raise SignalError(f"signals: logps has shape {self.logps.shape}, not [L, K]")
        shapes = {"ids": self.logps.shape, "lse": (L,), "token_logps": (L,), "byte_ends": (L - 1,)}
        for name, shape in shapes.items():
            if getattr(self, name).shape != shape:
                raise SignalError(f"signals: {name} has shape {getattr(self, name).shape}, not {shape}")
        logps = self.logps.astype(np.float32)
        _refuse(~np.isfinite(logps).all(1), "a log-probability is not finite", logps)
        _refuse(~np.isfinite(self.token_logps), "token_logps is not finite", self.token_logps)
        _refuse((logps[:, 1:] > logps[:, :-1]).any(1), "log-probabilities are not sorted descending", logps)
        _refuse(np.exp(logps).sum(1) > 1 + _MASS_SLACK, "the kept probabilities add up to more than 1", logps)
        _refuse(self.token_logps > 1e-4, "token_logps is above 0", self.token_logps)
        _refuse(((self.ids < 0) | (self.ids >= vocab_size)).any(1), f"an id is outside 0..{vocab_size - 1}", self.ids)
        if L > 1 and (self.byte_ends[0] < 0 or (np.diff(self.byte_ends) < 0).any()):
            raise SignalError("signals: byte_ends is not increasing")
        if response_bytes is not None and L > 1 and self.byte_ends[-1] != response_bytes:
            raise SignalError(
                f"signals: the teacher read {self.byte_ends[-1]} bytes of a response of {response_bytes} bytes"
            )
        return self


def _refuse(bad: Any, reason: str, values: np.ndarray) -> None:
    if bad.any():
        row = int(np.flatnonzero(bad)[0])
        raise SignalError(f"signals: {reason}, first in row {row}: {values[row]}")
