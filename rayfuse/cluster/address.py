"""Joining a running cluster: what is wrong with its address is said within `cluster.connect_s`.

Ray alone tries for minutes, in C++ that cannot be interrupted, and may end the process. So its head is asked first
whether it is there, by the same call and channel (TLS, token) that Ray's own tools use, with a time limit.
"""

from __future__ import annotations

import logging
import time
from typing import Any, cast

import ray

from rayfuse.errors import RayfuseError

log = logging.getLogger(__name__)

ATTEMPT_S = 5.0
"""One attempt to reach the head; a name that does not resolve or a host that drops packets takes all of it."""
PAUSE_S = 0.5
WORD_S = 3.0
"""After so long without an answer a line says what is waited for."""


def join(address: str, named_by: str, seconds: float, **options: Any) -> None:
    """Connect this process to the cluster at `address`; `options` are ray.init's.

    Args:
        address: HOST:PORT of the head, `auto` for the cluster that runs on this machine, or ray://HOST:PORT.
        named_by: where the address comes from: `RAY_ADDRESS` or `cluster.address`.
        seconds: how long to try.

    Raises:
        RayfuseError: there is no cluster, or not one that this process can join; naming the address and `named_by`.
    """
    try:
        found = address if "://" in address else _find(address)
        if "://" not in address:
            _wait_for(found, f"{address} (named by {named_by})", seconds)
        ray.init(found, **options)
    except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
        ray.shutdown()
        raise RayfuseError(
            f"cannot connect to the Ray cluster {address} (named by {named_by}): {str(error).rstrip('.')}. Start one "
            "(ray start --head), mend the address, or run without a cluster: unset RAY_ADDRESS and cluster.address"
        ) from error


def _find(address: str) -> str:
    """HOST:PORT of an address as Ray reads it.

    Raises:
        ConnectionError: it is `auto`, and nothing runs here.
        ValueError: it is no HOST:PORT.
    """
    from ray._private.services import canonicalize_bootstrap_address

    found = canonicalize_bootstrap_address(address)
    port = (found or "").rpartition(":")[2]
    if found is None or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError("an address is HOST:PORT, with a port from 1 to 65535")
    return found


def _wait_for(address: str, name: str, seconds: float) -> None:
    """Return when the head at `address` (`name` in messages) answers and one of its nodes is this machine.

    Raises:
        TimeoutError: not within `seconds`, with what was last in the way.
        ConnectionError: what answers is not a head, refuses the token, or is of another version of Ray.
    """
    begun, said = time.monotonic(), False
    while True:
        left = begun + seconds - time.monotonic()
        obstacle = _obstacle(address, max(0.1, min(ATTEMPT_S, left)))
        if not obstacle:
            return
        waited = time.monotonic() - begun
        if waited + PAUSE_S > seconds:
            raise TimeoutError(f"{obstacle}; tried for {seconds:g} s (cluster.connect_s)")
        if not said and waited > WORD_S:
            log.warning("waiting for the Ray cluster %s: %s", name, obstacle)
            said = True
        time.sleep(PAUSE_S)


def _obstacle(address: str, seconds: float) -> str:
    """What is in the way for now, in words; empty where nothing is.

    Raises:
        ConnectionError: waiting would not help.
    """
    import grpc
    from ray._private.grpc_utils import init_grpc_channel
    from ray._private.ray_constants import GLOBAL_GRPC_OPTIONS
    from ray._private.services import find_node_ids
    from ray.core.generated import gcs_pb2, gcs_service_pb2, gcs_service_pb2_grpc

    messages: Any = gcs_service_pb2
    alive = cast(Any, gcs_pb2).GcsNodeInfo.GcsNodeState.ALIVE
    with init_grpc_channel(address, options=GLOBAL_GRPC_OPTIONS) as channel:
        nodes = gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel)
        try:
            version = nodes.CheckAlive(messages.CheckAliveRequest(), timeout=seconds).ray_version
            if version != ray.__version__:
                raise ConnectionError(
                    f"it runs Ray {version}, and this process has Ray {ray.__version__}: they must be equal"
                )
            here = [
                messages.GetAllNodeInfoRequest.NodeSelector(node_id=bytes.fromhex(node)) for node in find_node_ids()
            ]
            request = messages.GetAllNodeInfoRequest(node_selectors=here, state_filter=alive)
            if here and nodes.GetAllNodeInfo(request, timeout=seconds).node_info_list:
                return ""
        except grpc.RpcError as error:
            return _said(error)
    return (
        "its head answers, but none of its nodes is on this machine; run this on one of them (ray job submit), or make "
        "this machine one (ray start --address)"
    )


def _said(error: Any) -> str:
    """A failed call in words.

    Raises:
        ConnectionError: something answers, and will not answer better.
    """
    import grpc

    code, details = error.code(), error.details()
    if code in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
        raise ConnectionError(f"it refuses this process's token ({details}); is RAY_AUTH_TOKEN the cluster's?")
    if code == grpc.StatusCode.UNIMPLEMENTED:
        raise ConnectionError("what answers there is no head of a Ray cluster; is the port that of ray start --port?")
    return "no answer" if code == grpc.StatusCode.DEADLINE_EXCEEDED else f"{code.name.lower()}: {details}"
