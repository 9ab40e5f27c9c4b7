"""What a teacher says about a response, its bytes, and the store that keeps it."""

from __future__ import annotations

from rayfuse.signals.codec import decode, encode, pack, unpack
from rayfuse.signals.topk import FIELDS, TopKSignals

__all__ = ["FIELDS", "TopKSignals", "decode", "encode", "pack", "unpack"]
