"""Joining a cluster: every address that leads nowhere is given up in time, with what named it and what to do."""

import http.server
import socket
import threading
import time
from concurrent import futures

import grpc
import pytest
import ray
from ray._private import services
from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc

from rayfuse import cluster
from rayfuse.config import parse_config
from rayfuse.errors import RayfuseError

WAIT_S = 2.0


@pytest.fixture
def config(tmp_path, monkeypatch):
    """A run's configuration with this address, which no fixture or variable of the machine overrules."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)

    def with_address(address):
        tree = {"student": "s", "data": "d", "stages": ["sft"], "output": str(tmp_path)}
        return parse_config({**tree, "cluster": {"address": address, "connect_s": WAIT_S}})

    return with_address


def refused(config, message):
    """The connection fails with such a message, not long after the time it has."""
    begun = time.monotonic()
    with pytest.raises(RayfuseError, match=message) as raised:
        cluster.connect(config)
    assert time.monotonic() - begun < WAIT_S + 10
    assert not ray.is_initialized()
    assert "unset RAY_ADDRESS and cluster.address" in str(raised.value)
    return str(raised.value)


def _free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def test_a_cluster_that_is_gone(config):
    address = f"127.0.0.1:{_free_port()}"
    text = refused(config(address), rf"{address} \(named by cluster.address\): .*refused")
    assert "tried for 2 s (cluster.connect_s)" in text


def test_the_variable_that_names_a_cluster_is_said(config, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{_free_port()}")
    refused(config(None), r"\(named by RAY_ADDRESS\)")
    refused(config("auto"), r"\(named by RAY_ADDRESS\)")  # as Ray has it
    refused(config(f"127.0.0.1:{_free_port()}"), r"\(named by cluster.address\)")


def test_a_host_that_does_not_exist(config):
    refused(config("no-such-host.invalid:6379"), r"no-such-host\.invalid:6379 \(named by cluster.address\)")


@pytest.mark.parametrize("address", ["somewhere", "127.0.0.1:port", "127.0.0.1:0", "127.0.0.1:70000"])
def test_what_is_no_address(config, address):
    begun = time.monotonic()
    refused(config(address), r"HOST:PORT|[Ii]nvalid address")
    assert time.monotonic() - begun < WAIT_S


def test_auto_where_nothing_runs(config, monkeypatch, tmp_path):
    services.find_gcs_addresses.cache_clear()
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setattr("ray._private.services._find_address_from_flag", lambda flag: set())
    refused(config("auto"), r"auto \(named by cluster.address\): Could not find any running Ray")


def test_a_port_that_answers_something_else(config):
    server = http.server.ThreadingHTTPServer(("0.0.0.0", 0), http.server.BaseHTTPRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        refused(config(f"localhost:{server.server_port}"), r"cannot connect to the Ray cluster localhost")
    finally:
        server.shutdown()
        server.server_close()


def test_a_port_that_takes_a_connection_and_says_nothing(config):
    with socket.create_server(("0.0.0.0", 0)) as silent:
        refused(config(f"localhost:{silent.getsockname()[1]}"), r"tried for 2 s")


class Head(gcs_service_pb2_grpc.NodeInfoGcsServiceServicer):
    """A head node's answer to the question whether it is alive, and none of its nodes is here."""

    version = ray.__version__

    def CheckAlive(self, request, context):  # noqa: N802
        return gcs_service_pb2.CheckAliveReply(ray_version=self.version)

    def GetAllNodeInfo(self, request, context):  # noqa: N802
        return gcs_service_pb2.GetAllNodeInfoReply()


@pytest.fixture
def serve():
    """Serve a head (None: a gRPC server that is none); its address."""
    servers = []

    def start(head):
        server = grpc.server(futures.ThreadPoolExecutor(2))
        if head is not None:
            gcs_service_pb2_grpc.add_NodeInfoGcsServiceServicer_to_server(head, server)
        port = server.add_insecure_port("0.0.0.0:0")
        server.start()
        servers.append(server)
        return f"localhost:{port}"

    yield start
    for server in servers:
        server.stop(None)


def test_a_head_of_another_version(config, serve):
    class Old(Head):
        version = "2.9.3"

    begun = time.monotonic()
    refused(config(serve(Old())), rf"it runs Ray 2\.9\.3, and this process has Ray {ray.__version__}")
    assert time.monotonic() - begun < WAIT_S


def test_a_server_that_is_no_head(config, serve):
    refused(config(serve(None)), r"no head of a Ray cluster")


def test_a_cluster_that_this_machine_is_no_node_of(config, serve, monkeypatch):
    refused(config(serve(Head())), r"none of its nodes is on this machine")
    monkeypatch.setattr("ray._private.services.find_node_ids", lambda: {"ab" * 28})  # another cluster's
    refused(config(serve(Head())), r"none of its nodes is on this machine; run this on one of them")


def test_a_long_wait_is_announced(config, monkeypatch, caplog):
    monkeypatch.setattr("rayfuse.cluster.address.WORD_S", 0.5)
    refused(config(f"127.0.0.1:{_free_port()}"), "refused")
    assert [record.getMessage().partition(" 127")[0] for record in caplog.records] == ["waiting for the Ray cluster"]
