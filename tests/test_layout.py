"""The import graph of the package: no circle, and no folder that knows one above it."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "rayfuse"
LAYERS = (
    ("errors", "config", "batch", "metrics", "files"),
    ("alignment", "signals", "losses"),
    ("models", "data", "report", "web", "cluster"),
    ("stages", "export"),
    ("teachers",),
    ("evaluation", "prepare"),
    ("consensus", "plan", "student"),
    ("check", "service"),
    ("run",),
    ("prefer", "quickstart"),
    ("cli", "compare"),
)
"""Folders and files directly in the package, from the bottom up; the folders of one layer may know each other."""
ENTRIES = 28
"""More than this at the top of the package is more than a newcomer reads."""


def _modules() -> dict[str, Path]:
    return {
        ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
        for path in PACKAGE.rglob("*.py")
    }


def _imports(path: Path, modules: dict[str, Path], *, at_start: bool) -> set[str]:
    """Modules of the package that a file imports: all, or those that its own import needs."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = list(tree.body) if at_start else list(ast.walk(tree))
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {
                name if (name := f"{node.module}.{alias.name}") in modules else node.module for alias in node.names
            }
    return found & modules.keys()


def _top(module: str) -> str:
    return module.partition(".")[2].partition(".")[0]


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    """Module -> the modules of the package that it imports, anywhere in its code."""
    modules = _modules()
    return {name: _imports(path, modules, at_start=False) - {name} for name, path in modules.items()}


def _circle(graph: dict[str, set[str]]) -> list[str]:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_no_module_imports_itself_in_a_circle(graph):
    assert not _circle(graph)


def test_no_folder_imports_itself_in_a_circle(graph):
    folders: dict[str, set[str]] = {}
    for module, imported in graph.items():
        folders.setdefault(_top(module), set()).update(_top(other) for other in imported)
    assert not _circle({folder: others - {folder} for folder, others in folders.items()})


def test_no_folder_knows_one_above_it(graph):
    level = {name: number for number, layer in enumerate(LAYERS) for name in layer}
    upward = [
        f"{module} -> {other}"
        for module, imported in graph.items()
        for other in imported
        if _top(module) and _top(other) and level[_top(other)] > level[_top(module)]
    ]
    assert not upward


def test_the_top_of_the_package_fits_a_screen():
    entries = {path.stem for path in PACKAGE.iterdir() if path.is_dir() or path.suffix == ".py"}
    entries = {name for name in entries if not name.startswith("__")}
    assert len(entries) <= ENTRIES
    assert entries <= {name for layer in LAYERS for name in layer}


@pytest.mark.parametrize(
    ("graph", "circle"), [({"a": {"b"}, "b": {"a"}}, True), ({"a": {"b"}, "b": set()}, False)], ids=["circle", "chain"]
)
def test_a_circle_is_found(graph, circle):
    assert bool(_circle(graph)) is circle
