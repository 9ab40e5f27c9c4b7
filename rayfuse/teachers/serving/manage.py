"""`rayfuse teachers`: teachers kept apart from any run, so that several runs share them.

up       deploy the configuration's teachers; their `replicas.min` copies stay until `down`
status   what each of them is doing
scale    exactly N copies of one of them, whatever runs wish; 0: elastic again
down     remove them
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ray import serve
from rich.console import Console
from rich.table import Table

from rayfuse import cluster
from rayfuse.config import Config, Teacher
from rayfuse.errors import ConfigError, TeacherError
from rayfuse.teachers.identity import IdentifiedTeacher, fingerprint
from rayfuse.teachers.serving import applications, wishes

SHORT_PATIENCE_S = 5.0
"""How long `status` and `down` wait for an endpoint that does not answer."""


@cluster.session()
def manage(config: Config, action: str, arguments: Sequence[str], console: Console) -> None:
    """Do one of ACTIONS.

    Args:
        config: whose teachers.
        action: up, down, status or scale.
        arguments: of `scale`: the teacher's name and the number of copies.
        console: where the answer goes.

    Raises:
        ConfigError: no such action, no cluster to keep teachers on, or arguments that do not fit.
        TeacherError: a teacher cannot start, or is not up; an endpoint is away (`status` and `down` leave it out).
    """
    if action not in ACTIONS:
        raise ConfigError(f"there is no action {action!r}; there are: {', '.join(ACTIONS)}")
    if arguments and action != "scale":
        raise ConfigError(f"{action} takes no arguments, got {' '.join(arguments)}")
    config = config.absolute()
    wanted = [teacher for teacher in config.teachers if teacher.stored is None]
    if action == "scale":  # what the others are is not asked: one of them may be away
        wanted = [_named(wanted, arguments)]
    if cluster.connect(config):
        raise ConfigError(
            "teachers can only be kept on a running Ray cluster, and an embedded one ends with this command: start one "
            "(ray start --head) and set RAY_ADDRESS or cluster.address"
        )
    applications.start_serve()
    teachers = _identified(wanted, config.signals.k, action in ("status", "down"), console)
    ACTIONS[action](config, teachers, arguments, console)


def _identified(
    wanted: Sequence[Teacher], k: int, without_absent: bool, console: Console
) -> Sequence[IdentifiedTeacher]:
    """The teachers with their fingerprints; `without_absent`: an endpoint that is away is named and left out."""
    teachers = []
    for teacher in wanted:
        asked = teacher.model_copy(update={"patience_s": SHORT_PATIENCE_S}) if without_absent else teacher
        try:
            teachers.append(IdentifiedTeacher(teacher, fingerprint(asked, k)))
        except TeacherError as error:
            if not without_absent:
                raise
            console.print(f"{teacher.name} is left out: {error}", highlight=False)
    return teachers


def _up(config: Config, teachers: Sequence[IdentifiedTeacher], _: Sequence[str], console: Console) -> None:
    applications.deploy(teachers, config.signals.k, holder=wishes.KEPT)
    console.print(status_table(teachers))


def _down(config: Config, teachers: Sequence[IdentifiedTeacher], _: Sequence[str], console: Console) -> None:
    users = {
        teacher.name: [holder for holder in wishes.wishes(applications.application_name(teacher)) if _is_run(holder)]
        for teacher in teachers
    }
    used = {name: runs for name, runs in users.items() if runs}
    if used:
        who = "; ".join(f"{name}: {len(runs)} (job {', '.join(runs)})" for name, runs in used.items())
        raise TeacherError(f"runs are using these teachers, end them first: {who}")
    applications.delete(teachers)
    console.print(f"removed {', '.join(teacher.name for teacher in teachers) or 'nothing'}")


def _named(teachers: Sequence[Teacher], arguments: Sequence[str]) -> Teacher:
    """The teacher that the arguments of `scale` are about."""
    if len(arguments) != 2 or not arguments[1].isdecimal():
        raise ConfigError(
            f"scale takes a teacher's name and a number of copies, got {' '.join(arguments) or 'nothing'}"
        )
    by_name = {teacher.name: teacher for teacher in teachers}
    if arguments[0] not in by_name:
        raise ConfigError(f"there is no teacher {arguments[0]!r}; there are: {', '.join(by_name)}")
    return by_name[arguments[0]]


def _scale(config: Config, teachers: Sequence[IdentifiedTeacher], arguments: Sequence[str], console: Console) -> None:
    (teacher,) = teachers
    name, copies = arguments[0], int(arguments[1])
    application = applications.application_name(teacher)
    if copies:
        wishes.wish(application, wishes.PINNED, copies, copies)
    else:
        wishes.withdraw(application, wishes.PINNED)
    if wishes.resize(application) is None:
        wishes.forget(application)
        raise TeacherError(f"teacher {name} is not up; start it with: rayfuse teachers CONFIG up")
    console.print(status_table([teacher]))


def _status(config: Config, teachers: Sequence[IdentifiedTeacher], _: Sequence[str], console: Console) -> None:
    console.print(status_table(teachers))


def status_table(teachers: Sequence[IdentifiedTeacher]) -> Table:
    """One row per teacher: what its copies do, how many there may be, and who wants them."""
    table = Table("teacher", "state", "copies", "bounds", "held by", "application")
    running = serve.status().applications
    for teacher in teachers:
        name = applications.application_name(teacher)
        application = running.get(name)
        if application is None:
            table.add_row(teacher.name, "not up", "", "", "", name)
            continue
        current = wishes.wishes(name)
        low, high = wishes.bounds(current)
        table.add_row(teacher.name, *_copies(application), f"{low}..{high}", _holders(current), name)
    return table


def _copies(application: Any) -> tuple[str, str]:
    states: dict[str, int] = {}
    for deployment in application.deployments.values():
        for state, count in deployment.replica_states.items():
            states[state.lower()] = states.get(state.lower(), 0) + count
    return application.status.lower(), ", ".join(f"{count} {state}" for state, count in states.items()) or "0"


def _is_run(holder: str) -> bool:
    return holder not in (wishes.KEPT, wishes.PINNED)


def _holders(current: wishes.Wishes) -> str:
    runs = sum(map(_is_run, current))
    parts = [f"{runs} run{'s' * (runs > 1)}"] if runs else []
    parts += ["up"] if wishes.KEPT in current else []
    parts += ["scale"] if wishes.PINNED in current else []
    return ", ".join(parts) or "nobody"


ACTIONS: dict[str, Callable[[Config, Sequence[IdentifiedTeacher], Sequence[str], Console], None]] = {
    "up": _up,
    "down": _down,
    "status": _status,
    "scale": _scale,
}
