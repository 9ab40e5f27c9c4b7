"""From a YAML file and overrides to a Config, with every fault named."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from rayfuse.config.run import Config
from rayfuse.config.section import Section, sections_in
from rayfuse.config.stages import STAGES
from rayfuse.errors import ConfigError


class _UniqueKeys(yaml.SafeLoader):
    """Plain YAML in which a key that stands twice in a section is an error; YAML itself silently keeps the last."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.MarkedYAMLError(
                        problem=f"the key {key.value!r} stands twice", problem_mark=key.start_mark
                    )
                seen.add(key.value)
        return node


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read and check a run's YAML file.

    Args:
        path: the YAML file. Relative paths in it are relative to the folder the command runs in.
        overrides: `a.b=value` strings; a list is entered by number (`teachers.0.dtype=float32`).

    Raises:
        ConfigError: the file cannot be read, is not YAML, or breaks the schema; every fault is named.
    """
    return parse_config(load_tree(path, overrides), str(path))


def load_tree(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The keys and values of a run's YAML file, overrides applied, and not checked yet; see `load_config`."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the configuration {path}: {error}") from error
    try:
        tree = yaml.load(text, _UniqueKeys)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold keys and values (student, data, stages, output ...), not {tree!r:.80}")
    for override in overrides:
        apply_override(tree, override)
    return tree


def parse_config(tree: dict[str, Any], where: str = "configuration") -> Config:
    """Check a configuration that is already a tree of dicts and lists; see `load_config`."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_explain(error, where)) from None


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Set one `a.b=value` in the tree, in place; `value` is read as YAML.

    Raises:
        ConfigError: no `=`, or the path runs through something that is not a mapping or a list.
    """
    key, separator, text = override.partition("=")
    parts = key.split(".")
    if not separator or not all(parts):
        raise ConfigError(f"override {override!r} is not of the form a.b=value")
    try:
        value = yaml.load(text, _UniqueKeys)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: the value is not valid YAML: {error}") from error
    node: Any = tree
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        if isinstance(node, list):
            if not part.isdecimal() or int(part) >= len(node):
                raise ConfigError(
                    f"override {override!r}: {part!r} is not one of the list's entries 0..{len(node) - 1}"
                )
            index: Any = int(part)
        elif isinstance(node, dict):
            index = part
        else:
            raise ConfigError(f"override {override!r}: {'.'.join(parts[:depth])} is not a section")
        if last:
            node[index] = value
            return
        child = node[index] if isinstance(node, list) else node.get(index)
        if child is None:
            child = {}
        elif isinstance(child, str):
            # `student: some/model` is short for a section: the override opens it.
            child = {_shorthand(parts[: depth + 1]): child}
        node[index] = child
        node = child


def _shorthand(path: Sequence[str]) -> str:
    """The key that a bare text at this place of the configuration stands for."""
    kinds: list[type[Section]] = [Config]
    for part in path:
        fields = [kind.model_fields[part] for kind in kinds if part in kind.model_fields]
        kinds = kinds if part.isdecimal() else [inner for field in fields for inner in sections_in(field.annotation)]
    return next((kind.shorthand for kind in kinds if kind.shorthand), "model")


def config_json(config: Config) -> str:
    """The resolved configuration as JSON, every default filled in. It holds no secrets: there is no key for one."""
    return json.dumps(config.model_dump(mode="json"), indent=2) + "\n"


def _explain(error: ValidationError, where: str) -> str:
    """One line per fault: the key, what is wrong, and the value."""
    lines = []
    for fault in error.errors():
        # A stage's tag appears in pydantic's path but not in the file: `stages.0.sft.steps`.
        path = [str(part) for part in fault["loc"]]
        if len(path) > 2 and path[0] == "stages" and path[2] in STAGES:
            del path[2]
        message = fault["msg"].removeprefix("Value error, ")
        if fault["type"] == "extra_forbidden":
            message = "there is no such key"
        elif fault["type"] == "missing":
            message = "is missing"
        elif fault["type"] != "value_error":
            message += f" (is {fault['input']!r:.80})"
        lines.append(f"  {'.'.join(path) or 'the file'}: {message}")
    return f"{where} has {len(lines)} fault{'s' * (len(lines) > 1)}:\n" + "\n".join(lines)
