"""How many copies of a shared teacher there may be: what everyone who uses it wishes, kept on the cluster.

Each run (by its Ray job) and `rayfuse teachers CONFIG up` leave a wish (min, max) for the teacher's application in the
cluster's key-value table; the application gets the largest of each. A wish counts as long as its run is alive: the
copies of a killed run find out at their next health check, and give up what only that run wanted. A number set with
`rayfuse teachers CONFIG scale NAME N` goes before all wishes. Only Serve's autoscaling bounds change: the name of the
application, and the copies that run, stay.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import ray
from ray.experimental import internal_kv

KEPT = "kept"
"""Holder of the wish that `up` leaves, which no run's end takes away."""
PINNED = "pinned"
"""Holder of the number that `scale` sets."""
_NAMESPACE = b"rayfuse"
Wishes = dict[str, tuple[int, int]]


def this_run(purpose: str = "train") -> str:
    """The holder that stands for this process's Ray job and what it uses the teacher for."""
    return f"{ray.get_runtime_context().get_job_id()}.{purpose}"


def wish(application: str, holder: str, low: int, high: int) -> None:
    """Leave or change a wish; `resize` brings it about."""
    internal_kv._internal_kv_put(f"{application}/{holder}", json.dumps([low, high]), namespace=_NAMESPACE)


def withdraw(application: str, holder: str) -> None:
    """Take a wish back, if there is one."""
    internal_kv._internal_kv_del(f"{application}/{holder}", namespace=_NAMESPACE)


def wishes(application: str) -> Wishes:
    """The wishes for an application that count, by holder."""
    dead = _dead(application)
    return {holder: wish for holder, wish in _entries(application) if holder not in dead}


def _dead(application: str) -> list[str]:
    """Holders that are runs which have ended."""
    ended = {job["JobID"] for job in _jobs() if job["IsDead"]}
    return [holder for holder, _ in _entries(application) if holder.partition(".")[0] in ended]


def bounds(wanted: Mapping[str, tuple[int, int]]) -> tuple[int, int]:
    """The smallest and largest number of copies that follow from the wishes; (0, 1) where there are none."""
    if PINNED in wanted:
        return wanted[PINNED]
    return max((low for low, _ in wanted.values()), default=0), max((high for _, high in wanted.values()), default=1)


def resize(application: str) -> tuple[int, int] | None:
    """Give a running application the bounds that follow from the wishes; None where there is no such application.

    Its copies are not restarted: the deployment keeps its version, and only its autoscaling bounds change.
    """
    dead = _dead(application)
    low, high = bounds(wishes(application))
    client = _client()
    for identity, (info, _) in ray.get(client._controller.list_deployments_internal.remote()).items():
        if identity.app_name != application:
            continue
        now = info.deployment_config.autoscaling_config
        if now is not None and (now.min_replicas, now.max_replicas) != (low, high):
            new = info.deployment_config.model_copy(deep=True)
            new.autoscaling_config.min_replicas, new.autoscaling_config.max_replicas = low, high
            _apply(client, application, identity.name, new, info)
        for holder in dead:  # only now: who finds none may rely on it that the bounds are right
            withdraw(application, holder)
        return low, high
    return None


def outlive(application: str) -> None:
    """Called by the application's own copies: where a run has ended without a word, give up what only it wanted."""
    if _dead(application):
        resize(application)


def _apply(client: Any, application: str, name: str, config: Any, info: Any) -> None:
    """Deploy what is deployed already, with another configuration. Serve has no public call for it."""
    from ray.serve._private.build_app import BuiltApplication
    from ray.serve.deployment import Deployment

    deployment = Deployment(name, config, info.replica_config, version=info.version, _internal=True)
    built = BuiltApplication(
        name=application,
        route_prefix=None,
        logging_config=None,
        ingress_deployment_name=name,
        deployments=[deployment],
        deployment_handles={},
        external_scaler_enabled=False,
    )
    client.deploy_applications([built], wait_for_applications_running=False)


def forget(application: str) -> None:
    """Remove all wishes for an application that is removed."""
    internal_kv._internal_kv_del(f"{application}/", del_by_prefix=True, namespace=_NAMESPACE)


def _entries(application: str) -> Iterator[tuple[str, tuple[int, int]]]:
    for key in internal_kv._internal_kv_list(f"{application}/", namespace=_NAMESPACE):
        value = internal_kv._internal_kv_get(key, namespace=_NAMESPACE)
        if value is not None:
            low, high = json.loads(value)
            yield key.decode().rpartition("/")[2], (int(low), int(high))


def _jobs() -> list[dict[str, Any]]:
    from ray._private.state import jobs  # ray.util.state needs the dashboard, which an embedded cluster has not

    found: list[dict[str, Any]] = jobs()
    return found


def _client() -> Any:
    from ray.serve.context import _get_global_client

    return _get_global_client()
