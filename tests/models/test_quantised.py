"""Quantised checkpoints: loaded where transformers can, refused with what to do where it cannot, never trained."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from rayfuse.config import Student, Teacher
from rayfuse.errors import ModelError
from rayfuse.models.loading import inspect_model, load_causal_lm
from rayfuse.models.quantised import quantisation

NO_PACKAGE = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"},
    "compressed-tensors": {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {}},
    "bitsandbytes": {"load_in_4bit": True},
    "modelopt": {"quant_method": "modelopt", "quant_algo": "NVFP4"},
}
"""What nothing here can run: the packages are not among the project's own."""
BLOCK = 128


def _quantised(tiny, folder: Path, section: dict, change=None) -> str:
    shutil.copytree(tiny.model("code"), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": section}))
    if change:
        weights = change(load_file(folder / "model.safetensors"))
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return str(folder)


@pytest.mark.parametrize("load", [load_causal_lm, inspect_model])
@pytest.mark.parametrize("method", NO_PACKAGE)
def test_a_teacher_that_cannot_run_here_is_refused_with_what_to_do(tiny, tmp_path, method, load):
    folder = _quantised(tiny, tmp_path / "model", NO_PACKAGE[method])
    with pytest.raises(ModelError, match=rf"quantised \({method}\).*backend: vllm.*unquantised weights"):
        load(Teacher(model=folder, name="q"))


@pytest.mark.parametrize("load", [load_causal_lm, inspect_model])
@pytest.mark.parametrize("method", [*NO_PACKAGE, "fp8", "mxfp4"])
def test_a_student_is_never_quantised(tiny, tmp_path, method, load):
    folder = _quantised(tiny, tmp_path / "model", NO_PACKAGE.get(method, {"quant_method": method}))
    with pytest.raises(ModelError, match=rf"quantised \({method}\).*cannot be trained\. Name the repository"):
        load(Student(model=folder))


def test_a_section_inside_the_text_configuration_counts():
    from transformers import Mistral3Config

    config = Mistral3Config()
    assert quantisation(config) is None
    config.text_config.quantization_config = NO_PACKAGE["awq"]
    assert quantisation(config) == "awq"
    assert quantisation(LlamaConfig(quantization_config={"bits": 4})) == "an unnamed method"


def _to_fp8(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The layers in blocks of float8 with a scale each, as FP8 checkpoints have them."""
    made = {}
    for name, value in weights.items():
        if not name.endswith("proj.weight"):
            made[name] = value
            continue
        rows, columns = (-(-size // BLOCK) for size in value.shape)
        scale = value.abs().max() / 448
        made[name] = (value / scale).to(torch.float8_e4m3fn)
        made[f"{name}_scale_inv"] = torch.full((rows, columns), float(scale))
    return made


@pytest.mark.skipif(torch.cuda.is_available(), reason="where there is no GPU transformers dequantises; elsewhere not")
def test_an_fp8_teacher_is_dequantised_where_there_is_no_gpu(tiny, tmp_path):
    section = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK], "activation_scheme": "dynamic"}
    teacher = Teacher(model=_quantised(tiny, tmp_path / "fp8", section, _to_fp8), name="fp8", dtype="float32")
    inspect_model(teacher)
    model = load_causal_lm(teacher)
    plain = AutoModelForCausalLM.from_pretrained(tiny.model("code"), dtype=torch.float32)
    rounded = _to_fp8(load_file(Path(tiny.model("code")) / "model.safetensors"))
    for name, value in plain.named_parameters():
        if f"{name}_scale_inv" in rounded:
            value.data = rounded[name].float() * rounded[f"{name}_scale_inv"].max()
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, plain(input_ids=ids).logits, atol=1e-4, rtol=1e-3)
