"""`rayfuse check`: everything that can be wrong before a run, found in seconds and reported all at once.

Each check is a function that yields what it found; a fault says what is wrong, with which value, and what to do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain

from rich.console import Console

from rayfuse.check.data import check_data, check_evaluation, check_prefer, check_preferences
from rayfuse.check.finding import Finding
from rayfuse.check.machine import (
    check_engine,
    check_environments,
    check_machine,
    check_output,
    check_serving,
    check_store,
)
from rayfuse.check.models import check_models
from rayfuse.check.templates import check_templates
from rayfuse.config import Config
from rayfuse.errors import RayfuseError

PATIENCE_S = 5.0
"""How long a check asks a server that does not answer; a run waits for its `patience_s`."""


def check_config(config: Config, console: Console) -> list[Finding]:
    """Run all checks, print what they find, and return the faults (empty: the run can start)."""
    config = _impatient(config.absolute())
    findings = list(chain.from_iterable(_guarded(config, *item) for item in CHECKS.items()))
    for finding in findings:
        mark = "[bold red]fault [/]" if finding.fault else "[cyan]read  [/]" if finding.note else "[yellow]remark[/]"
        console.print(f"{mark} [bold]{finding.where}[/]: ", end="")
        console.print(finding.text, markup=False, highlight=False, soft_wrap=True)
    faults = [finding for finding in findings if finding.fault]
    if not faults:
        console.print(f"[green]ok[/]     {', '.join(CHECKS)}: nothing stands in the way of this run", soft_wrap=True)
    return faults


def _guarded(config: Config, name: str, check: Callable[[Config], Iterator[Finding]]) -> Iterator[Finding]:
    try:
        yield from check(config)
    except RayfuseError as error:
        yield Finding(name, str(error))


def _impatient(config: Config) -> Config:
    """The same, but a server that does not answer is not waited for, as a run would."""
    teachers = [
        teacher.model_copy(update={"patience_s": min(teacher.patience_s, PATIENCE_S)}) if teacher.endpoint else teacher
        for teacher in config.teachers
    ]
    return config.model_copy(update={"teachers": tuple(teachers)})


CHECKS: dict[str, Callable[[Config], Iterator[Finding]]] = {
    "output": check_output,
    "signals.store": check_store,
    "models": check_models,
    "templates": check_templates,
    "data": check_data,
    "preferences": check_preferences,
    "prefer": check_prefer,
    "evaluate": check_evaluation,
    "machine": check_machine,
    "engine": check_engine,
    "environments": check_environments,
    "serving": check_serving,
}
