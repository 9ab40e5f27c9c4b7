"""The configuration of a model's text: the model's own, or the section of it in a model of images or sound."""

from __future__ import annotations

from typing import Any


def text_config(config: Any) -> Any:
    """The part of a transformers configuration that describes the language model; every reader of a key asks this."""
    return config.get_text_config(decoder=True)


def context_length(config: Any) -> int | None:
    """Longest sequence the model was made for, where its configuration tells."""
    length = getattr(text_config(config), "max_position_embeddings", None)
    return int(length) if length else None
