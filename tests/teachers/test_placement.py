"""Where teachers and students run: on a cluster of a head and two labelled nodes on this machine."""

import pytest
import ray
from ray import serve
from ray.cluster_utils import Cluster
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.util.state import list_actors

from rayfuse import cluster as options
from rayfuse.config import Data, Student, parse_config
from rayfuse.data.rows import read_samples
from rayfuse.teachers.identity import IdentifiedTeacher, fingerprint
from rayfuse.teachers.serving.applications import borrowed
from rayfuse.teachers.serving.client import TeacherClient

K = 5


@pytest.fixture
def nodes(monkeypatch):
    """Role -> node id: a head without CPUs, and a node of each role, either of which has room for everything."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    added = {role: cluster.add_node(num_cpus=4, labels={options.ROLE: role}) for role in ("teachers", "student")}
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    monkeypatch.setenv("RAY_TRAIN_V2_ENABLED", "1")
    ray.init(cluster.address, logging_level="ERROR", log_to_driver=False)
    yield {role: node.node_id for role, node in added.items()}
    serve.shutdown()
    ray.shutdown()
    cluster.shutdown()


def _write_node(config):
    from pathlib import Path

    context = ray.get_runtime_context()
    Path(config["folder"], context.get_worker_id()).write_text(context.get_node_id())


@pytest.mark.slow
def test_each_role_has_its_node_and_the_head_has_neither(tiny, tmp_path, nodes):
    teacher = parse_config(tiny.tree(tmp_path)).teachers[0]
    named = IdentifiedTeacher(teacher, fingerprint(teacher, K))
    samples = read_samples(Data(path=str(tiny.root / "train.jsonl"), limit=8))[0]
    with borrowed([named], K):
        TeacherClient(named).score(samples)()
        replicas = [actor for actor in list_actors() if "TeacherReplica" in str(actor.name) + str(actor.class_name)]
        replicas = replicas or [actor for actor in list_actors() if teacher.name in str(actor.name)]
        assert {actor.node_id for actor in replicas if actor.state == "ALIVE"} == {nodes["teachers"]}
    seen = tmp_path / "seen"
    seen.mkdir()
    TorchTrainer(
        _write_node,
        train_loop_config={"folder": str(seen)},
        scaling_config=ScalingConfig(**options.student_group(Student(model="s", workers=2))),
        run_config=RunConfig(storage_path=str(tmp_path / "ray")),
    ).fit()
    assert [path.read_text() for path in seen.iterdir()] == [nodes["student"]] * 2
