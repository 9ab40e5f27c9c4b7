"""Models read a part at a time and written a tensor at a time, against those that transformers reads and writes."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from rayfuse.config import Student
from rayfuse.models import streamed
from rayfuse.models.loading import empty_causal_lm, load_causal_lm, load_tokenizer
from rayfuse.models.shards import Kind
from rayfuse.models.streamed import StreamedModel

CPU = torch.device("cpu")


@pytest.fixture
def student(tiny):
    return Student(model=tiny.model("pivot"))


def _kinds(model):
    return {name: Kind("F32", tuple(value.shape)) for name, value in model.named_parameters()}


def test_a_part_has_values_and_the_rest_has_none_until_it_is_asked_for(student):
    model = StreamedModel(student)
    layer = model.model.model.layers[0]
    model.fill(layer, CPU)
    assert {parameter.device.type for parameter in layer.parameters()} == {"cpu"}
    assert model.model.lm_head.weight.is_meta
    model.fill(model.model, CPU)
    assert model.model.lm_head.weight is model.model.model.embed_tokens.weight


def test_a_model_filled_in_parts_is_the_one_that_transformers_loads(student):
    model = StreamedModel(student)
    assert model.streams
    for layer in model.model.model.layers:
        model.fill(layer, CPU)
    model.fill(model.model, CPU)
    whole = load_causal_lm(student, dtype="float32")
    ids = torch.arange(1, 9)[None]
    assert torch.equal(model.model(input_ids=ids).logits, whole(input_ids=ids).logits)
    assert [p.requires_grad for p in model.model.parameters()] == [p.requires_grad for p in whole.parameters()]
    assert model.model.generation_config.to_dict() == whole.generation_config.to_dict()


@pytest.mark.parametrize("limit", [5 * 10**9, 40_000])
def test_a_model_written_by_tensors_loads_in_transformers(student, tmp_path, monkeypatch, limit):
    """In one file, or in several with an index."""
    monkeypatch.setattr(streamed, "FILE_BYTES", limit)
    model = StreamedModel(student)
    model.fill(model.model, CPU)
    weights = dict(model.model.named_parameters())
    asked = []
    model.write(tmp_path, lambda name: asked.append(name) or weights[name].detach(), _kinds(model.model), 0)
    assert sorted(asked) == sorted(weights)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    for name, value in loaded.named_parameters():
        assert torch.equal(value, weights[name])
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert (files == ["model.safetensors"]) is (limit > 10**9)
    if limit < 10**9:
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert sorted(set(index["weight_map"].values())) == files
        assert set(index["weight_map"]) == set(weights)
        assert index["metadata"]["total_size"] == 4 * sum(value.numel() for value in weights.values())


def test_the_other_ranks_are_asked_for_the_same_tensors_in_the_same_order_and_write_nothing(student, tmp_path):
    model = StreamedModel(student)
    model.fill(model.model, CPU)
    orders = []
    for rank in (0, 1):
        asked = []
        folder = tmp_path / str(rank)
        folder.mkdir()
        model.write(folder, lambda n, a=asked: a.append(n) or model.tensor(n), _kinds(model.model), rank)
        orders.append(asked)
    assert orders[0] == orders[1]
    assert not list((tmp_path / "1").iterdir())


def test_experts_that_transformers_stacks_are_loaded_and_written_whole(student, tmp_path, caplog):
    """The files of a Mixtral hold each expert by itself."""
    tokenizer = load_tokenizer(student)
    config = MixtralConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=2,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(tmp_path / "in")
    model = StreamedModel(Student(model=str(tmp_path / "in")))
    assert not model.streams
    assert "loads all of" in caplog.text
    (tmp_path / "out").mkdir()
    weights = dict(model.model.named_parameters())
    model.write(tmp_path / "out", lambda name: weights[name].detach(), _kinds(model.model), 0)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("in", "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize("load", [lambda asked: load_causal_lm(asked, dtype="float32"), empty_causal_lm])
def test_the_attention_is_the_one_that_was_asked_for(student, load):
    for name in ("sdpa", "flex_attention"):
        model = load(student.model_copy(update={"attention": name}))
        assert model.config._attn_implementation == name
