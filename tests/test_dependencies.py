"""What the package imports is what pyproject.toml declares."""

from __future__ import annotations

import ast
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
IN_EXTRAS = {"vllm", "deepspeed", "gguf", "crowdkit"}
"""Imported only where the configuration names an engine or a format that needs them, or where a test finds them."""


def _imported(folder: Path) -> set[str]:
    found = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.add(node.module.partition(".")[0])
    own = {"rayfuse", "tests", "jobs", *(path.stem for path in (ROOT / "jobs").rglob("*.py"))}
    return found - own - set(sys.stdlib_module_names)


def _declared(*extras: str) -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [*project["dependencies"], *(line for extra in extras for line in project["optional-dependencies"][extra])]
    return {canonicalize_name(Requirement(line).name) for line in lines}


@pytest.mark.parametrize(("folder", "extras"), [("rayfuse", ()), ("tests", ("dev", "eval"))])
def test_every_import_is_declared(folder, extras):
    known = packages_distributions()
    missing = {
        name
        for name in _imported(ROOT / folder) - IN_EXTRAS
        if not {canonicalize_name(one) for one in known.get(name, [name])} & _declared(*extras)
    }
    assert not missing
