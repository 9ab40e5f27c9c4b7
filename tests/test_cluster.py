"""What a run says where the cluster has too little for it."""

import pytest

from rayfuse import cluster
from rayfuse.config import Student, Teacher, parse_config
from rayfuse.errors import RayfuseError

TWO = [{"model": f"t{i}", "cpus": 2, "gpus": 0.5, "replicas": {"min": i, "max": 4}} for i in (0, 3)]


@pytest.mark.parametrize(
    ("there", "changes", "expected"),
    [
        # one copy of the first teacher, three of the second, and a student of 1 CPU with four tasks of 0.01
        ({"CPU": 9.04, "GPU": 3}, {}, ""),
        ({"CPU": 9, "GPU": 3}, {}, "9.04 CPUs where the cluster has 9"),
        ({"CPU": 2}, {}, "9.04 CPUs where the cluster has 2 and 3 GPUs where the cluster has 0"),
        ({"CPU": 2, "GPU": 1}, {"serving": {"mode": "first"}}, ""),
        ({"CPU": 1, "GPU": 1}, {"serving": {"mode": "first"}}, "2 CPUs where the cluster has 1"),
        ({"CPU": 2, "GPU": 1}, {"stages": ["sft"]}, ""),
    ],
)
def test_what_a_cluster_is_short_of(tmp_path, monkeypatch, there, changes, expected):
    config = {
        "student": {"model": "s", "gpus": 1, "cpus": 1, "prefetch": 4},
        "teachers": TWO,
        "data": "d",
        "stages": ["infifusion"],
        "output": str(tmp_path),
    }
    monkeypatch.setattr(cluster.ray, "cluster_resources", lambda: there)
    assert cluster.shortage(parse_config({**config, **changes})) == expected


@pytest.mark.parametrize("failures", [0, 2])
def test_an_embedded_ray_that_does_not_start_is_started_again(monkeypatch, failures):
    happened = []

    def init(address, **options):
        happened.append((address, options["num_cpus"], options["runtime_env"]))
        if len(happened) <= 2 * failures:
            raise RuntimeError("timed out")

    monkeypatch.setattr(cluster.ray, "init", init)
    monkeypatch.setattr(cluster.ray, "shutdown", lambda: happened.append("ended"))
    cluster.start_embedded(7, runtime_env={})
    assert happened == [("local", 7, {}), "ended"] * failures + [("local", 7, {})]


def test_an_embedded_ray_that_never_starts_says_so(monkeypatch):
    def init(*_, **__):
        raise RuntimeError("timed out")

    monkeypatch.setattr(cluster.ray, "init", init)
    monkeypatch.setattr(cluster.ray, "shutdown", lambda: None)
    with pytest.raises(RayfuseError, match=r"cannot start on this machine: timed out\. Free some memory"):
        cluster.start_embedded(1)


def _nodes(*roles):
    labels = [{} if role is None else {cluster.ROLE: role} for role in roles]
    return lambda: (
        [{"Alive": True, "Labels": one} for one in labels] + [{"Alive": False, "Labels": {cluster.ROLE: "teachers"}}]
    )


@pytest.mark.parametrize(
    ("roles", "teachers", "student"),
    [
        ((None, None), {}, {}),
        ((None, "teachers", "student"), {cluster.ROLE: "teachers"}, {cluster.ROLE: "student"}),
        ((None, "student"), {cluster.ROLE: "!student"}, {cluster.ROLE: "student"}),
    ],
    ids=["unlabelled", "labelled", "teachers to come"],
)
def test_teachers_and_students_go_to_their_own_nodes(monkeypatch, roles, teachers, student):
    monkeypatch.setattr(cluster.ray, "is_initialized", lambda: True)
    monkeypatch.setattr(cluster.ray, "nodes", _nodes(*roles))
    small = cluster.teacher_deployment(Teacher(model="t", gpus=0.5))
    assert small["ray_actor_options"].get("label_selector", {}) == teachers
    group = cluster.student_group(Student(model="s", workers=2))
    assert (group.get("label_selector", {}), group["placement_strategy"]) == (student, "PACK")


def test_a_teacher_split_over_gpus_stays_on_one_node_of_the_teachers(monkeypatch):
    monkeypatch.setattr(cluster.ray, "is_initialized", lambda: True)
    monkeypatch.setattr(cluster.ray, "nodes", _nodes(None, "teachers"))
    split = Teacher(model="t", backend="vllm", gpus=4, cpus=2, vllm={"tensor_parallel": 4})
    options = cluster.teacher_deployment(split)
    assert options["placement_group_bundles"] == [{"CPU": 2, "GPU": 4}]
    assert options["placement_group_strategy"] == "STRICT_PACK"
    assert options["placement_group_bundle_label_selector"] == [{cluster.ROLE: "teachers"}]
    assert "label_selector" not in options["ray_actor_options"]
