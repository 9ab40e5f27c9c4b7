"""A configuration as it may be shown: without the paths of the machine it ran on."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from rayfuse.config import Config


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
    public = config.with_paths(lambda _, path: public_name(path))
    tree = public.model_dump(mode="json", exclude={"cluster": True, "serving": {"http"}})
    for teacher in tree["teachers"]:
        if teacher["endpoint"] is not None:
            teacher["endpoint"] = {"model": public_name(teacher["endpoint"]["model"])}
    return tree
