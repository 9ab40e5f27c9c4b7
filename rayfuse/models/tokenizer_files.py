"""Tokenizers as their makers ship them: what transformers turns into a fast tokenizer, and what is refused."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

from rayfuse.errors import ModelError

FAST = "tokenizer.json"
TEKKEN = "tekken.json"
SENTENCEPIECE = "tokenizer.model"
RANKS = re.compile(rb"[A-Za-z0-9+/]+=* \d+")
"""A line of a tiktoken file: a token in base64 and its rank."""


def read_tokenizer(source: str, arguments: dict[str, Any]) -> Any:
    """The tokenizer of a folder or hub id, whatever kind of file it is in.

    tokenizer.json, vocabularies with merges and SentencePiece's tokenizer.model are read by AutoTokenizer; tekken.json
    alone by transformers' converter, with the chat template that mistral-common has for its version.

    Raises:
        ModelError: the files do not say all that a tokenizer does.
    """
    from transformers import AutoTokenizer
    from transformers.utils import cached_file

    if arguments.get("gguf_file"):
        return AutoTokenizer.from_pretrained(source, **arguments)
    _refuse_unreadable(Path(source))
    found = {"revision": arguments.get("revision"), "_raise_exceptions_for_missing_entries": False}
    tekken = cached_file(source, TEKKEN, **found)
    if tekken is None:
        return AutoTokenizer.from_pretrained(source, **arguments)
    if cached_file(source, FAST, **found) is not None:
        # Where mistral-common is installed transformers prefers its own class, which is not a fast tokenizer.
        return AutoTokenizer.from_pretrained(source, mistral_format=False, **arguments)
    return _convert_tekken(source, tekken)


def _convert_tekken(source: str, tekken: str) -> Any:
    from transformers.integrations.mistral import convert_tekken_tokenizer

    templates = ("chat_template.jinja", "chat_template.json")
    has_template = any((Path(tekken).parent / name).is_file() for name in templates)
    if not has_template and importlib.util.find_spec("mistral_common") is None:
        raise ModelError(
            f"{source} has its tokenizer in {TEKKEN} alone, whose chat template only mistral-common knows: "
            f"pip install mistral-common, or add {FAST} and chat_template.jinja to the folder"
        )
    tokenizer = convert_tekken_tokenizer(tekken)
    tokenizer.name_or_path = source
    return tokenizer


def _refuse_unreadable(folder: Path) -> None:
    """Raises ModelError for a folder whose only tokenizer file does not say how a text is cut, or has another name."""
    if not folder.is_dir() or any((folder / name).is_file() for name in (FAST, TEKKEN, "vocab.json")):
        return
    ranks = sorted([*folder.glob("*.tiktoken"), *folder.glob("tiktoken.model"), *folder.glob(SENTENCEPIECE)])
    ranks = [path for path in ranks if _holds_ranks(path)]
    if ranks:
        raise ModelError(
            f"{folder} has its tokenizer in {ranks[0].name} alone, a tiktoken file: it has the tokens, but neither the "
            f"pattern that cuts a text nor the special tokens. Add {FAST} and tokenizer_config.json: take them from "
            "the maker's repository for transformers, or write the first with transformers.convert_slow_tokenizer."
            f"TikTokenConverter({ranks[0].name!r}, pattern=..., extra_special_tokens=[...]).converted()"
            f".save({FAST!r}), with the pattern and the tokens of the maker's code"
        )
    versions = sorted(folder.glob(f"{SENTENCEPIECE}.v*"))
    if versions and not (folder / SENTENCEPIECE).is_file():
        raise ModelError(
            f"{folder} has its tokenizer in {versions[-1].name}, a name that only mistral-common reads: "
            f"copy it to {SENTENCEPIECE} in the same folder"
        )


def _holds_ranks(path: Path) -> bool:
    with path.open("rb") as file:
        return RANKS.fullmatch(file.readline(4096).strip()) is not None


def require_fast(tokenizer: Any, name: str) -> Any:
    """The same tokenizer.

    Raises:
        ModelError: it is not a fast one, or has no vocabulary (transformers makes an empty one where files lack).
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(f"the tokenizer of {name} has no {FAST}; a fast tokenizer is needed")
    if len(tokenizer.get_vocab()) <= len(tokenizer.added_tokens_decoder):
        raise ModelError(
            f"the tokenizer of {name} has no vocabulary: its files lack. Add {FAST}, or set `tokenizer` to a folder "
            "or hub id that has it"
        )
    return tokenizer


def vocabulary_size(tokenizer: Any) -> int:
    """One more than the largest id that the tokenizer can produce; the model's padded rows lie above."""
    return max(tokenizer.get_vocab().values()) + 1


def valid_vocabulary(tokenizer: Any, rows: int | None) -> int:
    """Ids from here on are no tokens that the model predicts: padded rows, or tokens that have no row.

    A tokenizer may have more tokens than the model has rows, if they were added to it (gemma-3-1b's image token, the
    [PAD] of many fine-tunes): a text that does not hold one of them needs no row for it. The vocabulary that a
    tokenizer was made with must have its rows.

    Args:
        tokenizer: a fast tokenizer.
        rows: of the model's output layer; None: not known.

    Raises:
        ModelError: they do not belong together.
    """
    ids = tokenizer.get_vocab().values()
    size = max(ids) + 1
    if rows is None or size <= rows:
        return int(size)
    beyond = [index for index in ids if index >= rows]
    own = set(beyond) - set(tokenizer.added_tokens_decoder)
    if own or len(beyond) > len(ids) // 2:
        lack = f"{len(own)} tokens of its own vocabulary" if own else "most of its tokens"
        raise ModelError(
            f"the tokenizer has {size} tokens but the model predicts only {rows}: they do not belong together ({lack} "
            "have no row), or the embeddings were not resized"
        )
    return rows
