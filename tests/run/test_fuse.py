"""Whole runs on an embedded Ray, as a user starts them."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from io import StringIO
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import rayfuse
from rayfuse.config import parse_config
from rayfuse.errors import CheckpointError, TeacherError
from rayfuse.metrics.records import read_metrics
from rayfuse.run.fuse import fuse

pytestmark = pytest.mark.ray

RAYFUSE = str(Path(sys.executable).with_name("rayfuse"))
SKILLS = {"math", "code", "instruct"}


def _metrics(folder: Path) -> list[dict]:
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory, embedded_ray):
    """A finished run: SFT, then two passes of InfiFusion over all data, evaluated."""
    output = tmp_path_factory.mktemp("runs") / "tiny"
    common = {"batch_size": 16, "learning_rate": 1e-3}
    tree = tiny.tree(
        output,
        stages=[{"method": "sft", "steps": 3, **common}, {"method": "infifusion", "epochs": 2, "lam": 0.2, **common}],
        evaluate={"path": str(tiny.root / "eval.jsonl"), "max_new_tokens": 8},
    )
    assert fuse(parse_config(tree)) == output / "model"
    return output


def test_run_folder_is_complete(run):
    assert {path.name for path in run.iterdir()} >= {
        "config.json",
        "metrics.jsonl",
        "signals",
        "stages",
        "model",
        "results.json",
        "report.html",
    }
    assert parse_config(json.loads((run / "config.json").read_text())).output == str(run)
    model = AutoModelForCausalLM.from_pretrained(run / "model")
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    assert tokenizer.chat_template
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert "infifusion" in (run / "model" / "README.md").read_text()


def test_each_teacher_forwards_each_text_once(run):
    """Two passes over 120 samples: the second finds everything in the store."""
    records = [record for record in _metrics(run) if record["stage"] == "02-infifusion"]
    for teacher in ("math", "code"):
        assert sum(record[f"forwarded/{teacher}"] for record in records) == 120
        assert sum(record[f"stored/{teacher}"] for record in records) == 120


def test_both_stages_learn(run):
    """The weights move, and the distance to both teachers falls."""
    records = [record for record in _metrics(run) if record["stage"] == "02-infifusion"]
    for teacher in ("math", "code"):
        distances = [record[f"loss_uld/{teacher}"] for record in records]
        assert sum(distances[-4:]) < sum(distances[:4])
        assert all(0.2 < record[f"aligned_share/{teacher}"] <= 1 for record in records)
    pivot = load_file(Path(json.loads((run / "config.json").read_text())["student"]["model"]) / "model.safetensors")
    sft = load_file(run / "stages/01-sft/model/model.safetensors")
    fused = load_file(run / "stages/02-infifusion/model/model.safetensors")
    assert any(not pivot[name].equal(sft[name]) for name in pivot)
    assert any(not sft[name].equal(fused[name]) for name in sft)


def test_every_model_is_evaluated_on_the_same_items(run):
    models = json.loads((run / "results.json").read_text())["models"]
    assert [(model["name"], model["role"]) for model in models] == [
        ("math", "teacher"),
        ("code", "teacher"),
        ("pivot", "pivot"),
        ("sft", "stage"),
        ("infifusion", "stage"),
    ]
    for model in models:
        assert {skill: score["total"] for skill, score in model["accuracy"].items()} == {
            **dict.fromkeys(SKILLS, 8),
            "all": 24,
        }
        low, high = model["bits_per_byte_interval"]
        assert low < model["bits_per_byte"] < high
    by_name = {model["name"]: model["bits_per_byte"] for model in models}
    assert by_name["infifusion"] < by_name["sft"] < by_name["pivot"]


def test_a_finished_run_is_not_overwritten_and_resume_does_nothing_again(run):
    config = parse_config(json.loads((run / "config.json").read_text()))
    with pytest.raises(CheckpointError, match="--resume"):
        fuse(config)
    before = len(_metrics(run))
    fuse(config.model_copy(update={"evaluate": None}), resume=True)
    assert len(_metrics(run)) == before
    with pytest.raises(CheckpointError, match="seed"):
        fuse(config.model_copy(update={"seed": 9}), resume=True)


@pytest.fixture
def resumable(run, tiny, tmp_path):
    """A copy of the finished run whose data, pivot and teachers are its own, so that they can be changed."""
    inputs = shutil.copytree(tiny.root, tmp_path / "inputs")
    shutil.copytree(run, tmp_path / "run")
    text = (run / "config.json").read_text()
    text = text.replace(str(tiny.root), str(inputs)).replace(str(run), str(tmp_path / "run"))
    (tmp_path / "run/config.json").write_text(text)
    return parse_config(json.loads(text)).model_copy(update={"evaluate": None}), inputs


def _rows(path):
    return path.read_text().splitlines(keepends=True)


def _change_weights(folder):
    weights = load_file(folder / "model.safetensors")
    name = next(iter(weights))
    weights[name] = weights[name] + 1
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


CHANGES = {
    "data": (lambda inputs: (inputs / "train.jsonl").write_text("".join(_rows(inputs / "train.jsonl")[1:])), "01-sft"),
    "student (the pivot)": (lambda inputs: _change_weights(inputs / "pivot"), "01-sft"),
    "teacher math": (lambda inputs: _change_weights(inputs / "math"), "02-infifusion"),
    "code (rayfuse)": (lambda inputs: None, "01-sft"),
}


@pytest.mark.slow
@pytest.mark.parametrize("part", CHANGES)
def test_a_resumed_run_whose_inputs_changed_is_refused_and_describes_nothing_anew(resumable, part, monkeypatch):
    """Card and report would tell of data or models that the weights have not seen."""
    config, inputs = resumable
    change, stage = CHANGES[part]
    change(inputs)
    if part.startswith("code"):
        monkeypatch.setattr(rayfuse, "__version__", "99.0")
    output = Path(config.output)
    told = [output / "results.json", output / "report.html", output / "model/README.md", output / "metrics.jsonl"]
    before = [path.read_bytes() for path in told]
    with pytest.raises(CheckpointError, match=re.escape(f"{stage} was made with other inputs: {part} changed since")):
        fuse(config, resume=True)
    assert [path.read_bytes() for path in told] == before


@pytest.mark.slow
def test_a_finished_run_is_resumed_with_other_patience_and_in_another_number_format(resumable, capsys):
    config, _ = resumable
    teachers = tuple(teacher.model_copy(update={"patience_s": 7.0}) for teacher in config.teachers)
    student = config.student.model_copy(update={"save_dtype": "bfloat16", "max_failures": 9})
    changed = config.model_copy(update={"teachers": teachers, "student": student})
    before = len(_metrics(Path(config.output)))
    model = fuse(changed, resume=True)
    assert len(_metrics(Path(config.output))) == before
    assert {value.dtype for value in load_file(model / "model.safetensors").values()} == {torch.bfloat16}
    assert "of the training's update survives" in capsys.readouterr().out


@pytest.mark.slow
def test_a_damaged_model_of_a_finished_stage_is_not_fused(resumable):
    config, _ = resumable
    weights = config.stage_folder(0) / "model/model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 4
    weights.write_bytes(bytes(content))
    with pytest.raises(CheckpointError, match=r"01-sft/model is not what .*\(model\.safetensors\): delete this folder"):
        fuse(config, resume=True)


def _bfloat16_pivot(tiny, folder):
    """The pivot in bfloat16, with dropout."""
    shutil.copytree(tiny.model("pivot"), folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model.config.attention_dropout = 0.1
    model.save_pretrained(folder)
    return str(folder)


def _survives(folder, pivot, model):
    """The share of the update that the fused model has, from the three files."""
    start, exact, saved = (load_file(path / "model.safetensors") for path in (Path(pivot), model, folder / "model"))
    update, left = (
        torch.cat([(of[name].double() - start[name].double()).flatten() for name in sorted(exact)])
        for of in (exact, saved)
    )
    return float(left @ update / (update @ update))


@pytest.mark.slow
def test_small_updates_reach_the_next_stage_whole_and_the_rounding_of_the_last_model_is_told(
    tiny, tmp_path, embedded_ray
):
    """A bfloat16 pivot and student at a rate of 1e-7; in the second stage the policy begins as its reference."""
    pivot = _bfloat16_pivot(tiny, tmp_path / "pivot")
    common = {"steps": 2, "batch_size": 16, "learning_rate": 1e-7}
    tree = tiny.tree(
        tmp_path / "run",
        student={"model": pivot, "dtype": "bfloat16"},
        stages=[{"method": "sft", **common}, {"method": "dpo", **common}],
        preferences={"path": str(tiny.root / "pairs.jsonl"), "unit_size": 8, "max_length": 200},
    )
    out = StringIO()
    fuse(parse_config(tree), console=Console(file=out, width=400))
    start = load_file(Path(pivot) / "model.safetensors")
    for stage in ("01-sft", "02-dpo"):
        weights = load_file(tmp_path / f"run/stages/{stage}/model/model.safetensors")
        assert {value.dtype for value in weights.values()} == {torch.float32}
        moved = [(value != start[name].float()).float().mean().item() for name, value in weights.items()]
        assert max(moved) > 0.5, "float32 holds what bfloat16 would have lost"
    first = next(record for record in _metrics(tmp_path / "run") if record["stage"] == "02-dpo")
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-3)
    assert first["margin"] == pytest.approx(0, abs=1e-3)
    saved = json.loads((tmp_path / "run/results.json").read_text())["saved"]
    kept = _survives(tmp_path / "run", pivot, tmp_path / "run/stages/02-dpo/model")
    assert saved == {"dtype": "bfloat16", "update_kept": pytest.approx(kept, rel=1e-6)}
    assert 0 <= kept < 0.2
    told = f"{kept:.1%} of the training's update survives"
    assert told in out.getvalue()
    assert told in (tmp_path / "run/model/README.md").read_text()
    fused = AutoModelForCausalLM.from_pretrained(tmp_path / "run/model", dtype="auto")
    assert fused.dtype == torch.bfloat16
    assert fused.config.attention_dropout == 0.1


@pytest.mark.slow
def test_the_three_methods_in_one_run(tiny, tmp_path, embedded_ray):
    """SFT, InfiFusion, InfiGFusion, InfiFPO and DPO, each from the model before it; signals are shared."""
    common = {"steps": 15, "batch_size": 16, "learning_rate": 1e-3}
    methods = ("sft", "infifusion", "infigfusion", "infifpo", "dpo")
    stages = [{"method": method, **common, **({"beta": 1.0} if method == "infifpo" else {})} for method in methods]
    preferences = {"path": str(tiny.root / "pairs.jsonl"), "unit_size": 8, "max_length": 200}
    fuse(parse_config(tiny.tree(tmp_path / "run", stages=stages, preferences=preferences)))
    records = _metrics(tmp_path / "run")
    of_stage = {name: [r for r in records if r["stage"].endswith(name)] for name in methods}
    assert {name: len(of) for name, of in of_stage.items()} == dict.fromkeys(methods, 15)
    # 120 samples, 15 steps of 16: every text twice. The first of these stages asks, the second finds all in the store.
    assert sum(r["forwarded/math"] for r in of_stage["infifusion"]) == 120
    assert sum(r["forwarded/math"] for r in of_stage["infigfusion"]) == 0
    assert all(r["gradient_ratio"] > 0 for r in of_stage["infigfusion"])
    # Two passes over 120 pairs, whose chosen texts are those of the data: each text is forwarded once in the whole run.
    for teacher in ("math", "code"):
        assert sum(r.get(f"forwarded/{teacher}", 0) for r in records) == 2 * 120
    assert [sum(r["forwarded/initial"] for r in of_stage[name]) for name in ("infifpo", "dpo")] == [240, 240]
    for name in ("infifpo", "dpo"):
        assert of_stage[name][-1]["loss"] < of_stage[name][0]["loss"]
        assert of_stage[name][-1]["margin"] > of_stage[name][0]["margin"]
    assert of_stage["dpo"][0]["loss"] == pytest.approx(0.693147, abs=1e-4)
    assert of_stage["dpo"][0]["margin"] == pytest.approx(0, abs=1e-3)
    assert (tmp_path / "run/report.html").exists()


@pytest.mark.slow
@pytest.mark.parametrize("asked", [None, "float32"])
def test_a_merged_model_is_in_the_pivots_format_unless_asked(tiny, tmp_path, embedded_ray, asked):
    pivot = _bfloat16_pivot(tiny, tmp_path / "pivot")
    common = {"steps": 1, "batch_size": 16, "learning_rate": 1e-5}
    merge = {"method": "task_arithmetic", "parallel": 1}
    tree = tiny.tree(tmp_path / "run", stages=[{"method": "infifusion", **common, "merge": merge}])
    tree["student"] = {"model": pivot, "save_dtype": asked}
    fuse(parse_config(tree))
    merged = tmp_path / "run/stages/01-infifusion/model"
    assert {value.dtype for value in load_file(merged / "model.safetensors").values()} == {torch.float32}
    saved = json.loads((tmp_path / "run/results.json").read_text())["saved"]
    if asked:
        assert saved == {"dtype": "float32", "update_kept": None}
    else:
        kept = _survives(tmp_path / "run", pivot, merged)
        assert saved == {"dtype": "bfloat16", "update_kept": pytest.approx(kept, rel=1e-6)}
    fused = load_file(tmp_path / "run/model/model.safetensors")
    assert {value.dtype for value in fused.values()} == {torch.float32 if asked else torch.bfloat16}


PAIRWISE = {"method": "infifusion", "steps": 3, "batch_size": 16, "learning_rate": 1e-3}


def _students(folder):
    parts = ("math/model", "code/model", "model")
    return [load_file(folder / "stages/01-infifusion" / part / "model.safetensors") for part in parts]


@pytest.mark.slow
def test_pairwise_infifusion_trains_a_student_per_teacher_and_merges_them(tiny, tmp_path, embedded_ray):
    """With task arithmetic and weights 1/S the result is the mean; side by side or one by one, it is the same bits."""
    for name, parallel in (("together", 2), ("in turn", 1)):
        stage = {**PAIRWISE, "merge": {"method": "task_arithmetic", "parallel": parallel}}
        fuse(parse_config(tiny.tree(tmp_path / name, stages=[stage])))
    math, code, merged = _students(tmp_path / "together")
    assert any(not math[name].equal(code[name]) for name in math)
    for name, value in merged.items():
        assert (value - (math[name] + code[name]) / 2).abs().max() < 1e-6
    for one, other in zip((math, code, merged), _students(tmp_path / "in turn"), strict=True):
        assert all(one[name].numpy().tobytes() == other[name].numpy().tobytes() for name in one)
    records = _metrics(tmp_path / "together")
    steps = {(record["stage"], record["step"]) for record in records}
    assert steps == {(f"01-infifusion/{name}", step) for name in ("math", "code") for step in (1, 2, 3)}
    assert len(records) == 6
    assert all("loss_uld/code" not in record for record in records if record["stage"].endswith("math"))
    AutoModelForCausalLM.from_pretrained(tmp_path / "together/model")


@pytest.mark.slow
def test_a_teacher_that_fails_costs_the_other_student_nothing(tiny, tmp_path, embedded_ray):
    """One of two teachers cannot start: the other's student is kept, and a resume trains the missing one only."""
    broken = shutil.copytree(tiny.model("code"), tmp_path / "code")
    (broken / "model.safetensors").rename(tmp_path / "weights")
    (broken / "model.safetensors").write_bytes(b"torn")
    tree = tiny.tree(tmp_path / "run", stages=[{**PAIRWISE, "merge": {"method": "sce", "parallel": 2}}])
    tree["teachers"][1]["model"] = str(broken)
    with pytest.raises(TeacherError, match=r"01-infifusion/code .*math trained and kept(.|\n)*cannot start"):
        fuse(parse_config(tree))
    math = (tmp_path / "run/stages/01-infifusion/math/model/model.safetensors").read_bytes()
    (tmp_path / "weights").rename(broken / "model.safetensors")
    fuse(parse_config(tree), resume=True)
    assert (tmp_path / "run/stages/01-infifusion/math/model/model.safetensors").read_bytes() == math
    steps = [(record["stage"], record["step"]) for record in _metrics(tmp_path / "run")]
    assert sorted(steps) == sorted((f"01-infifusion/{name}", step) for name in ("math", "code") for step in (1, 2, 3))


@pytest.mark.slow
def test_a_teacher_that_cannot_start_ends_the_run_with_its_cause(tiny, tmp_path, embedded_ray):
    """The replica's own error reaches the user, instead of waiting for a teacher that never comes."""
    tree = tiny.tree(tmp_path / "run")
    tree["signals"]["k"] = 10_000
    with pytest.raises(TeacherError, match=r"cannot start(.|\n)*has only \d+ tokens"):
        fuse(parse_config(tree))


def _start(config: Path, *arguments: str) -> subprocess.Popen:
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    return subprocess.Popen(
        [RAYFUSE, "fuse", str(config), *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.chaos
def test_a_killed_and_resumed_run_ends_with_the_same_bits(tiny, tmp_path):
    """Twins: one run of 40 steps goes through, the other loses its driver to SIGKILL and is resumed."""
    stage = {"method": "infifusion", "steps": 40, "batch_size": 16, "learning_rate": 1e-3, "save_every": 5}
    configs = {}
    for name in ("whole", "killed"):
        tree = tiny.tree(tmp_path / name, stages=[stage])
        configs[name] = tmp_path / f"{name}.yaml"
        configs[name].write_text(yaml.safe_dump(tree))
    whole = _start(configs["whole"])
    output, _ = whole.communicate(timeout=300)
    assert whole.returncode == 0, output

    killed = _start(configs["killed"])
    folder = tmp_path / "killed"
    deadline = time.monotonic() + 300
    while len(_metrics(folder)) < 7:
        assert killed.poll() is None, killed.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.005)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    stage_folder = folder / "stages/01-infifusion"
    assert not (stage_folder / "model").exists()
    assert (stage_folder / "checkpoints").exists()
    time.sleep(3)

    resumed = _start(configs["killed"], "--resume")
    output, _ = resumed.communicate(timeout=300)
    assert resumed.returncode == 0, output
    steps = [record["step"] for record in _metrics(folder)]
    assert steps[-1] == 40
    assert steps.count(1) == 1, "the resumed run must go on from a checkpoint, not from the start"
    mine = load_file(folder / "model/model.safetensors")
    twin = load_file(tmp_path / "whole/model/model.safetensors")
    assert set(mine) == set(twin)
    for name, value in twin.items():
        assert mine[name].numpy().tobytes() == value.numpy().tobytes()


@pytest.mark.chaos
def test_a_pipeline_killed_in_its_third_stage_and_resumed_ends_with_the_same_bits(tiny, tmp_path):
    """Twins of SFT, InfiFusion, InfiGFusion, InfiFPO; finished stages stay, and no text is forwarded twice."""
    methods = ("sft", "infifusion", "infigfusion", "infifpo")
    common = {"steps": 15, "batch_size": 16, "learning_rate": 1e-3, "save_every": 2}
    configs = {}
    for name in ("whole", "killed"):
        stages = [{"method": method, **common} for method in methods]
        preferences = {"path": str(tiny.root / "pairs.jsonl"), "unit_size": 8, "max_length": 200}
        configs[name] = tmp_path / f"{name}.yaml"
        configs[name].write_text(yaml.safe_dump(tiny.tree(tmp_path / name, stages=stages, preferences=preferences)))
    whole = _start(configs["whole"])
    output, _ = whole.communicate(timeout=900)
    assert whole.returncode == 0, output

    killed, folder = _start(configs["killed"]), tmp_path / "killed"
    deadline = time.monotonic() + 900
    while sum(record["stage"] == "03-infigfusion" for record in _metrics(folder)) < 4:
        assert killed.poll() is None, killed.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.005)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    stages = folder / "stages"
    assert [(stages / f"{i:02d}-{m}/model").exists() for i, m in enumerate(methods, 1)] == [True, True, False, False]
    time.sleep(3)

    resumed = _start(configs["killed"], "--resume")
    output, _ = resumed.communicate(timeout=900)
    assert resumed.returncode == 0, output
    assert "02-infifusion is done already" in output
    for i, method in enumerate(methods, 1):
        steps = [record["step"] for record in _metrics(folder) if record["stage"] == f"{i:02d}-{method}"]
        assert sorted(set(steps)) == list(range(1, 16))
        assert steps.count(1) == 1, "a stage goes on from its checkpoint"
        mine, twin = (load_file(tmp_path / n / f"stages/{i:02d}-{method}/model/model.safetensors") for n in configs)
        assert all(mine[name].numpy().tobytes() == twin[name].numpy().tobytes() for name in twin)
    for name in configs:
        for teacher in ("math", "code"):
            assert sum(r.get(f"forwarded/{teacher}", 0) for r in read_metrics(tmp_path / name / "metrics.jsonl")) == 240


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "deepspeed"])
def test_two_workers_reach_what_one_reaches(tiny, tmp_path, engine):
    """Two workers have the same global batches, so they reach the same weights up to the order of additions."""
    if engine == "deepspeed":
        pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: pip install 'rayfuse[dev]'")
    stage = {"method": "infifusion", "steps": 6, "batch_size": 32, "learning_rate": 1e-3}
    weights = []
    for workers in (1, 2):
        tree = tiny.tree(tmp_path / str(workers), stages=[stage])
        tree["student"] |= {"workers": workers, "engine": engine if workers > 1 else "ddp"}
        config = tmp_path / f"{workers}.yaml"
        config.write_text(yaml.safe_dump(tree))
        process = _start(config)
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output
        weights.append(load_file(tmp_path / str(workers) / "model/model.safetensors"))
    for name, value in weights[0].items():
        assert (value - weights[1][name]).abs().max() < 2e-4
