"""TopKSignals: what a teacher says about one sample, and how it travels.

Row i is the prediction that the teacher makes after i tokens of the response: a response of n tokens has L = n + 1
rows; the first predicts its first token, the last predicts the end of the turn.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from rayfuse.errors import SignalError
from rayfuse.signals.topk import FIELDS, TopKSignals

FORMAT = "rayfuse-signals-2"


# --- fewer bytes, exactly ------------------------------


def narrow_ids(ids: np.ndarray) -> dict[str, np.ndarray]:
    """int32 ids in 3 bytes each: their low 16 bits, and the rest in uint8 (in int16, where an id reaches 2^24)."""
    return {"ids_low": ids.astype(np.uint16), "ids_high": _smallest(ids >> 16)}


def wide_ids(arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """The inverse of `narrow_ids`."""
    ids = arrays["ids_high"].astype(np.int32)
    ids <<= 16
    ids |= arrays["ids_low"]
    return ids


def _smallest(values: np.ndarray) -> np.ndarray:
    """The same integers in the smallest type that holds them all: one byte each for the widths of usual tokens."""
    low, high = (int(values.min()), int(values.max())) if values.size else (0, 0)
    smallest = np.result_type(np.min_scalar_type(low), np.min_scalar_type(high))
    return values.astype(smallest) if smallest.kind in "iu" else values


def _widths(ends: np.ndarray) -> np.ndarray:
    """Bytes of each token, int64, from the byte ends; np.cumsum is the inverse."""
    return np.diff(ends, prepend=np.int64(0))


# --- packing: a whole unit in a few arrays ------------------------------


def pack(signals: Sequence[TopKSignals]) -> dict[str, np.ndarray]:
    """Many samples' signals as concatenated, narrowed arrays and `lengths` [samples]: few objects on the wire.

    5 K + 9 bytes a row, so 59 at K = 10: logps 2 K, ids 3 K, lse 4, token_logps 4, and the token's width 1.
    """
    packed = {name: np.concatenate([getattr(item, name) for item in signals]) for name in ("logps", "lse")}
    packed["token_logps"] = np.concatenate([item.token_logps for item in signals])
    packed |= narrow_ids(np.concatenate([item.ids for item in signals]))
    packed["widths"] = _smallest(np.concatenate([_widths(item.byte_ends) for item in signals]))
    packed["lengths"] = np.array([len(item) for item in signals], dtype=np.int64)
    return packed


def unpack(packed: Mapping[str, np.ndarray]) -> list[TopKSignals]:
    """The inverse of `pack`; all but the byte ends are views into whole arrays."""
    rows = {name: packed[name] for name in ("logps", "lse", "token_logps")} | {"ids": wide_ids(packed)}
    limits = np.concatenate(([0], np.cumsum(packed["lengths"]))).tolist()
    return [
        TopKSignals(
            **{name: array[start:end] for name, array in rows.items()},
            byte_ends=np.cumsum(packed["widths"][start - index : end - index - 1], dtype=np.int64),
        )
        for index, (start, end) in enumerate(pairwise(limits))
    ]


# --- one sample as a safetensors object ------------------------------

_PARTS = {name: (name,) for name in FIELDS} | {"ids": ("ids_low", "ids_high"), "byte_ends": ("widths",)}
"""The arrays of an object that hold each field."""
_KINDS = {"F16": "<f2", "F32": "<f4", "U8": "|u1", "U16": "<u2", "U32": "<u4", "I8": "|i1", "I16": "<i2"}
_KINDS |= {"I32": "<i4", "I64": "<i8"}
_NAMES = {np.dtype(kind): name for name, kind in _KINDS.items()}
_HEADER_GUESS = 2048
"""Bytes read at first where only a part of an object is asked for; a header has about 1,000."""


def encode(signals: TopKSignals, metadata: Mapping[str, Any]) -> bytes:
    """Signals as one safetensors object whose header names what it belongs to and the hash of each array.

    As many bytes a row as `pack` makes, and a header of about 1,000 bytes for the sample.
    """
    arrays = {name: getattr(signals, name) for name in ("logps", "lse", "token_logps")}
    arrays |= narrow_ids(signals.ids) | {"widths": _smallest(_widths(signals.byte_ends))}
    arrays = dict(sorted(arrays.items(), key=lambda item: -item[1].itemsize))  # wide first: every array is aligned
    header: dict[str, Any] = {}
    hashes, contents, end = {}, [], 0
    for name, array in arrays.items():
        contents.append(np.ascontiguousarray(array).data)
        shape, kind = list(array.shape), _NAMES[array.dtype]
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [end, end + array.nbytes]}
        hashes[name] = _hash(name, shape, kind, contents[-1])
        end += array.nbytes
    about = json.dumps(dict(metadata), sort_keys=True)
    header["__metadata__"] = {"format": FORMAT, "about": about, "hashes": json.dumps(hashes)}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([len(text).to_bytes(8, "little"), text, *contents])


def decode(blob: bytes, metadata: Mapping[str, Any], fields: Sequence[str] = FIELDS) -> TopKSignals:
    """The inverse of `encode`; see `read_signals`."""
    return read_signals(lambda start, end: blob[start:end], len(blob), metadata, fields)


def read_signals(
    read: Callable[[int, int], bytes], size: int, metadata: Mapping[str, Any], fields: Sequence[str] = FIELDS
) -> TopKSignals:
    """Signals from an object of `size` bytes, of which `read(start, end)` gives a part.

    Only what `fields` need is read and hashed: 21 bytes a row at K = 10 for ranks and where they stand (logps,
    byte_ends), 4 for the log-probability of a response (token_logps), 59 for everything.

    Raises:
        SignalError: the object is damaged, is something else, or belongs to another teacher or sample.
    """
    head = read(0, size if len(fields) == len(FIELDS) else min(size, _HEADER_GUESS))
    try:
        begin = 8 + int.from_bytes(head[:8], "little")
        if not 8 < begin <= size:
            raise ValueError(f"a header of {begin - 8} bytes in an object of {size}")
        header = json.loads(head[8:begin] if begin <= len(head) else read(8, begin))
        about = dict(header.pop("__metadata__"))
        if about.get("format") != FORMAT:
            raise _not_this(about.get("format"), header)
        places = {name: (part["dtype"], part["shape"], part["data_offsets"]) for name, part in header.items()}
        hashes = dict(json.loads(about["hashes"]))
        end = max((offsets[1] for _, _, offsets in places.values()), default=0)
        if begin + end != size:
            raise ValueError(f"{size} bytes, of which the header knows {begin + end}")
        arrays = {}
        for name in (part for field in fields for part in _PARTS[field]):
            if name not in places:
                raise _not_this(FORMAT, header)
            kind, shape, (first, last) = places[name]
            first, last = begin + first, begin + last
            content = head[first:last] if last <= len(head) else read(first, last)
            if hashes.get(name) != _hash(name, shape, kind, content):
                raise SignalError(f"{name} does not have the hash that its header gives")
            arrays[name] = np.frombuffer(content, dtype=_KINDS[kind]).reshape(shape)
    except SignalError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError, MemoryError, RecursionError) as error:
        raise SignalError(f"not a readable signals object: {type(error).__name__}: {error}") from error
    if about.get("about") != json.dumps(dict(metadata), sort_keys=True):
        raise SignalError(f"the object belongs to {about.get('about')}, not to {dict(metadata)}")
    asked: dict[str, Any] = {name: arrays.get(name) for name in FIELDS}
    if "ids" in fields:
        asked["ids"] = wide_ids(arrays)
    if "byte_ends" in fields:
        asked["byte_ends"] = np.cumsum(arrays["widths"], dtype=np.int64)
    return TopKSignals(**asked)


def _not_this(found: Any, arrays: Mapping[str, Any]) -> SignalError:
    return SignalError(f"not a {FORMAT} object (format {found!r}, arrays {sorted(arrays)})")


def _hash(name: str, shape: Sequence[int], kind: str, content: Any) -> str:
    """128 bits of SHA-256 (twice as fast as BLAKE2 where the processor has instructions for it)."""
    digest = hashlib.sha256(f"{name}{list(shape)}{kind}".encode())
    digest.update(content)
    return digest.hexdigest()[:32]
