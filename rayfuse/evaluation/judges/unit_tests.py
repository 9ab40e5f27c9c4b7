"""Unit tests: 1 where a response's program passes the tests of its prompt in the sandbox; else 0."""

from __future__ import annotations

import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from rayfuse.config import UnitTests
from rayfuse.data.prompts import Prompt
from rayfuse.evaluation.sandbox import Limits, Sandbox

_FENCED = re.compile(r"^```[ \t]*(\w*)[^\n]*\n(.*?)^```", re.DOTALL | re.MULTILINE)


def program_of(response: str) -> str:
    """The program in a response: the longest fenced block of Python (or of no named language), else all of it."""
    blocks = [
        code for language, code in _FENCED.findall(response) if language.lower() in ("", "python", "python3", "py")
    ]
    return max(blocks, key=len) if blocks else response


class UnitTestsJudge:
    """Runs programs in sandboxes, `cpus` of them at a time."""

    def __init__(self, config: UnitTests) -> None:
        limits = Limits(config.seconds, config.memory_mb, config.processes, config.file_mb)
        self.sandbox = Sandbox(limits, must_isolate=config.isolation == "namespaces")
        self.threads = max(1, int(config.cpus))

    def __call__(self, pairs: Sequence[tuple[Prompt, str]]) -> list[float]:
        """The score of each pair, in order."""
        with ThreadPoolExecutor(self.threads) as pool:
            return list(pool.map(lambda pair: float(self.sandbox.passes(program_of(pair[1]), pair[0].tests)), pairs))
