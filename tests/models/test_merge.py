"""Merging: every formula against a naive one, against stored results of mergekit, and, where there is one, mergekit.

`RAYFUSE_MERGEKIT_PYTHON=/path/to/python pytest -m slow tests/test_merge.py` compares with the mergekit of that
interpreter; `RAYFUSE_MERGEKIT_PYTHON=... python tests/models/test_merge.py` writes merge_golden.safetensors anew.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from rayfuse.errors import ConfigError, ModelError
from rayfuse.models.merge import merge
from rayfuse.models.merge_formulas import MERGES, Recipe
from rayfuse.models.weight_files import INDEX, SINGLE

GOLDEN = Path(__file__).with_name("merge_golden.safetensors")
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 10,
    "hidden_size": 4,
    "intermediate_size": 6,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}
# Settings that mean the same in both: mergekit's arguments follow from these (see _mergekit).
SETTINGS: dict[str, dict[str, Any]] = {
    "task_arithmetic": {"method": "task_arithmetic", "weights": [1.0, 1.0, 1.0], "scale": 0.4},
    "task_arithmetic_weighted": {"method": "task_arithmetic", "weights": [0.5, 0.3, -0.2]},
    "ties": {"method": "ties", "density": 0.2},
    "ties_weighted": {"method": "ties", "density": 0.53, "weights": [0.5, 0.3, 1.2], "scale": 0.7},
    "ties_dense": {"method": "ties", "density": 1.0},
    "sce": {"method": "sce", "density": 0.1},
    "sce_half": {"method": "sce", "density": 0.5},
    "sce_dense": {"method": "sce", "density": 1.0},
}


def _shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    V, H, F = config["vocab_size"], config["hidden_size"], config["intermediate_size"]
    KV = H // config["num_attention_heads"] * config["num_key_value_heads"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (V, H), "lm_head.weight": (V, H)}
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        shapes |= {f"{layer}self_attn.{p}_proj.weight": (KV if p in "kv" else H, H) for p in "qkvo"}
        shapes |= {f"{layer}mlp.{p}_proj.weight": (F, H) for p in ("gate", "up")}
        shapes |= {f"{layer}mlp.down_proj.weight": (H, F)}
        shapes |= {f"{layer}{p}_layernorm.weight": (H,) for p in ("input", "post_attention")}
    return shapes | {"model.norm.weight": (H,)}


def _weights(seed: int, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> list[dict[str, torch.Tensor]]:
    """A base and three students whose task vectors differ in size."""
    random = torch.Generator().manual_seed(seed)
    base = {name: torch.randn(shape, generator=random) for name, shape in shapes.items()}
    models = [base]
    for size in (0.05, 0.1, 0.2):
        models.append({name: base[name] + size * torch.randn(base[name].shape, generator=random) for name in shapes})
    return [{name: value.to(dtype) for name, value in model.items()} for model in models]


def _folder(
    path: Path, weights: dict[str, torch.Tensor], config: dict[str, Any] | None = None, *, shards: int = 0
) -> Path:
    """A model folder; shards = 0 makes one file without an index."""
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config or CONFIG))
    if not shards:
        save_file(weights, path / SINGLE, metadata={"format": "pt"})
        return path
    files = {name: f"model-{1 + i % shards:05d}-of-{shards:05d}.safetensors" for i, name in enumerate(weights)}
    for file in set(files.values()):
        save_file({name: weights[name] for name in weights if files[name] == file}, path / file)
    size = sum(value.nbytes for value in weights.values())
    (path / INDEX).write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": files}))
    return path


def _mergekit(python: str, models: Sequence[Path], output: Path, setting: dict[str, Any], dtype: str) -> None:
    """Run mergekit's own command on the same merge."""
    weights = setting.get("weights", [1.0] * (len(models) - 1))
    parameters: dict[str, Any] = {}
    if setting["method"] == "sce":
        parameters["select_topk"] = setting["density"]
    else:
        parameters |= {"lambda": setting.get("scale", 1.0), "normalize": setting["method"] == "ties"}
        parameters |= {"rescale": False} if setting["method"] == "ties" else {}
    entries: list[dict[str, Any]] = []
    for model, weight in zip(models[1:], weights, strict=True):
        own = {"weight": weight} if setting["method"] != "sce" else {}
        own |= {"density": setting["density"]} if setting["method"] == "ties" else {}
        entries.append({"model": str(model), "parameters": own})
    tree = {
        "merge_method": setting["method"],
        "base_model": str(models[0]),
        "models": entries,
        "parameters": parameters,
        "dtype": "float32",
        "out_dtype": dtype,
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    recipe = output.with_suffix(".yaml")
    recipe.write_text(yaml.safe_dump(tree))
    command = [python, "-m", "mergekit.scripts.run_yaml", str(recipe), str(output), "--no-copy-tokenizer"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-4000:]


def _load(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for path in sorted(folder.glob("*.safetensors")) for name, value in load_file(path).items()}


def _recipe(count: int, density: float = 1.0, scale: float = 1.0, weights: Sequence[float] = ()) -> Recipe:
    return Recipe(weights=tuple(weights) or (1 / count,) * count, density=density, scale=scale)


# --- naive formulas: one element at a time, in Python's float64 --------------------------------------------------


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)


def _naive_task_arithmetic(base: list[float], students: list[list[float]], recipe: Recipe) -> list[float]:
    merged = []
    for i, b in enumerate(base):
        step = sum(w * (student[i] - b) for w, student in zip(recipe.weights, students, strict=True))
        merged.append(b + recipe.scale * step)
    return merged


def _naive_ties(base: list[float], students: list[list[float]], recipe: Recipe) -> list[float]:
    n = len(base)
    deltas = [[student[i] - base[i] for i in range(n)] for student in students]
    for delta in deltas:
        smallest = sorted(map(abs, delta), reverse=True)[max(1, int(recipe.density * n)) - 1]
        delta[:] = [d if abs(d) >= smallest else 0.0 for d in delta]
    merged = []
    for i in range(n):
        votes = [(w, delta[i]) for w, delta in zip(recipe.weights, deltas, strict=True)]
        elected = _sign(sum(w * d for w, d in votes))
        agreeing = [(w, d) for w, d in votes if elected != 0 and _sign(d) == elected]
        mean = sum(w * d for w, d in agreeing) / sum(w for w, _ in agreeing) if agreeing else 0.0
        merged.append(base[i] + recipe.scale * mean)
    return merged


def _naive_sce(base: list[float], students: list[list[float]], recipe: Recipe) -> list[float]:
    n, S = len(base), len(students)
    deltas = [[student[i] - base[i] for i in range(n)] for student in students]
    if recipe.density < 1:
        variances = []
        for i in range(n):
            mean = sum(delta[i] for delta in deltas) / S
            variances.append(sum((delta[i] - mean) ** 2 for delta in deltas) / S)
        keep = int(recipe.density * sum(v > 0 for v in variances))
        smallest = sorted(variances, reverse=True)[keep - 1] if keep else math.inf
        deltas = [[d if v >= smallest else 0.0 for d, v in zip(delta, variances, strict=True)] for delta in deltas]
    squares = [sum(d * d for d in delta) for delta in deltas]
    shares = [square / sum(squares) if sum(squares) else 1 / S for square in squares]
    merged = []
    for i in range(n):
        elected = _sign(sum(delta[i] for delta in deltas))
        agreeing = [(w, delta[i]) for w, delta in zip(shares, deltas, strict=True) if elected * delta[i] > 0]
        mean = sum(w * d for w, d in agreeing) / sum(w for w, _ in agreeing) if agreeing else 0.0
        merged.append(base[i] + recipe.scale * mean)
    return merged


NAIVE = {"task_arithmetic": _naive_task_arithmetic, "ties": _naive_ties, "sce": _naive_sce}


@pytest.mark.parametrize("shape", [(), (1,), (37,), (9, 14)])
@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("density", [0.05, 0.2, 0.55, 1.0])
@pytest.mark.parametrize("method", MERGES)
def test_formula_equals_the_naive_one(method: str, density: float, count: int, shape: tuple[int, ...]) -> None:
    random = torch.Generator().manual_seed(count)
    base = torch.randn(shape, generator=random, dtype=torch.float64)
    students = [base + 0.1 * (s + 1) * torch.randn(shape, generator=random).double() for s in range(count)]
    recipe = _recipe(count, density, scale=0.8, weights=[0.3 + 0.2 * s for s in range(count)])
    expected = NAIVE[method](base.flatten().tolist(), [student.flatten().tolist() for student in students], recipe)
    found = MERGES[method](base, students, recipe)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64).reshape(shape), rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", MERGES)
def test_formula_on_tied_values(method: str) -> None:
    """Multiples of 1/8, as in low-precision weights: many equal magnitudes and variances, many sums of exactly 0."""
    random = torch.Generator().manual_seed(0)
    base, *students = [torch.randint(-3, 4, (300,), generator=random) / 8 for _ in range(3)]
    for density in (0.05, 0.3, 0.6):
        recipe = _recipe(2, density)
        expected = NAIVE[method](base.tolist(), [student.tolist() for student in students], recipe)
        torch.testing.assert_close(MERGES[method](base, students, recipe), torch.tensor(expected), rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", MERGES)
def test_students_equal_to_the_base_merge_to_the_base(method: str) -> None:
    base = torch.randn(50)
    assert torch.equal(MERGES[method](base, [base.clone()] * 3, _recipe(3, 0.5)), base)


@pytest.mark.parametrize("method", ["task_arithmetic", "ties"])
def test_equal_students_merge_to_themselves(method: str) -> None:
    base, student = torch.randn(2, 50)
    torch.testing.assert_close(MERGES[method](base, [student] * 3, _recipe(3)), student)


def test_opposite_students_cancel() -> None:
    """An exact tie of signs elects none: a rule that prefers plus would push every such weight upwards."""
    base, step = torch.zeros(20), torch.rand(20) + 0.5
    for method in MERGES:
        assert torch.equal(MERGES[method](base, [base + step, base - step], _recipe(2)), base)


def test_sce_weighs_small_task_vectors_as_it_does_large_ones() -> None:
    base = torch.zeros(1000, dtype=torch.float64)
    random = torch.Generator().manual_seed(0)
    deltas = [size * torch.randn(1000, generator=random).double() for size in (1.0, 3.0)]
    large = MERGES["sce"](base, deltas, _recipe(2, 0.5))
    small = MERGES["sce"](base, [1e-5 * delta for delta in deltas], _recipe(2, 0.5))
    torch.testing.assert_close(small, 1e-5 * large, rtol=1e-12, atol=0)


def test_low_precision_weights_are_merged_in_float32() -> None:
    base = torch.tensor([1.0, 2.0, 3.0], dtype=torch.bfloat16)
    students = [base + torch.tensor(step, dtype=torch.bfloat16) for step in (0.0625, 0.0078125)]
    expected = base.float() + 0.5 * (students[0].float() - base.float()) + 0.5 * (students[1].float() - base.float())
    found = MERGES["task_arithmetic"](base, students, _recipe(2))
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


# --- mergekit ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def golden() -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, Any]]:
    """The stored models and mergekit's results for them, by name; and how they were made."""
    with safe_open(GOLDEN, framework="pt") as file:
        made = json.loads(file.metadata()["made"])
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    models = {}
    for name, flat in stored.items():
        sizes = [math.prod(shape) for shape in made["shapes"].values()]
        parts = zip(made["shapes"].items(), flat.split(sizes), strict=True)
        models[name] = {key: part.reshape(shape).clone() for (key, shape), part in parts}
    return models, made


@pytest.mark.parametrize("name", SETTINGS)
def test_merge_equals_stored_results_of_mergekit(
    golden: tuple[dict[str, dict[str, torch.Tensor]], dict[str, Any]], name: str, tmp_path: Path
) -> None:
    models, made = golden
    assert made["mergekit"] == "0.1.5"
    assert made["settings"][name] == SETTINGS[name]
    base, *students = [_folder(tmp_path / key, models[key]) for key in ("base", "student0", "student1", "student2")]
    found = _load(merge(base, students, tmp_path / "merged", **made["settings"][name]))
    assert found.keys() == models[name].keys()
    for key, expected in models[name].items():
        torch.testing.assert_close(found[key], expected, rtol=0, atol=5e-7, msg=lambda text, key=key: f"{key}: {text}")
    changed = sum(int((models[name][key] != models["base"][key]).sum()) for key in found)
    assert changed > 10  # the merge did something


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", SETTINGS)
def test_merge_equals_mergekit(name: str, dtype: str, tmp_path: Path, record_property: Any) -> None:
    python = os.environ.get("RAYFUSE_MERGEKIT_PYTHON")
    if not python:
        pytest.skip("set RAYFUSE_MERGEKIT_PYTHON to the interpreter of an environment that has mergekit")
    if dtype == "bfloat16" and SETTINGS[name].get("density", 1.0) < 1:
        pytest.skip("bfloat16 task vectors are full of ties, which mergekit breaks by the order of an unstable sort")
    config = CONFIG | {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 3}
    config |= {"num_attention_heads": 4, "num_key_value_heads": 2, "torch_dtype": dtype}
    weights = _weights(7, _shapes(config), getattr(torch, dtype))
    if dtype == "bfloat16":  # no sums of exactly 0, where mergekit elects plus
        for a, b, c, d in zip(*(model.values() for model in weights), strict=True):
            cancels = b.float() + c.float() + d.float() - 3 * a.float() == 0
            for student in (b, c, d):
                student[cancels] = a[cancels]
    folders = [_folder(tmp_path / f"model{i}", model, config, shards=2) for i, model in enumerate(weights)]
    _mergekit(python, folders, tmp_path / "theirs", SETTINGS[name], dtype)
    ours = _load(merge(folders[0], folders[1:], tmp_path / "ours", **SETTINGS[name]))
    theirs = _load(tmp_path / "theirs")
    assert ours.keys() == theirs.keys()
    worst = max(float((ours[key].double() - theirs[key].double()).abs().max()) for key in ours)
    differ = sum(int((ours[key] != theirs[key]).sum()) for key in ours) / sum(value.numel() for value in ours.values())
    print(f"{name} {dtype}: max |ours - mergekit| = {worst:.3g}, {differ:.2%} of the elements differ")
    record_property("max_abs_difference", worst)
    for key, value in theirs.items():  # in bfloat16 the last float32 bit can decide which way a result is rounded
        torch.testing.assert_close(ours[key], value, rtol=2**-7 if dtype == "bfloat16" else 0, atol=5e-7)
    assert dtype == "float32" or differ < 5e-3


# --- folders -----------------------------------------------------------------------------------------------------


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    """A base in three shards and three students, one of them in one file."""
    shards = (3, 3, 0, 2)
    weights = _weights(3, _shapes(CONFIG), torch.float32)
    return [_folder(tmp_path / f"m{i}", w, shards=s) for i, (w, s) in enumerate(zip(weights, shards, strict=True))]


def test_merged_folder_is_laid_out_like_the_base(models: list[Path], tmp_path: Path) -> None:
    base, *students = models
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (base / name).write_text('{"from": "base"}')
        (students[0] / name).write_text('{"from": "student"}')
    (base / "chat_template.jinja").write_text("{{ messages }}")
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    (base / "pytorch_model.bin").write_bytes(b"pickle")
    out = merge(base, students, tmp_path / "runs" / "merged", method="ties")
    assert out == tmp_path / "runs" / "merged"
    assert {path.name for path in out.iterdir()} == {path.name for path in base.iterdir()} - {"pytorch_model.bin"}
    assert (out / "additional_chat_templates" / "tools.jinja").read_text() == "{{ tools }}"
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (out / name).read_bytes() == (base / name).read_bytes()
    assert json.loads((out / INDEX).read_text()) == json.loads((base / INDEX).read_text())
    for path in base.glob("*.safetensors"):
        expected, found = load_file(path), load_file(out / path.name)
        assert {name: value.shape for name, value in found.items()} == {n: v.shape for n, v in expected.items()}
    assert [path.name for path in out.parent.iterdir()] == ["merged"]


def test_merge_is_deterministic_and_loads(models: list[Path], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    base, *students = models
    first = merge(base, students, tmp_path / "first", method="sce", density=0.5)
    second = merge(base, students, tmp_path / "second", method="sce", density=0.5)
    for path in first.iterdir():
        assert path.read_bytes() == (second / path.name).read_bytes()
    loaded, info = AutoModelForCausalLM.from_pretrained(first, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    for name, value in _load(first).items():
        assert torch.equal(loaded.state_dict()[name], value)


def test_default_weights_of_task_arithmetic_are_the_mean(models: list[Path], tmp_path: Path) -> None:
    base, *students = models
    mean = _load(merge(base, students, tmp_path / "mean", method="task_arithmetic"))
    parts = [_load(student) for student in students]
    for name, value in mean.items():
        torch.testing.assert_close(value, torch.stack([part[name] for part in parts]).mean(dim=0))


def test_dtype_is_written_and_declared(models: list[Path], tmp_path: Path) -> None:
    base, *students = models
    nested = CONFIG | {"text_config": {"dtype": "float32", "hidden_size": 4}}
    (base / "config.json").write_text(json.dumps(nested))
    wide = _load(merge(base, students, tmp_path / "wide", method="ties"))
    out = merge(base, students, tmp_path / "narrow", method="ties", dtype="bfloat16")
    assert all(torch.equal(value, wide[name].bfloat16()) for name, value in _load(out).items())
    config = json.loads((out / "config.json").read_text())
    assert (config["dtype"], config["torch_dtype"], config["text_config"]["dtype"]) == ("bfloat16",) * 3
    size = json.loads((out / INDEX).read_text())["metadata"]["total_size"]
    assert size == sum(value.nbytes for value in _load(out).values())


def test_students_in_another_float_format_need_a_dtype(tmp_path: Path) -> None:
    weights = _weights(3, _shapes(CONFIG), torch.float32)
    base = _folder(tmp_path / "base", {name: value.bfloat16() for name, value in weights[0].items()})
    students = [_folder(tmp_path / f"s{i}", w) for i, w in enumerate(weights[1:])]
    with pytest.raises(
        ModelError, match=r"s0 does not fit .*: lm_head.weight is F32\[10, 4\] instead of BF16\[10, 4\]"
    ):
        merge(base, students, tmp_path / "out", method="ties")
    merged = _load(merge(base, students, tmp_path / "out", method="task_arithmetic", dtype="float32"))
    for name, value in merged.items():
        torch.testing.assert_close(value, sum(model[name] for model in weights[1:]) / 3)


def test_integers_are_copied_where_all_agree(tmp_path: Path) -> None:
    def model(name: str, seed: int, counter: int) -> Path:
        values = {"steps": torch.tensor([counter, 2]), "flag": torch.tensor(True), "w": torch.full((2, 3), float(seed))}
        return _folder(tmp_path / name, {**values, "empty": torch.zeros(0, 4)})

    base, student = model("base", 0, 5), model("student", 1, 5)
    merged = _load(merge(base, [student], tmp_path / "out", method="task_arithmetic", dtype="float16"))
    assert merged["steps"].tolist() == [5, 2]
    assert merged["flag"].dtype == torch.bool
    assert merged["empty"].shape == (0, 4)
    assert torch.equal(merged["w"], torch.ones(2, 3, dtype=torch.float16))
    with pytest.raises(ModelError, match=r"steps is I64\[2\], which cannot be merged, and .*other differs"):
        merge(base, [model("other", 1, 6)], tmp_path / "out2", method="task_arithmetic")


@pytest.mark.parametrize("method", MERGES)
def test_memory_is_a_few_tensors_not_a_model(method: str, tmp_path: Path) -> None:
    """Peak of torch's own allocations (the profiler's record) for 48 MiB models, with tensors of 1 MiB."""
    shapes = {f"layer{i}.weight": (512, 512) for i in range(48)}
    models = [_folder(tmp_path / f"m{i}", w, shards=3) for i, w in enumerate(_weights(5, shapes, torch.float32))]
    mapped = {path.stat().st_size for model in models for path in model.glob("*.safetensors")}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        merge(models[0], models[1:], tmp_path / "out", method=method)  # type: ignore[arg-type]
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        if abs(event.nbytes()) not in mapped:  # a mapped file takes addresses, not memory
            live += event.nbytes()
            peak = max(peak, live)
    tensor = 512 * 512 * 4
    assert 3 * tensor < peak <= (3 + 4.5) * tensor


# --- errors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "slerp"}, "method is 'slerp', it must be one of task_arithmetic, ties, sce"),
        ({"method": "ties", "weights": [1.0, 2.0]}, "2 weights for 3 students"),
        ({"method": "ties", "weights": [1.0, 2.0, 0.0]}, r"weights are \[1.0, 2.0, 0.0\]; ties needs .* above 0"),
        ({"method": "task_arithmetic", "weights": [1.0, 2.0, math.nan]}, "needs finite numbers"),
        ({"method": "sce", "weights": [1.0, 1.0, 1.0]}, "sce calculates the weights"),
        ({"method": "ties", "density": 0.0}, r"density is 0.0, it must be in \(0, 1\]"),
        ({"method": "sce", "density": 1.5}, "density is 1.5"),
        ({"method": "sce", "density": math.nan}, "density is nan"),
        ({"method": "task_arithmetic", "density": 0.5}, "leave density out"),
        ({"method": "ties", "scale": math.inf}, "scale is inf"),
    ],
)
def test_wrong_numbers(arguments: dict[str, Any], message: str, models: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        merge(models[0], models[1:], tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


def test_too_few_students(models: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="ties needs students, got 0"):
        merge(models[0], [], tmp_path / "out", method="ties")
    with pytest.raises(ConfigError, match="sce needs at least 2 students"):
        merge(models[0], models[1:2], tmp_path / "out", method="sce")


def test_output_must_be_new(models: list[Path], tmp_path: Path) -> None:
    base, *students = models
    with pytest.raises(ConfigError, match="m0 is one of the models to merge"):
        merge(base, students, tmp_path / "m1" / ".." / "m0", method="ties")
    with pytest.raises(ConfigError, match="m2 is one of the models to merge"):
        merge(base, students, students[1], method="ties")
    (tmp_path / "there").mkdir()
    with pytest.raises(ConfigError, match="there exists"):
        merge(base, students, tmp_path / "there", method="ties")


def test_student_with_other_tensors(tmp_path: Path) -> None:
    weights = _weights(3, _shapes(CONFIG), torch.float32)
    base, good = _folder(tmp_path / "base", weights[0]), _folder(tmp_path / "good", weights[1])
    changed = dict(weights[2])
    changed["model.extra.weight"] = changed.pop("model.norm.weight")
    changed["lm_head.weight"] = torch.zeros(11, 4)
    bad = _folder(tmp_path / "bad", changed)
    with pytest.raises(ModelError) as error:
        merge(base, [good, bad], tmp_path / "out", method="ties", dtype="float32")
    text = str(error.value)
    assert f"{bad} does not fit the base {base}" in text
    assert "it lacks model.norm.weight; only it has model.extra.weight" in text
    assert "lm_head.weight is F32[11, 4] instead of F32[10, 4]" in text


def test_values_that_are_not_finite(tmp_path: Path) -> None:
    weights = _weights(3, {"a": (4, 4), "b": (5,)}, torch.float32)
    weights[2]["b"][3] = math.nan
    base, *students = [_folder(tmp_path / f"m{i}", w) for i, w in enumerate(weights)]
    with pytest.raises(ModelError, match=r"b of .*m2 has values that are not finite"):
        merge(base, students, tmp_path / "out", method="ties")
    with pytest.raises(ModelError, match="the merged a leaves the range of F16: lower scale"):
        merge(base, students[:1], tmp_path / "out", method="task_arithmetic", scale=1e7, dtype="float16")
    assert {path.name for path in tmp_path.iterdir()} == {"m0", "m1", "m2", "m3"}  # no half-written folder


def test_damaged_folders(models: list[Path], tmp_path: Path) -> None:
    base, *students = models

    def fails(message: str) -> None:
        with pytest.raises(ModelError, match=message):
            merge(base, students, tmp_path / "out", method="ties")

    whole = students[1] / SINGLE
    shutil.move(whole, tmp_path / "kept")
    fails(f"m2 has neither {SINGLE} nor {INDEX}")
    whole.write_bytes((tmp_path / "kept").read_bytes()[:-5])
    fails("cannot read .*m2/model.safetensors")
    shutil.move(tmp_path / "kept", whole)
    index = json.loads((students[0] / INDEX).read_text())
    for content, message in (
        ("{", "index.json is damaged"),
        (json.dumps({"weight_map": {"lm_head.weight": "../m2/model.safetensors"}}), "which is not in that folder"),
        (json.dumps({"weight_map": index["weight_map"] | {"lost": "model-00001-of-00003.safetensors"}}), "lacks lost"),
        (json.dumps({"weight_map": index["weight_map"] | {"lost": "gone.safetensors"}}), "cannot read .*gone"),
    ):
        (students[0] / INDEX).write_text(content)
        fails(message)


def _write_golden(python: str, scratch: Path) -> None:
    versions = "import importlib.metadata as m; print(*map(m.version, ('mergekit', 'torch', 'transformers')))"
    mergekit, torch_version, transformers = subprocess.check_output([python, "-c", versions], text=True).split()
    shapes = _shapes(CONFIG)
    weights = dict(zip(("base", "student0", "student1", "student2"), _weights(11, shapes, torch.float32), strict=True))
    folders = [_folder(scratch / name, model) for name, model in weights.items()]
    for name, setting in SETTINGS.items():
        _mergekit(python, folders, scratch / "out" / name, setting, "float32")
        weights[name] = _load(scratch / "out" / name)
    made = {
        "mergekit": mergekit,
        "torch": torch_version,
        "transformers": transformers,
        "command": "mergekit.scripts.run_yaml, dtype float32, rescale false, normalize true for ties and false for "
        "task_arithmetic, int8_mask false, lambda = scale, select_topk = density for sce",
        "settings": SETTINGS,
        "shapes": shapes,
    }
    flat = {name: torch.cat([model[key].flatten() for key in shapes]) for name, model in weights.items()}
    save_file(flat, GOLDEN, metadata={"made": json.dumps(made)})


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as scratch_name:
        _write_golden(os.environ.get("RAYFUSE_MERGEKIT_PYTHON", sys.executable), Path(scratch_name))
