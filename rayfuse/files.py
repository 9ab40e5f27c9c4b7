"""Writing files so that they are there completely or not at all."""

from __future__ import annotations

from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Write a small file so that it is there completely or not at all."""
    beside = path.with_name(f".{path.name}.half")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)
