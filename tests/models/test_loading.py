"""Text models inside models of images, weights that lack tensors, and folders that are no models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoTokenizer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from rayfuse.config import Model, Student, Teacher
from rayfuse.data.rows import read_samples
from rayfuse.errors import ModelError
from rayfuse.models.loading import inspect_model, load_causal_lm, load_model_config, token_rows
from rayfuse.models.output_layer import check_output_layer, output_layer, text_decoder
from rayfuse.models.text_config import context_length
from rayfuse.teachers.identity import fingerprint
from rayfuse.teachers.transformers import TransformersTeacher
from tests.models.architectures import SMALL, VISION, known_keys, text_configuration

K = 5
WRAPPERS = ["mistral3", "gemma3", "llama4", "mllama", "qwen2_5_vl", "qwen3_vl", "llava", "smolvlm", "internvl"]


def _wrapper(name: str, rows: int):
    """A random model of images and text, as transformers' class for both makes it."""
    kind = CONFIG_MAPPING[name]
    base = kind()
    text = text_configuration(type(base.text_config))
    text.vocab_size = rows
    vision = type(base.vision_config)
    towers = known_keys(vision, VISION)
    config = kind(text_config=text.to_dict() | {"vocab_size": rows}, vision_config=vision(**towers).to_dict())
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def _save_wrapper(name: str, tiny, folder: Path):
    tokenizer = AutoTokenizer.from_pretrained(tiny.model("code"))
    model = _wrapper(name, len(tokenizer))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model, tokenizer


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_text_model_inside_one_of_images_is_a_teacher(name, tiny, tmp_path):
    """Its signals are those of the whole model's own forward of a text."""
    from rayfuse.config import Data

    model, _ = _save_wrapper(name, tiny, tmp_path)
    teacher = TransformersTeacher(Teacher(model=str(tmp_path), name=name, dtype="float32"), K)
    assert teacher.context == 64 == context_length(load_model_config(teacher.teacher))
    samples, _ = read_samples(Data(path=str(tiny.root / "train.jsonl"), limit=40))
    samples = [sample for sample in samples if teacher.renderer.render(sample).length < 60][:4]
    assert len(samples) == 4
    for sample, signals in zip(samples, teacher.score(samples), strict=True):
        item = teacher.renderer.render(sample)
        ids = torch.from_numpy(np.concatenate([item.prompt_ids, item.response_ids[:-1]]))[None]
        with torch.no_grad():
            # Transformers 5.24's whole Llama 4 fails without an image; its language model is a causal model of its own.
            whole = model.language_model if name == "llama4" else model
            logits = whole(input_ids=ids).logits[0, len(item.prompt_ids) - 1 :, : teacher.vocab_size].float()
        best = logits.log_softmax(-1).topk(K).values
        np.testing.assert_allclose(signals.logps, best.numpy(), atol=5e-3)
        np.testing.assert_allclose(signals.lse, logits.logsumexp(-1).numpy(), atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_text_model_inside_one_of_images_is_a_student(name, tiny, tmp_path):
    """In training mode all that takes gradients gets them, nothing else changes, and what is saved loads again."""
    _save_wrapper(name, tiny, tmp_path / "start")
    student = Student(model=str(tmp_path / "start"))
    inspect_model(student)
    model = load_causal_lm(student, dtype="float32").train()
    ids = torch.arange(5, 25)[None]
    layer = output_layer(model, 50)
    hidden = text_decoder(model)(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).last_hidden_state
    torch.nn.functional.linear(hidden, layer.weight, layer.bias).logsumexp(-1).sum().backward()
    without = [key for key, value in model.named_parameters() if value.requires_grad and value.grad is None]
    assert without == []
    frozen = [key for key, value in model.named_parameters() if not value.requires_grad]
    other = ("vision", "visual", "projector", "connector", "layers.1.")  # Mllama's layer 1 reads images
    assert [key for key in frozen if not any(part in key for part in other)] == []
    assert bool(frozen) == (name != "llama4")
    model.save_pretrained(tmp_path / "saved")
    again = load_causal_lm(Student(model=str(tmp_path / "saved")), dtype="float32")
    check_output_layer(again, output_layer(again, 50))
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=ids).logits, model.eval()(input_ids=ids).logits)


@pytest.fixture
def folder(tiny, tmp_path) -> Path:
    """A copy of a text model's folder."""
    return Path(shutil.copytree(tiny.model("code"), tmp_path / "copy"))


def _rewrite(folder: Path, change) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


LAYER = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize("load", [load_causal_lm, inspect_model])
def test_weights_that_lack_a_tensor_are_refused(folder, load):
    _rewrite(folder, lambda weights: weights.pop(LAYER))
    with pytest.raises(ModelError, match=rf"lack 1 tensors of \w+: {LAYER}; .*random numbers"):
        load(Model(model=str(folder)))


@pytest.mark.parametrize("load", [load_causal_lm, inspect_model])
def test_weights_of_another_shape_are_refused(folder, load):
    _rewrite(folder, lambda weights: weights.update({LAYER: torch.zeros(3, 3)}))
    with pytest.raises(ModelError, match="cannot load the weights"):
        load(Model(model=str(folder)))


def test_tied_and_computed_tensors_may_lack(folder):
    """An output layer tied to the embeddings is not in the file; rotary frequencies of older files are not read."""
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    _rewrite(folder, lambda weights: weights.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    load_causal_lm(Model(model=str(folder)))


def test_tensors_that_are_not_read_are_named(folder):
    _rewrite(folder, lambda weights: weights.update({"an.odd.tensor": torch.zeros(3)}))
    assert inspect_model(Model(model=str(folder)))[1] == ["an.odd.tensor"]


def test_an_adapter_is_no_model(folder):
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"is an adapter .*merge_and_unload"):
        load_causal_lm(Model(model=str(folder)))


def _shard(folder: Path) -> dict[str, str]:
    """The same weights in two files and an index."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: weights[name] for name in part}, folder / file, {"format": "pt"})
    index = {name: file for file, part in parts.items() for name in part}
    _write_index(folder, index)
    return index


def _write_index(folder: Path, files: dict[str, str]) -> None:
    text = json.dumps({"metadata": {}, "weight_map": files})
    (folder / "model.safetensors.index.json").write_text(text)


def _pickle(folder: Path) -> None:
    torch.save(load_file(folder / "model-00001-of-00002.safetensors"), folder / "part.bin")


@pytest.mark.parametrize("load", [load_causal_lm, inspect_model])
@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("../elsewhere.safetensors", "which is not in that folder"),
        ("/etc/elsewhere.safetensors", "which is not in that folder"),
        ("part.bin", "no safetensors file; pickled weights are refused"),
        ("gone.safetensors", "is incomplete: .*names gone.safetensors, which is not there"),
    ],
)
def test_an_index_that_names_other_files_is_refused(folder, load, file, message):
    index = _shard(folder)
    shutil.copy(folder / "model-00001-of-00002.safetensors", folder.parent / "elsewhere.safetensors")
    _pickle(folder)
    load(Model(model=str(folder)))
    _write_index(folder, {name: file if old.startswith("model-00001") else old for name, old in index.items()})
    with pytest.raises(ModelError, match=message):
        load(Model(model=str(folder)))


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": 3}'])
def test_a_damaged_index_is_refused(folder, text):
    _shard(folder)
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ModelError, match=r"index\.json is damaged"):
        load_causal_lm(Model(model=str(folder)))


def test_an_index_is_part_of_the_fingerprint_where_it_decides(folder):
    """An index that says what the files say changes nothing; one that picks among two files of a tensor does."""
    index = _shard(folder)
    teacher = Teacher(model=str(folder), name="sharded", dtype="float32")
    plain = fingerprint(teacher, K)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index, "metadata": {"a": 1}}))
    assert fingerprint(teacher, K) == plain
    second = folder / "model-00003-of-00002.safetensors"
    weights = load_file(folder / index[LAYER])
    save_file({LAYER: weights[LAYER] + 1}, second, {"format": "pt"})
    first = fingerprint(teacher, K)
    _write_index(folder, {**index, LAYER: second.name})
    assert len({plain, first, fingerprint(teacher, K)}) == 3


def test_code_that_runs_is_part_of_the_fingerprint(folder):
    (folder / "modeling_own.py").write_text("A = 1\n")
    closed = Teacher(model=str(folder), name="own", dtype="float32")
    trusted = closed.model_copy(update={"trust_remote_code": str(folder)})
    before = fingerprint(closed, K), fingerprint(trusted, K)
    (folder / "modeling_own.py").write_text("A = 2\n")
    after = fingerprint(closed, K), fingerprint(trusted, K)
    assert after[0] == before[0]
    assert after[1] != before[1]


def test_context_and_rows_of_a_wrapper_are_its_texts(tmp_path):
    text = {"model_type": "mistral", **known_keys(CONFIG_MAPPING["mistral"], SMALL)}
    config = CONFIG_MAPPING["mistral3"](text_config=text)
    assert not hasattr(config, "max_position_embeddings")
    assert context_length(config) == SMALL["max_position_embeddings"]
    config.save_pretrained(tmp_path)
    assert token_rows(Model(model=str(tmp_path))) == SMALL["vocab_size"]
