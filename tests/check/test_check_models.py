"""`rayfuse check` of models as people have them: what it says, and that a run would not find more."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, BertConfig, BertLMHeadModel

from tests.check.test_check import findings, only, world  # noqa: F401

TEACHER = r"teachers\.0 \(expert\)"


@pytest.fixture
def folder(world, tmp_path) -> Path:  # noqa: F811
    return Path(shutil.copytree(world.tiny.model("math"), tmp_path / "model"))


def _weights(folder: Path, change) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def _config(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def test_weights_that_lack_a_tensor(world, folder):  # noqa: F811
    _weights(folder, lambda weights: weights.pop("model.norm.weight"))
    for where, key in ((TEACHER, "teachers.0.model"), ("student", "student.model")):
        faults, _ = findings(world(), f"{key}={folder}", "teachers.0.name=expert")
        only(faults, where, r".*lack 1 tensors of .*: model\.norm\.weight")


def test_tensors_that_are_not_read_are_a_remark(world, folder):  # noqa: F811
    _weights(folder, lambda weights: weights.update({"an.odd.tensor": torch.zeros(2)}))
    faults, printed = findings(world(), f"student.model={folder}")
    assert faults == []
    assert "1 tensors in its files are not read: an.odd.tensor; is it whole?" in printed


def test_tokens_without_a_row_are_a_remark(world, folder):  # noqa: F811
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(folder)
    faults, printed = findings(world(), f"student.model={folder}")
    assert faults == []
    assert "the model has no row for [PAD]: they are never predicted" in printed


def test_quantised_weights(world, folder):  # noqa: F811
    _config(folder, quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 128})
    student, _ = findings(world(), f"student.model={folder}")
    only(student, "student", r".*quantised \(gptq\).*cannot be trained")
    teacher, _ = findings(world(), f"teachers.0.model={folder}", "teachers.0.name=expert")
    only(teacher, TEACHER, r".*quantised \(gptq\).*optimum.*backend: vllm")


def test_quantised_weights_in_vllm_are_its_own_affair_but_for_the_self_test(world, folder):  # noqa: F811
    from rayfuse.check.models import _check_weights
    from rayfuse.config import Teacher
    from rayfuse.models.loading import load_model_config

    _config(folder, quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 128})
    trusted = Teacher(model=str(folder), name="model", backend="vllm", parity=False)
    tested = trusted.model_copy(update={"parity": Teacher(model="x", name="x").parity})
    config = load_model_config(trusted)
    assert list(_check_weights("t", trusted, config)) == []
    (found,) = _check_weights("t", tested, config)
    assert found.fault
    assert "the self-test loads them with transformers" in found.text
    assert "parity: false to trust it unseen" in found.text


def test_a_decoder_with_a_head_of_its_own(world, folder):  # noqa: F811
    rows = json.loads((folder / "config.json").read_text())["vocab_size"]
    for name in ("model.safetensors", "config.json"):
        (folder / name).unlink()
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    BertLMHeadModel(BertConfig(vocab_size=rows, is_decoder=True, **sizes)).save_pretrained(folder)
    faults, _ = findings(world(), f"teachers.0.model={folder}", "teachers.0.name=expert")
    only(faults, TEACHER, ".*BertLMHeadModel does more than an output layer")


def test_an_index_that_names_pickles(world, folder):  # noqa: F811
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    torch.save(weights, folder / "weights.bin")
    index = {"weight_map": dict.fromkeys(weights, "weights.bin")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    faults, _ = findings(world(), f"student.model={folder}")
    only(faults, "student", r".*names the file 'weights\.bin', which is no safetensors file; pickled weights")


def test_a_judge_whose_weights_cannot_be_read(world, folder):  # noqa: F811
    """Before the run, which would find it after the teachers have written their answers."""
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    judge = {"method": "reward_model", "model": str(folder), "dtype": "float32"}
    prompts = {"path": str(world.tiny.root / "train.jsonl"), "unit_size": 8, "max_length": 200}
    faults, _ = findings(world(prefer={"write": "triples", "output": "made.jsonl", "prompts": prompts, "judge": judge}))
    only(faults, "prefer", r".*has no \*\.safetensors \(it has: .*pytorch_model\.bin.*pickled weights are refused")
