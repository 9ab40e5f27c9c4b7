"""`rayfuse plan`: from a configuration and a description of the hardware to a plan and, where asked for, a new file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from rayfuse.config import Config, apply_override, parse_config
from rayfuse.config.loading import load_tree
from rayfuse.errors import PlanError
from rayfuse.files import write_whole
from rayfuse.plan.estimate import Plan
from rayfuse.plan.hardware import GPUS, Hardware, named_gpus, read_cluster, this_machine


def chosen_hardware(config: Config, gpus: int | None, gpu: str | None, cluster: Path | None) -> Hardware:
    """The hardware that the command names; without any, this machine, or its GPUs where the run asks for them.

    Raises:
        PlanError: two ways to name it at once, a name that is not known, or GPUs that this machine does not have.
    """
    if cluster is not None:
        if gpus is not None or gpu is not None:
            raise PlanError("--cluster says which GPUs there are: leave out --gpus and --gpu")
        return read_cluster(cluster)
    asks = config.student.gpus or any(teacher.gpus for teacher in config.teachers)
    if gpus is None and gpu is None and not asks:
        return this_machine(max(1, int(config.student.cpus)), config.student.workers)
    if gpu is None:
        gpu = _gpu_of_this_machine()
    needed = config.student.workers * config.student.gpus
    return named_gpus(gpus if gpus is not None else max(1, needed), gpu)


def _gpu_of_this_machine() -> str:
    import torch

    known = ", ".join(GPUS)
    if not torch.cuda.is_available():
        raise PlanError(f"this run asks for GPUs, and this machine has none: name some, --gpu h100 ({known})")
    name = torch.cuda.get_device_name().lower().replace(" ", "")
    found = next((key for key in sorted(GPUS, key=len, reverse=True) if key.replace("-", "") in name), None)
    if found is None:
        raise PlanError(f"the GPU {torch.cuda.get_device_name()} is not known: describe it by --cluster FILE, or --gpu")
    return found


def write_fit(plan: Plan, config: Path, overrides: Sequence[str], path: Path) -> None:
    """Write the configuration with the settings that the plan chose; it is checked before it is written.

    Raises:
        PlanError: no setting makes the student fit.
        ConfigError: the settings break a rule of the configuration.
    """
    if plan.chosen is None:
        raise PlanError("no setting makes the student fit, so there is nothing to write")
    tree: dict[str, Any] = load_tree(config, overrides)
    for key, value in plan.choice.items():
        apply_override(tree, f"{key}={yaml.safe_dump(value).removesuffix('...').strip()}")
    parse_config(tree, str(path))
    text = yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=120)
    write_whole(path, (f"# {config.name} as planned for {plan.hardware}.\n" + text).encode())
