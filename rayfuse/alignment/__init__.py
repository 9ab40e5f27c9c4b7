"""Where two tokenizers meet: bytes read after each token, and the rows that can be compared."""

from __future__ import annotations

from rayfuse.alignment.pairs import Alignment, align, align_by_position
from rayfuse.alignment.token_bytes import byte_ends, bytes_to_ids, encode_response, token_bytes

__all__ = ["Alignment", "align", "align_by_position", "byte_ends", "bytes_to_ids", "encode_response", "token_bytes"]
