"""Where two tokenizers meet: the bytes that each token reads, and the rows at which two models read equally many.

Every model reads the same response under its own tokenizer. After i tokens it has read some number of UTF-8 bytes of
the text; two models predict the same thing exactly where both have read the same number of them. Bytes are counted
from each token's own bytes, never from decoded strings: a token can hold a part of a character.

Row i of a response of n tokens is the prediction made after i tokens: rows 0..n, the first predicts the first token,
the last predicts end-of-turn. `ids` therefore never include the end-of-turn token.

Source: "Position alignment" of InfiFusion (arXiv 2501.02795); the form is ours: the intersection of the byte offsets.
"""

from __future__ import annotations

import json
import unicodedata
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rayfuse.errors import AlignmentError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

METASPACE = "▁"  # U+2581, SentencePiece's visible space
UNKNOWN = -1  # the width of an id whose bytes cannot be known


@dataclass(frozen=True, slots=True, eq=False)
class _Vocabulary:
    """The bytes of every id of one tokenizer (V ids), and how the tokenizer treats the beginning of a text."""

    name: str
    pieces: tuple[bytes, ...]  # [V], b"" for special ids
    widths: NDArray[np.int64]  # [V], UNKNOWN where no number is right
    added: NDArray[np.bool_]  # [V], true for added tokens, special or not
    spaced: NDArray[np.bool_]  # [V], true where the piece begins with a space
    prefix: str  # a dummy space is put before: "never" a text, its "first" piece, "always" after added tokens too
    bare: tuple[str, ...]  # ... unless the text begins with one of these
    composes: bool  # true where the tokenizer brings its input into Unicode form NFC
    size: int  # the number of tokens, V less the gaps
    reasons: dict[int, str]  # why the width of an id is UNKNOWN, where it is not a gap
    fallbacks: frozenset[int]  # ids that write one byte of what the tokenizer has no piece for


def byte_ends(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int] | NDArray[Any]) -> NDArray[np.int64]:
    """Bytes of text read after each token: `ids` [n] of one whole text -> int64 [n], non-decreasing.

    Special tokens have zero width, other added tokens the width of their content. The dummy space that a SentencePiece
    tokenizer puts before a text has zero width, so the first piece counts one byte less than it holds. Where such a
    tokenizer writes "a" and " a" with the same ids, the ids alone stand for "a", which is also what the tokenizer
    decodes; `encode_response` knows the text and counts its space.

    O(n) in numpy after a table of the vocabulary, made once per tokenizer. Raises AlignmentError for an id that the
    tokenizer does not have or whose bytes depend on the text, and for a tokenizer whose bytes cannot be known.
    """
    vocabulary = _vocabulary(tokenizer)
    rows = _checked_ids(vocabulary, ids)
    return np.cumsum(vocabulary.widths[rows] - _dummy_spaces(vocabulary, rows, bare=False))


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> tuple[bytes, ...]:
    """The bytes of every id [V], in the order of the ids; b"" for special ids, gaps and the unknown token.

    A leading dummy space is included: it belongs to the place in a text, not to the token. Raises AlignmentError for
    a tokenizer whose bytes cannot be known.
    """
    return _vocabulary(tokenizer).pieces


def bytes_to_ids(tokenizer: PreTrainedTokenizerBase, below: int | None = None) -> dict[bytes, int]:
    """The id that writes given bytes. Where several do, the one the tokenizer uses: a piece before a single byte of
    SentencePiece's fall-back, a token added later before an earlier one. Ids from `below` on, where it is given, are
    left out: tokens for which a model has no row. Raises AlignmentError as `token_bytes` does.
    """
    vocabulary = _vocabulary(tokenizer)
    order = sorted(range(len(vocabulary.pieces[:below])), key=lambda i: (i not in vocabulary.fallbacks, i))
    return {vocabulary.pieces[i]: i for i in order if vocabulary.pieces[i]}


def encode_response(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Token ids of a response alone and the bytes read after each: `(ids [n], ends [n])`, int64.

    No special token is added, and a text that looks like one ("<|im_end|>") is encoded as the text it is. The bytes of
    the tokens are the bytes of the text: `ends[-1] == len(text.encode())`. Raises AlignmentError where they are not:
    the tokenizer normalizes, drops or replaces something, or can write a string only as a special token.
    """
    vocabulary = _vocabulary(tokenizer)
    try:
        expected = text.encode()
    except UnicodeEncodeError as error:
        raise AlignmentError(f"the response is not valid Unicode ({error}); remove the row from the data") from error
    encoding = tokenizer(
        text,
        add_special_tokens=False,
        split_special_tokens=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    ids = _checked_ids(vocabulary, encoding["input_ids"])
    dummies = _dummy_spaces(vocabulary, ids, bare=text.startswith(vocabulary.bare))
    parts = [vocabulary.pieces[i] for i in ids.tolist()]
    for row in np.flatnonzero(dummies):
        parts[row] = parts[row][1:]
    read = b"".join(parts)
    if read != expected:
        raise AlignmentError(_changed_text(vocabulary, ids, text, read, expected))
    return ids, np.cumsum(vocabulary.widths[ids] - dummies)


def _checked_ids(vocabulary: _Vocabulary, ids: Sequence[int] | NDArray[Any]) -> NDArray[np.int64]:
    rows = np.asarray(ids)
    if rows.size == 0:
        return np.zeros(0, dtype=np.int64)
    if rows.ndim != 1 or rows.dtype.kind not in "iu":
        raise AlignmentError(
            f"token ids must be integers [n], not {rows.dtype} {list(rows.shape)}; pass one text's ids"
        )
    rows = rows.astype(np.int64, copy=False)
    outside = (rows < 0) | (rows >= len(vocabulary.widths))
    if outside.any():
        raise AlignmentError(
            f"token id {rows[outside][0]} is outside the vocabulary of tokenizer {vocabulary.name} "
            f"(0..{len(vocabulary.widths) - 1}); it comes from another tokenizer, or from a padded row of a model"
        )
    unknown = vocabulary.widths[rows] == UNKNOWN
    if unknown.any():
        i = int(rows[unknown][0])
        reason = vocabulary.reasons.get(i, "is a gap: the tokenizer has no token of this number")
        raise AlignmentError(f"token id {i} of tokenizer {vocabulary.name} {reason}")
    return rows


def _dummy_spaces(vocabulary: _Vocabulary, ids: NDArray[np.int64], *, bare: bool) -> NDArray[np.bool_]:
    """True [n] where a token begins with a space that the tokenizer put there; `bare`: not before the first token."""
    dummies = np.zeros(len(ids), dtype=bool)
    plain = np.flatnonzero((vocabulary.widths[ids] > 0) | ~vocabulary.added[ids])
    if vocabulary.prefix == "never" or not len(plain):
        return dummies
    if vocabulary.prefix == "always":
        dummies[1:] = vocabulary.added[ids[:-1]]
    dummies[plain[0]] = not bare
    return dummies & vocabulary.spaced[ids] & ~vocabulary.added[ids]


def _changed_text(vocabulary: _Vocabulary, ids: NDArray[np.int64], text: str, read: bytes, expected: bytes) -> str:
    """The message for tokens that do not hold the text: the first difference and what to do about it."""
    at = next(
        (i for i, (a, b) in enumerate(zip(read, expected, strict=False)) if a != b), min(len(read), len(expected))
    )
    special = vocabulary.added[ids] & (vocabulary.widths[ids] == 0)
    if vocabulary.composes and not unicodedata.is_normalized("NFC", text):
        advice = "it brings every text into Unicode form NFC; store the data as unicodedata.normalize('NFC', text)"
    elif special.any():
        advice = f"it can write a string only as the special token {int(ids[special][0])}; remove the row from the data"
    elif METASPACE in text and vocabulary.spaced.any():
        advice = f"it cannot tell {METASPACE!r} from a space; remove the row from the data"
    else:
        advice = "it drops or replaces what it cannot represent; remove the row, or use a tokenizer that can"
    return (
        f"tokenizer {vocabulary.name} changes the text: at byte {at} its tokens hold {read[at : at + 12]!r} "
        f"where the text has {expected[at : at + 12]!r} (after {expected[max(0, at - 12) : at]!r}); {advice}"
    )


# --- the table of one vocabulary -------------------------------------------------------------------------------------

_tables: weakref.WeakKeyDictionary[Any, _Vocabulary] = weakref.WeakKeyDictionary()


def _vocabulary(tokenizer: PreTrainedTokenizerBase) -> _Vocabulary:
    """The tokenizer's table, made at its first use and again after tokens were added; it dies with the tokenizer."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not hasattr(backend, "get_added_tokens_decoder"):
        raise AlignmentError(
            f"{type(tokenizer).__name__} is not a fast tokenizer of transformers, so the bytes of its tokens are not "
            "known; load it with AutoTokenizer from a folder with a tokenizer.json (for Mistral: mistral_format=False)"
        )
    table = _tables.get(tokenizer)
    if table is None or table.size != backend.get_vocab_size(with_added_tokens=True):
        table = _tables[tokenizer] = _build(tokenizer, backend)
    return table


def _build(tokenizer: PreTrainedTokenizerBase, backend: Any) -> _Vocabulary:
    name = f"{tokenizer.name_or_path or type(tokenizer).__name__!r}"
    normalizers, pre_tokenizers = _parts(backend.normalizer), _parts(backend.pre_tokenizer)
    byte_level = _is_byte_level(name, backend, normalizers, pre_tokenizers)
    byte_fallback, unknown_token = _model_options(backend.model)
    prefix, bare = _prefix(name, normalizers, pre_tokenizers)

    vocabulary = backend.get_vocab(with_added_tokens=True)
    pieces = [b""] * (max(vocabulary.values(), default=-1) + 1)
    widths = np.full(len(pieces), UNKNOWN, dtype=np.int64)
    for token, i in vocabulary.items():
        pieces[i] = _byte_level_piece(token) if byte_level else _metaspace_piece(token, byte_fallback)
    reasons: dict[int, str] = {}
    added = np.zeros(len(pieces), dtype=bool)
    for i, token in backend.get_added_tokens_decoder().items():
        added[i] = True
        pieces[i] = b"" if token.special else (token.content if byte_level else _spaces(token.content)).encode()
        if not token.special and (token.lstrip or token.rstrip):
            reasons[i] = f"({token.content!r}) takes the white space beside it; load the tokenizer without strip flags"
    if unknown_token in vocabulary and not _writes_every_byte(pieces, byte_level, byte_fallback, vocabulary):
        unknown = vocabulary[unknown_token]
        pieces[unknown] = b""
        reasons[unknown] = "stands for text that the tokenizer cannot represent; remove the row from the data"

    for i in vocabulary.values():
        widths[i] = len(pieces[i])
    widths[list(reasons)] = UNKNOWN
    spaced = np.fromiter((piece.startswith(b" ") for piece in pieces), dtype=bool, count=len(pieces))
    composes = any(part["type"] == "NFC" for part in normalizers)
    bytewise = (f"<0x{byte:02X}>" for byte in range(256) if byte_fallback and not byte_level)
    return _Vocabulary(
        name,
        tuple(pieces),
        widths,
        added,
        spaced,
        prefix,
        bare,
        composes,
        len(vocabulary),
        reasons,
        frozenset(vocabulary[token] for token in bytewise if token in vocabulary),
    )


def _parts(component: Any) -> list[dict[str, Any]]:
    """The settings of a normalizer or pre-tokenizer, nested sequences flattened; no component is an empty list."""
    if component is None:
        return []
    flat: list[dict[str, Any]] = []
    queue = [json.loads(component.__getstate__())]
    while queue:
        part = queue.pop(0)
        nested = part.get("normalizers") or part.get("pretokenizers") or []
        queue = nested + queue
        if part["type"] != "Sequence":
            flat.append(part)
    return flat


def _is_byte_level(name: str, backend: Any, normalizers: list[Any], pre_tokenizers: list[Any]) -> bool:
    """True for the GPT-2 byte alphabet, false for SentencePiece pieces; any other kind is an AlignmentError."""
    model, kinds = type(backend.model).__name__, {part["type"] for part in normalizers + pre_tokenizers}
    affixes = [getattr(backend.model, key, None) for key in ("continuing_subword_prefix", "end_of_word_suffix")]
    advice = "; a byte-level or SentencePiece tokenizer is needed, use a model that has one"
    if model not in ("BPE", "Unigram") or any(affixes):
        marks = f" with {[affix for affix in affixes if affix]}" if any(affixes) else ""
        raise AlignmentError(f"the tokens of tokenizer {name} ({model}{marks}) do not tell their bytes{advice}")
    for part in normalizers:
        spaces = part["type"] == "Replace" and (part["pattern"], part["content"]) == ({"String": " "}, METASPACE)
        prepends = part["type"] == "Prepend" and part["prepend"] == METASPACE
        if not (part["type"] in ("NFC", "ByteLevel") or spaces or prepends):
            raise AlignmentError(
                f"the normalizer {part['type']} of tokenizer {name} ({model}) rewrites the text{advice}"
            )
    if "ByteLevel" in kinds:
        return True
    decoder = backend.decoder.__getstate__().decode() if backend.decoder is not None else ""
    if METASPACE not in decoder:
        raise AlignmentError(f"tokenizer {name} ({model}) has no decoder of bytes or of {METASPACE!r}{advice}")
    return False


def _prefix(name: str, normalizers: list[Any], pre_tokenizers: list[Any]) -> tuple[str, tuple[str, ...]]:
    """Where the tokenizer puts a dummy space ("never", "first", "always"), and before which beginnings it does not."""
    if any(part["type"] == "Prepend" for part in normalizers):
        return "always", ()
    for place, part in enumerate(pre_tokenizers):
        if part["type"] == "Metaspace" and part["prepend_scheme"] != "never":
            return part["prepend_scheme"], (" ", METASPACE)
        if part["type"] == "ByteLevel" and part["add_prefix_space"]:
            if place > 0:
                raise AlignmentError(
                    f"tokenizer {name} puts a space before every word; load it with add_prefix_space=False"
                )
            return "always", (" ",)
    return "never", ()


def _model_options(model: Any) -> tuple[bool, str | None]:
    """(byte fallback, unknown token) of a BPE or Unigram model."""
    if hasattr(model, "unk_token"):
        return bool(model.byte_fallback), model.unk_token
    state = json.loads(model.__getstate__())
    return bool(state.get("byte_fallback")), None if state["unk_id"] is None else state["vocab"][state["unk_id"]][0]


def _writes_every_byte(pieces: list[bytes], byte_level: bool, byte_fallback: bool, vocabulary: dict[str, int]) -> bool:
    if byte_level:
        return len({piece for piece in pieces if len(piece) == 1}) == 256
    return byte_fallback and all(f"<0x{byte:02X}>" in vocabulary for byte in range(256))


def _byte_alphabet() -> dict[int, int]:
    """GPT-2's byte alphabet: code point of the visible character -> byte; a character outside it becomes
    U+FFFF, which Latin-1 cannot encode."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    alphabet = {code: 0xFFFF for code in hidden}
    return alphabet | {code: code for code in visible} | {256 + i: byte for i, byte in enumerate(hidden)}


_BYTE_ALPHABET = _byte_alphabet()


def _byte_level_piece(token: str) -> bytes:
    """A token outside the byte alphabet stands for its own text, as in the decoder of `tokenizers`."""
    try:
        return token.translate(_BYTE_ALPHABET).encode("latin-1")
    except UnicodeEncodeError:
        return token.encode()


def _metaspace_piece(token: str, byte_fallback: bool) -> bytes:
    if byte_fallback and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes.fromhex(token[3:5])
    return _spaces(token).encode()


def _spaces(token: str) -> str:
    return token.replace(METASPACE, " ")
