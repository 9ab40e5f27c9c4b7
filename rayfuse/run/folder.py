"""The run folder: whose run it holds, and how long each part took."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from rayfuse.config import Config, config_json, parse_config
from rayfuse.errors import CheckpointError, ConfigError
from rayfuse.files import write_whole

log = logging.getLogger(__name__)

NOT_THE_RESULT = (
    "output",  # the folder may have been moved
    "evaluate*",
    "cluster.*",
    "prefer*",
    "serving.mode",
    "serving.max_dropped",
    "serving.http*",
    "student.prefetch",
    "student.max_failures",
    "student.save_dtype",
    "student.workers",  # the global batches stay the same, and so does the result but for the order of sums
    "student.zero_stage",
    "student.offload",
    "student.shape*",
    "stages.*.save_every",
    "stages.*.keep",
    "stages.*.merge.parallel",
    "teachers.*.replicas.*",
    "teachers.*.shape*",
    "teachers.*.patience_s",
    "teachers.*.unit_timeout_s",
    "teachers.*.parity.*",
    "teachers.*.endpoint.api_key_*",
    "teachers.*.endpoint.ca_file",
    "teachers.*.endpoint.insecure",
    "teachers.*.endpoint.timeout_s",
    "teachers.*.endpoint.max_*",
)
"""Keys that a resumed run may change: they decide how, when and where it works, and not what comes out."""

NAMED = 6
"""Changed keys that an error names."""


def open_run_folder(config: Config, resume: bool) -> None:
    """Create the run folder with config.json, or make sure that the one there is of this configuration.

    Raises:
        CheckpointError: there is a run and `resume` was not asked for, or it is another run's.
    """
    folder = Path(config.output)
    there = folder / "config.json"
    text = config_json(config)
    if there.exists() and (folder / "stages").exists():  # a run that trained nothing has nothing to lose
        if not resume:
            raise CheckpointError(f"{folder} already holds a run: go on with --resume, or use another `output`")
        changed = changed_keys(_before(there), json.loads(text))
        if changed:
            each = [f"{key} was {before} and is {now}" for key, (before, now) in sorted(changed.items())]
            said = "; ".join(each[:NAMED]) + (f"; and {len(each) - NAMED} more" if len(each) > NAMED else "")
            raise CheckpointError(
                f"{folder} holds a run with another configuration ({said}): undo the change, or use another `output`"
            )
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(there, text)


def changed_keys(before: Any, now: Any) -> dict[str, tuple[str, str]]:
    """The keys of two resolved configurations that differ and change the result, with both values as JSON."""
    old, new = dict(_leaves(before, "")), dict(_leaves(now, ""))
    keys = (key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    return {
        key: (old.get(key, "not there"), new.get(key, "not there"))
        for key in keys
        if not any(fnmatch(key, pattern) for pattern in NOT_THE_RESULT)
    }


def _leaves(tree: Any, key: str) -> Iterator[tuple[str, str]]:
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    if not items:
        yield key, json.dumps(tree)
    for name, value in items:
        yield from _leaves(value, f"{key}.{name}" if key else str(name))


def _before(path: Path) -> Any:
    """The configuration that a run began with, resolved again: keys that are new since have their defaults.

    Raises:
        CheckpointError: the file cannot be read, or is not a configuration of this version.
    """
    try:
        return json.loads(config_json(parse_config(json.loads(path.read_text(encoding="utf-8")), str(path))))
    except (OSError, ValueError, ConfigError) as error:
        raise CheckpointError(
            f"{path} is damaged, or of another version of rayfuse, so nobody can tell whose run this is ({error}); use "
            "another `output`"
        ) from error


class Stopwatch:
    """Seconds of each part of a run, kept in `times.json`, so that those of a resumed run add up."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seconds = _times(path)

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Measure what runs inside."""
        begun = time.monotonic()
        try:
            yield
        finally:
            self.seconds[part] = round(self.seconds.get(part, 0.0) + time.monotonic() - begun, 2)
            write_whole(self.path, json.dumps(self.seconds, indent=2) + "\n")


def _times(path: Path) -> dict[str, float]:
    """The times of the run so far. A damaged file costs these numbers and nothing else."""
    if not path.exists():
        return {}
    try:
        return {str(part): float(seconds) for part, seconds in json.loads(path.read_text(encoding="utf-8")).items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        log.warning("%s is damaged and is begun anew: %s", path, error)
        return {}
