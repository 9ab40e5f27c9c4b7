"""Teachers as applications of a Serve configuration file, for a RayService or `serve deploy`.

    python -m rayfuse.teachers.serving.shared CONFIG [a.b=value ...]

prints that file for a configuration's teachers. The applications have the names that runs look for, so that a run which
asks the same teachers for the same answers uses these.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict
from ray import serve

from rayfuse import cluster
from rayfuse.config import Config, load_config
from rayfuse.errors import ConfigError
from rayfuse.teachers.identity import identify
from rayfuse.teachers.serving.applications import application_name
from rayfuse.teachers.serving.replica import TeacherReplica

BUILDER = "rayfuse.teachers.serving.shared:application"


class Arguments(BaseModel):
    """What the file says of an application: the run's configuration, as every node reads it, and which teacher."""

    model_config = ConfigDict(extra="forbid")

    config: str
    teacher: str
    overrides: list[str] = []


def application(args: Arguments) -> Any:
    """The Serve application of one teacher.

    Raises:
        ConfigError: the configuration is wrong, or has no such teacher that runs here.
    """
    config = load_config(args.config, args.overrides).absolute()
    found = [teacher for teacher in config.teachers if teacher.name == args.teacher and teacher.stored is None]
    if not found:
        names = ", ".join(str(teacher.name) for teacher in config.teachers if teacher.stored is None)
        raise ConfigError(f"{args.config} has no teacher {args.teacher!r} to serve; it has: {names or 'none'}")
    (teacher,) = found
    options = cluster.teacher_deployment(teacher)
    deployment: Any = serve.deployment(TeacherReplica, name=teacher.name, **options)  # type: ignore[call-overload]
    return deployment.bind(teacher, config.signals.k)


def serve_config(path: str, config: Config, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The Serve configuration of all live teachers. Their weights are hashed for it, where they are in folders.

    Args:
        path: of the configuration, on the cluster.
        config: its content.
        overrides: changes to the file.
    """
    live = [teacher for teacher in config.absolute().teachers if teacher.stored is None]
    applications = [
        {
            "name": application_name(identified),
            "import_path": BUILDER,
            "args": {
                "config": path,
                "teacher": identified.name,
                **({"overrides": list(overrides)} if overrides else {}),
            },
        }
        for identified in identify(live, config.signals.k)
    ]
    return {"proxy_location": "Disabled", "applications": applications}


def main(arguments: Sequence[str]) -> None:
    """Print the Serve configuration of the file that is named."""
    if not arguments:
        raise ConfigError("name the run's YAML file: python -m rayfuse.teachers.serving.shared CONFIG")
    path, *overrides = arguments
    made = serve_config(str(Path(path).absolute()), load_config(path, overrides), overrides)
    print(yaml.safe_dump(made, sort_keys=False), end="")


if __name__ == "__main__":
    main(sys.argv[1:])
