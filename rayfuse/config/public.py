"""A configuration as it may be shown: without the paths of the machine it ran on."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from rayfuse.config import (
    Config,
)

PATH_KEYS = frozenset({"model", "tokenizer", "trust_remote_code", "gguf_file", "path", "output", "store"})
"""Keys of the configuration whose values may be local paths."""


def public_name(value: str) -> str:
    """A model, data set or folder as it may be published.

    Hub ids, plain names and remote URLs stay as they are (URLs without user, password and query); of a local folder or
    file only the last component is left.
    """
    scheme, separator, rest = value.partition("://")
    if separator and scheme not in ("file", "local"):
        host, slash, path = re.split(r"[?#]", rest, maxsplit=1)[0].partition("/")
        return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"
    local = rest if separator else value
    pieces = [piece for piece in re.split(r"[\\/]", local) if piece]
    is_hub_id = not separator and len(pieces) == 2 and re.match(r"[\w-]", local) and not Path(local).exists()
    return value if is_hub_id and "\\" not in value else (pieces or [value])[-1]


def public_config(config: Config) -> dict[str, Any]:
    """The resolved configuration with `public_name` for every path, and without where it happened to run.

    Of a teacher's endpoint the model's name is left: where a company's servers and secrets are is nobody's business.
    """
    tree = config.model_dump(mode="json", exclude={"cluster": True, "serving": {"http"}})
    for teacher in tree["teachers"]:
        if teacher["endpoint"] is not None:
            teacher["endpoint"] = {"model": teacher["endpoint"]["model"]}
    return {key: _public(key, value) for key, value in tree.items()}


def _public(key: str, value: Any) -> Any:
    if isinstance(value, dict):
        return {inner: _public(inner, item) for inner, item in value.items()}
    if isinstance(value, list):
        return [_public(key, item) for item in value]
    return public_name(value) if key in PATH_KEYS and isinstance(value, str) else value
