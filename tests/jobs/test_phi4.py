"""The Phi-4 recipe: its YAML is a configuration, its data are made offline, and its plan is the one in the docs."""

import json
import re
import subprocess
import sys
from pathlib import Path

from typer.testing import CliRunner

from rayfuse.cli import app
from rayfuse.config import load_config
from rayfuse.plan.shapes import read_shape

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "jobs/phi4/fuse.yaml"
TWO_NODES = re.search(r"^#   (serving\.mode=online .*)$", RECIPE.read_text(), re.MULTILINE)


def _files(folder):
    chat = [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi"}]
    rows = {
        "infinity": [{"conversations": [{**chat[0], "value": f"Say {i}"}, chat[1]]} for i in range(60)]
        + [{"conversations": chat[:1]}],
        "numina": [
            {"problem": f"{i} + {i}?", "solution": f"{2 * i}", "problem_is_valid": "Yes", "solution_is_valid": valid}
            for i in range(60)
            for valid in ("Incomplete", "Yes")
        ],
        "kodcode": [{"question": f"Return {i % 45}.", "solution": f"def f():\n    return {i}\n"} for i in range(60)],
    }
    for name, lines in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return [f"--{name}={folder / name}.jsonl" for name in rows]


def _prepare(tmp_path, *arguments):
    command = [sys.executable, str(ROOT / "jobs/phi4/prepare_data.py"), str(tmp_path / "out"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=_environment(tmp_path))


def _environment(tmp_path):
    import os

    return {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}


def test_the_data_are_mixed_as_the_papers_say_and_no_prompt_is_there_twice(tmp_path):
    done = _prepare(tmp_path, *_files(tmp_path), "--share", "0.001")
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in (tmp_path / "out/train.jsonl").read_text().splitlines()]
    skills = [row["skill"] for row in rows]
    assert {skill: skills.count(skill) for skill in skills} == {"general": 52, "math": 39, "code": 39}
    prompts = [json.dumps(row["messages"][:-1]) for row in rows]
    assert len(set(prompts)) == len(prompts)
    assert all([turn["role"] for turn in row["messages"]] == ["user", "assistant"] for row in rows)
    code = next(row for row in rows if row["skill"] == "code")["messages"][1]["content"]
    assert re.fullmatch(r"```python\ndef f\(\):\n    return \d+\n```", code)
    asked = [json.loads(line) for line in (tmp_path / "out/prompts.jsonl").read_text().splitlines()]
    assert [json.dumps(row["messages"]) for row in asked] == prompts[::2]
    assert not [row for row in asked if row["messages"][-1]["role"] == "assistant"]


def test_too_few_rows_are_said(tmp_path):
    done = _prepare(tmp_path, *_files(tmp_path), "--share", "0.0015")
    assert done.returncode == 1
    assert "infinity has too few usable rows for 78: lower --share" in done.stderr


def test_the_recipe_is_a_configuration_on_one_node_and_on_two():
    one = load_config(RECIPE)
    assert [stage.method for stage in one.stages] == ["infifusion", "infigfusion", "infifpo"]
    assert (one.serving.mode, one.signals.k, one.stages[2].beta, one.stages[2].learning_rate) == (
        "first",
        10,
        2.5,
        1e-7,
    )
    assert TWO_NODES is not None
    two = load_config(RECIPE, TWO_NODES[1].split())
    gpus = sum(teacher.replicas.max * teacher.gpus for teacher in two.teachers) + two.student.workers
    assert gpus + two.student.gpus == 16, "with the model that InfiFPO starts from"
    assert {read_shape(model).origin for model in (one.student, *one.teachers)} == {"published sizes"}


def _block(text, command):
    found = re.search(rf"```\n\$ {re.escape(command)}\n(.*?)```", text, re.DOTALL)
    assert found is not None, f"docs/clusters.md lacks a block of `{command}`"
    return found[1]


def test_the_plans_in_the_docs_are_what_the_command_prints(monkeypatch):
    monkeypatch.chdir(ROOT)
    text = (ROOT / "docs/clusters.md").read_text(encoding="utf-8")
    assert TWO_NODES is not None
    for arguments in (
        "jobs/phi4/fuse.yaml --gpus 8 --gpu h800",
        f"jobs/phi4/fuse.yaml {TWO_NODES[1]} --gpus 16 --gpu h800 --length 1024",
    ):
        said = CliRunner().invoke(app, ["plan", *arguments.split()])
        assert said.exit_code == 0, said.output
        assert said.output == _block(text, f"rayfuse plan {arguments}")
