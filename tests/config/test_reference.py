"""docs/configuration.md says what the configuration classes say."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel

from rayfuse.config import STAGES, Config
from rayfuse.config.reference import _sections, configuration_page, meaning

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"


def _all_sections(section: type[BaseModel], seen: set[type[BaseModel]]) -> set[type[BaseModel]]:
    for field in section.model_fields.values():
        for inner, _ in _sections(field.annotation):
            if inner not in seen:
                _all_sections(inner, seen | {inner})
                seen.add(inner)
                seen |= _all_sections(inner, seen)
    return seen


def test_the_page_is_what_the_classes_say():
    assert PAGE.read_text(encoding="utf-8") == configuration_page(), (
        "write it again: python -m rayfuse.config.reference > docs/configuration.md"
    )


def test_every_key_is_on_the_page_and_says_what_it_does():
    page = configuration_page()
    sections = _all_sections(Config, {Config, *STAGES.values()})
    keys = [(section.__name__, key, field) for section in sections for key, field in section.model_fields.items()]
    assert len(keys) > 150
    assert not [f"{section}.{key}" for section, key, _ in keys if f"| `{key}` |" not in page]
    silent = [f"{s}.{k}" for s, k, field in keys if not meaning(field) and k not in ("method", "name")]
    assert not silent
