"""Nodes that come and go while teachers answer: on a cluster of several raylets on this machine."""

import threading
import time

import pytest
import ray
from ray import serve
from ray.cluster_utils import Cluster
from ray.core.generated import autoscaler_pb2

from rayfuse.config import Data, parse_config
from rayfuse.data.rows import read_samples
from rayfuse.teachers.identity import IdentifiedTeacher, fingerprint
from rayfuse.teachers.serving import wishes
from rayfuse.teachers.serving.applications import application_name, borrowed
from rayfuse.teachers.serving.client import TeacherClient

K = 5
# A lost node is found out within seconds instead of minutes.
SYSTEM = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 5000,
    "health_check_failure_threshold": 6,
}


@pytest.fixture
def cluster(monkeypatch):
    """A head with room for one copy."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "_system_config": SYSTEM})
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    ray.init(cluster.address, logging_level="ERROR", log_to_driver=False)
    yield cluster
    serve.shutdown()
    ray.shutdown()
    cluster.shutdown()


def _running(name):
    (deployment,) = serve.status().applications[name].deployments.values()
    return deployment.replica_states.get("RUNNING", 0)


def _wait(condition, what, seconds=400):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.5)


def _drain(node, seconds):
    """Tell the cluster that a node will be taken away, as a cloud's spot notice or the autoscaler does."""
    client = ray._raylet.GcsClient(address=ray.get_runtime_context().gcs_address)
    reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    accepted, message = client.drain_node(node.node_id, reason, "test", int((time.time() + seconds) * 1000))
    assert accepted, message


@pytest.mark.slow
@pytest.mark.chaos
def test_nodes_add_copies_are_drained_and_may_be_lost(tiny, tmp_path, cluster):
    """One flow of units through all of it: every unit is answered, always with the same bits."""
    replicas = {"max": 3, "idle_s": 600, "upscale_s": 0}
    teacher = parse_config(tiny.tree(tmp_path)).teachers[0]
    teacher = teacher.model_copy(update={"replicas": teacher.replicas.model_validate(replicas)})
    named = IdentifiedTeacher(teacher, fingerprint(teacher, K))
    name = application_name(named)
    samples = read_samples(Data(path=str(tiny.root / "train.jsonl"), limit=8))[0]
    with borrowed([named], K):
        expected = [item.logps.tobytes() for item in TeacherClient(named).score(samples)()]
        over, answered, wrong = threading.Event(), [0], []

        def flow():
            client = TeacherClient(named)
            while not over.is_set():
                waits = [client.score(samples) for _ in range(3)]
                for wait in waits:
                    if [item.logps.tobytes() for item in wait()] != expected:
                        wrong.append(answered[0])
                    answered[0] += 1

        threads = [threading.Thread(target=flow) for _ in range(3)]
        for thread in threads:
            thread.start()
        try:
            _wait(lambda: answered[0] > 5, "no unit is answered")
            assert _running(name) == 1, "the head has room for one copy"
            first = cluster.add_node(num_cpus=1)
            _wait(lambda: _running(name) == 2, "a new node must bring a copy without anybody doing anything")
            second = cluster.add_node(num_cpus=1)
            _wait(lambda: _running(name) == 3, "a second node must bring another")

            before = answered[0]
            _drain(first, 60)
            _wait(lambda: _running(name) == 2, "the copy on a draining node must go")
            cluster.remove_node(first)
            _wait(lambda: answered[0] > before + 9, "units must go on being answered after a node was drained")

            before = answered[0]
            cluster.remove_node(second, allow_graceful=False)
            _wait(lambda: _running(name) == 1, "the copy of a lost node must be gone")
            _wait(lambda: answered[0] > before + 9, "units must go on being answered after a node was lost")
        finally:
            over.set()
            for thread in threads:
                thread.join()
    assert not wrong
    assert wishes.wishes(name) == {}
