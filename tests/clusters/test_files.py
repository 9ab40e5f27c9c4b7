"""The files of clusters/: valid by Ray's schema and KubeRay's fields, and true to the code."""

import ast
import json
import re
import subprocess
from pathlib import Path

import jsonschema
import pytest
import ray
import yaml
from typer.main import get_command

from rayfuse.cli import app
from rayfuse.cluster import ROLE
from rayfuse.config.serving import Http

ROOT = Path(__file__).parents[2]
CLUSTERS = ROOT / "clusters"
BASE = CLUSTERS / "kuberay/base"
OVERLAYS = sorted((CLUSTERS / "kuberay/overlays").iterdir())
README = (CLUSTERS / "README.md").read_text(encoding="utf-8")

# Fields of the custom resources that a file of ours may use (KubeRay 1.7, ray.io/v1): a type, values, or fields inside.
POD = {"spec": dict}
GROUP = {"rayStartParams": dict, "template": POD, "labels": dict, "resources": dict}
RAY_CLUSTER = {
    "rayVersion": str,
    "suspend": bool,
    "enableInTreeAutoscaling": bool,
    "autoscalerOptions": {
        "version": {"v1", "v2"},
        "idleTimeoutSeconds": int,
        "upscalingMode": {"Default", "Aggressive", "Conservative"},
    },
    "authOptions": {"mode": {"token", "disabled"}, "secretName": str, "enableK8sTokenAuth": bool},
    "gcsFaultToleranceOptions": {
        "backend": {"redis", "rocksdb"},
        "redisAddress": str,
        "storage": {"size": str, "storageClassName": str, "claimName": str},
    },
    "headGroupSpec": {**GROUP, "serviceType": str, "headService": dict},
    "workerGroupSpecs": [
        {
            **GROUP,
            "groupName": str,
            "replicas": int,
            "minReplicas": int,
            "maxReplicas": int,
            "numOfHosts": int,
            "idleTimeoutSeconds": int,
            "priority": int,
            "suspend": bool,
        }
    ],
}
SPECS = {
    "RayCluster": RAY_CLUSTER,
    "RayJob": {
        "submissionMode": {"K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"},
        "entrypoint": str,
        "runtimeEnvYAML": str,
        "backoffLimit": int,
        "preRunningDeadlineSeconds": int,
        "activeDeadlineSeconds": int,
        "shutdownAfterJobFinishes": bool,
        "ttlSecondsAfterFinished": int,
        "suspend": bool,
        "rayClusterSpec": RAY_CLUSTER,
    },
    "RayService": {
        "serveConfigV2": str,
        "rayClusterConfig": RAY_CLUSTER,
        "suspend": bool,
        "excludeHeadPodFromServeSvc": bool,
        "deploymentUnhealthySecondThreshold": int,
        "serviceUnhealthySecondThreshold": int,
        "rayClusterDeletionDelaySeconds": int,
    },
}


def _faults(value, kind, where=""):
    """Where a value is not of its kind, in words."""
    if isinstance(kind, dict):
        if not isinstance(value, dict):
            return [f"{where} is no mapping"]
        unknown = [f"{where}.{key} is no field" for key in value.keys() - kind.keys()]
        inner = [_faults(value[key], kind[key], f"{where}.{key}") for key in value.keys() & kind.keys()]
        return unknown + [fault for faults in inner for fault in faults]
    if isinstance(kind, list):
        return [fault for index, item in enumerate(value) for fault in _faults(item, kind[0], f"{where}.{index}")]
    if isinstance(kind, set):
        return [] if value in kind else [f"{where} is {value!r}"]
    return [] if type(value) is kind else [f"{where} is a {type(value).__name__}"]


def _resources():
    tree = yaml.safe_load((BASE / "kustomization.yaml").read_text())
    return [yaml.safe_load((BASE / name).read_text()) for name in tree["resources"]]


def _cluster_of(resource):
    spec = resource["spec"]
    return spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec


def _step(node, part):
    return node[int(part)] if isinstance(node, list) else node[part]


def _patched(overlay):
    """The base's resources with an overlay's patches, as kustomize applies them (RFC 6902: add, replace)."""
    tree = yaml.safe_load((overlay / "kustomization.yaml").read_text())
    assert [(overlay / path).resolve() for path in tree["resources"]] == [BASE]
    resources = {(one["kind"], one["metadata"]["name"]): one for one in _resources()}
    for patch in tree["patches"]:
        target = resources[patch["target"]["kind"], patch["target"]["name"]]
        for operation in yaml.safe_load(patch["patch"]):
            *path, last = operation["path"].strip("/").split("/")
            node = target
            for part in path:
                node = _step(node, part)
            if operation["op"] == "replace":
                _step(node, last)  # it must be there
            node[int(last) if isinstance(node, list) else last] = operation["value"]
    return resources.values()


@pytest.mark.parametrize("resource", _resources(), ids=lambda one: one["kind"])
def test_custom_resources_have_only_fields_that_the_operator_knows(resource):
    if resource["kind"] in SPECS:
        assert resource["apiVersion"] == "ray.io/v1"
        assert _faults(resource["spec"], SPECS[resource["kind"]]) == []


def test_a_field_that_is_not_there_or_of_another_type_is_found():
    assert _faults({"entrypoin": "x", "backoffLimit": "2"}, SPECS["RayJob"]) == [
        ".entrypoin is no field",
        ".backoffLimit is a str",
    ]
    assert _faults({"workerGroupSpecs": [{"minReplica": 0}]}, RAY_CLUSTER) == [
        ".workerGroupSpecs.0.minReplica is no field"
    ]


@pytest.mark.parametrize("overlay", [None, *OVERLAYS], ids=lambda one: one.name if one else "base")
def test_every_variant_places_what_it_runs(overlay):
    for resource in _resources() if overlay is None else _patched(overlay):
        if resource["kind"] not in SPECS:
            continue
        assert _faults(resource["spec"], SPECS[resource["kind"]]) == []
        spec = _cluster_of(resource)
        assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0", "nothing heavy on the head"
        assert spec["authOptions"]["mode"] == "token"
        groups = {group["groupName"]: group for group in spec["workerGroupSpecs"]}
        assert groups["teachers"]["minReplicas"] == 0
        for name, group in groups.items():
            assert group["labels"] == {ROLE: name}
            assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
            (container,) = group["template"]["spec"]["containers"]
            assert container["resources"]["limits"] == container["resources"]["requests"]
            assert {mount["mountPath"] for mount in container["volumeMounts"]} >= {"/shared"}
            gpus = "nvidia.com/gpu" in container["resources"]["limits"]
            assert gpus == (overlay is None or overlay.name != "cpu")
            assert container["image"] == ("rayfuse:cuda" if gpus else "rayfuse:cpu")


def test_the_job_continues_and_is_cleaned_up():
    (job,) = (one for one in _resources() if one["kind"] == "RayJob")
    spec = job["spec"]
    assert "--resume" in spec["entrypoint"].split()
    assert spec["backoffLimit"] >= 1
    assert spec["shutdownAfterJobFinishes"]
    assert spec["ttlSecondsAfterFinished"] > 0


def test_the_service_names_a_builder_that_takes_its_arguments():
    from rayfuse.teachers.serving import shared

    (service,) = (one for one in _resources() if one["kind"] == "RayService")
    (application,) = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"]
    assert application["import_path"] == shared.BUILDER
    shared.Arguments.model_validate(application["args"])


def test_shared_teachers_have_the_names_that_runs_look_for(tiny, tmp_path):
    from rayfuse.config import load_config
    from rayfuse.errors import ConfigError
    from rayfuse.teachers.identity import identify
    from rayfuse.teachers.serving import shared
    from rayfuse.teachers.serving.applications import application_name

    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(tiny.tree(tmp_path)))
    config = load_config(path)
    made = shared.serve_config(str(path), config)
    named = identify(config.absolute().teachers, config.signals.k)
    assert [one["name"] for one in made["applications"]] == [application_name(one) for one in named]
    arguments = shared.Arguments.model_validate(made["applications"][0]["args"])
    assert shared.application(arguments)._bound_deployment.name == "math"
    with pytest.raises(ConfigError, match="no teacher 'physics' to serve; it has: math, code"):
        shared.application(arguments.model_copy(update={"teacher": "physics"}))


@pytest.mark.parametrize("name", ["aws.yaml", "on-premises.yaml"])
def test_files_for_ray_up_are_valid_by_rays_schema(name):
    schema = json.loads((Path(ray.__file__).parent / "autoscaler/ray-schema.json").read_text())
    tree = yaml.safe_load((CLUSTERS / name).read_text())
    jsonschema.validate(tree, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**tree, "workers": 2}, schema)
    assert any(f"--port={_ports_of_ray()['6379']}" in command for command in tree["head_start_ray_commands"])


def test_nodes_of_a_cloud_are_labelled_and_its_head_is_empty():
    types = yaml.safe_load((CLUSTERS / "aws.yaml").read_text())["available_node_types"]
    assert types["head"]["resources"] == {"CPU": 0}
    assert {name: kind["labels"][ROLE] for name, kind in types.items() if name != "head"} == {
        "teachers": "teachers",
        "student": "student",
    }
    start = yaml.safe_load((CLUSTERS / "on-premises.yaml").read_text())
    assert "--num-cpus=0" in start["head_start_ray_commands"][-1]
    assert f"--labels={ROLE}=" in start["worker_start_ray_commands"][-1]


def test_the_slurm_script_is_shell_that_starts_ray_as_its_command_wants():
    script = (CLUSTERS / "slurm/fuse.sbatch").read_text()
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0
    (command,) = re.findall(r"ray symmetric-run(.*)", script.replace("\\\n", ""))
    options, entrypoint = command.split(" -- ")
    assert {"--address", "--min-nodes"} <= set(options.split())
    assert not {"--head", "--port", "--node-ip-address", "--block"} & set(options.split())
    assert entrypoint.split()[:2] == ["rayfuse", "fuse"]
    from ray.scripts.symmetric_run import symmetric_run

    assert {"--address", "--min-nodes"} <= {name for option in symmetric_run.params for name in option.opts}
    known = (Path(ray.__file__).parent / "scripts/symmetric_run.py").read_text()
    (variable,) = re.findall(r"RAY_\w+WAIT_TIMEOUT", script)
    assert variable in known


def _ports_of_ray():
    from ray._private.ray_constants import DEFAULT_DASHBOARD_PORT, DEFAULT_PORT

    return {"6379": DEFAULT_PORT, "8265": DEFAULT_DASHBOARD_PORT}


def _local():
    """The constants of the local cluster's script."""
    tree = ast.parse((CLUSTERS / "local/cluster.py").read_text())
    found = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            found[node.targets[0].id] = node.value.value
    return found


def test_the_readme_lists_every_port_and_no_other():
    listed = set(re.findall(r"^\| (\d+) \|", README, re.MULTILINE))
    local = _local()
    pods = {
        str(port["containerPort"])
        for resource in _resources()
        if resource["kind"] in SPECS
        for container in _cluster_of(resource)["headGroupSpec"]["template"]["spec"]["containers"]
        for port in container["ports"]
    }
    own = {str(local[name]) for name in ("PORT", "DASHBOARD_PORT", "CLIENT_PORT")}
    assert listed == pods | own | {str(Http().port)}
    assert {name: str(port) for name, port in _ports_of_ray().items()} == {"6379": "6379", "8265": "8265"}


def test_commands_in_the_readme_and_the_files_exist():
    texts = [
        path.read_text(encoding="utf-8") for path in CLUSTERS.rglob("*") if path.is_file() and path.suffix != ".pyc"
    ]
    commands = set(
        re.findall(r"rayfuse (fuse|plan|check|prefer|teachers|serve-teachers|[a-z]+) /shared", "\n".join(texts))
    )
    known = get_command(app).commands
    assert commands == {"fuse", "plan", "check"}
    assert commands <= known.keys()
    options = {name for parameter in known["plan"].params for name in parameter.opts}
    assert set(re.findall(r"rayfuse plan \S+ ([^`]*)`", README)) == {"--gpus 8 --gpu h100"}
    assert {"--gpus", "--gpu"} <= options
    for path in re.findall(r"\]\(([^)#]+)\)", README):
        assert (CLUSTERS / path).exists(), path


def test_images_install_extras_that_exist():
    import tomllib

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    text = (CLUSTERS / "images/cuda.Dockerfile").read_text()
    (asked,) = re.findall(r'"\.\[([\w,]+)\]"', text)
    assert set(asked.split(",")) == {"vllm", "deepspeed"} <= extras.keys()
    for image in (CLUSTERS / "images").iterdir():
        for names in re.findall(r"^COPY (.*) \S+$", image.read_text(), re.MULTILINE):
            assert all((ROOT / name).exists() for name in names.split())
        assert re.search(r"^USER ray$", image.read_text(), re.MULTILINE), "not as root"
