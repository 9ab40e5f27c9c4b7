"""A model's folder says where the model stops: at the token with which it was taught to end its turn."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from rayfuse.data.template import ChatTemplate

log = logging.getLogger(__name__)


def stop_at(folder: Path, tokenizer: Any, end_of_turn: int) -> None:
    """Make config.json, generation_config.json and the tokenizer in `folder` end a text at `end_of_turn`.

    A base model that is trained on a chat template still names another token, and would write on until it is cut. All
    tokens that ended a text before do so still. A template that ends its turns with plain text is left alone, with a
    warning: that text may be part of any response.

    Args:
        folder: a complete Hugging Face model.
        tokenizer: the model's tokenizer.
        end_of_turn: the token that the training put behind every response.
    """
    if end_of_turn not in {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}:
        log.warning(
            "the chat template ends a turn with the plain token %r: generation with %s does not stop there by itself",
            tokenizer.decode([end_of_turn]),
            folder,
        )
        return
    files = [folder / name for name in ("generation_config.json", "config.json") if (folder / name).exists()]
    trees = [json.loads(path.read_text(encoding="utf-8")) for path in files]
    ends = [end_of_turn, *(end for tree in trees for end in _ends(tree)), tokenizer.eos_token_id]
    ends = [end for end in dict.fromkeys(ends) if end is not None]
    for path, tree in zip(files, trees, strict=True):
        for part in (tree, tree.get("text_config")):
            if part is tree or (isinstance(part, dict) and "eos_token_id" in part):
                part["eos_token_id"] = ends if len(ends) > 1 else ends[0]
        path.write_text(json.dumps(tree, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if tokenizer.eos_token_id != end_of_turn:
        _stop_tokenizer_at(folder, tokenizer, end_of_turn)


def _ends(tree: dict[str, Any]) -> list[int]:
    found = tree.get("eos_token_id")
    text = tree.get("text_config")
    inner = _ends(text) if isinstance(text, dict) else []
    return [*(found if isinstance(found, list) else [found]), *inner]


def _stop_tokenizer_at(folder: Path, tokenizer: Any, end_of_turn: int) -> None:
    """Save the tokenizer with another eos_token, unless that changes what it makes of a text or a conversation."""
    template = ChatTemplate(tokenizer)
    turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello"}]

    def made() -> tuple[str, list[int]]:
        return template.render(turns, open_turn=False) if template.present else "", tokenizer.encode("Hello")

    before, eos = made(), tokenizer.eos_token
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end_of_turn)
    if made() == before:
        tokenizer.save_pretrained(folder)
    else:
        log.warning(
            "the tokenizer in %s keeps its eos_token %r: the model ends its turns with %r, but the chat template or "
            "the tokenizer writes eos_token elsewhere too",
            folder,
            eos,
            tokenizer.eos_token,
        )
    tokenizer.eos_token = eos
