"""A model in another number format, and how much of a training survives that."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from rayfuse.errors import ModelError
from rayfuse.models.folder import write_in_format
from rayfuse.models.shards import Shards
from rayfuse.models.weight_files import INDEX


@pytest.fixture
def model(tmp_path):
    """Write a folder with one weight of the given values; returns its Shards."""

    def write(name, values, **more):
        folder = tmp_path / name
        folder.mkdir()
        save_file({"w": values, **more}, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps({"dtype": "float32", "text_config": {"dtype": "float32"}}))
        return Shards.open(folder)

    return write


def _kept(model, tmp_path, start, end, dtype="bfloat16"):
    model("end", end)
    (tmp_path / "out").mkdir()
    kept = write_in_format(tmp_path / "end", tmp_path / "out", dtype, model("start", start))
    return kept, load_file(tmp_path / "out/model.safetensors")["w"]


def test_an_update_below_half_a_step_of_the_format_is_lost(model, tmp_path):
    """bfloat16 has 8 bits: above 1 its numbers are 2**-7 apart."""
    start = torch.ones(100, dtype=torch.bfloat16)
    kept, written = _kept(model, tmp_path, start, start.float() + 2**-9)
    assert kept == 0
    assert torch.equal(written, start)


def test_an_update_in_steps_of_the_format_is_kept(model, tmp_path):
    start = torch.ones(100, dtype=torch.bfloat16)
    kept, written = _kept(model, tmp_path, start, start.float() + 2**-6)
    assert kept == pytest.approx(1)
    assert torch.equal(written.float(), start.float() + 2**-6)


def test_the_share_is_that_of_the_whole_update(model, tmp_path):
    """Three weights of four lose their update: of its squared length one quarter is left."""
    start = torch.ones(4)
    end = start + torch.tensor([2**-7, -(2**-9), 2**-9, -(2**-9)])
    kept, _ = _kept(model, tmp_path, start, end)
    assert kept == pytest.approx(2**-14 / (2**-14 + 3 * 2**-18))


def test_it_is_the_projection_of_what_is_left_on_the_update(model, tmp_path):
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(5000, generator=generator).bfloat16()
    end = start.float() + 1e-3 * torch.randn(5000, generator=generator)
    kept, written = _kept(model, tmp_path, start, end)
    update, left = end - start.float(), written.float() - start.float()
    assert kept == pytest.approx(float(left @ update / (update @ update)), rel=1e-4)
    assert 0 < kept < 1


def test_nothing_trained_is_not_a_share(model, tmp_path):
    assert _kept(model, tmp_path, torch.ones(3), torch.ones(3))[0] is None


def test_config_and_whole_numbers(model, tmp_path):
    """config.json names the format, in its text part too; what is not floating point stays as it is."""
    model("end", torch.ones(3), steps=torch.tensor([7]))
    (tmp_path / "out").mkdir()
    assert write_in_format(tmp_path / "end", tmp_path / "out", "float16") is None
    written = load_file(tmp_path / "out/model.safetensors")
    assert (written["w"].dtype, written["steps"].dtype) == (torch.float16, torch.int64)
    assert json.loads((tmp_path / "out/config.json").read_text()) == {
        "dtype": "float16",
        "text_config": {"dtype": "float16"},
    }


def test_a_value_beyond_the_format_is_refused(model, tmp_path):
    model("end", torch.full((3,), 1e6))
    (tmp_path / "out").mkdir()
    with pytest.raises(ModelError, match=r"w of .* leaves the range of float16: choose another student\.save_dtype"):
        write_in_format(tmp_path / "end", tmp_path / "out", "float16")


def test_shards_stay_shards_and_transformers_loads_them(tiny, tmp_path):
    whole = AutoModelForCausalLM.from_pretrained(tiny.model("pivot"), dtype=torch.float32)
    whole.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    (tmp_path / "out").mkdir()
    write_in_format(tmp_path / "sharded", tmp_path / "out", "bfloat16", Shards.open(tmp_path / "sharded"))
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert len(set(index["weight_map"].values())) > 1
    sizes = [2 * math.prod(kind.shape) for kind in Shards.open(tmp_path / "out").kinds.values()]
    assert index["metadata"]["total_size"] == sum(sizes)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    for name, value in whole.named_parameters():
        assert torch.equal(loaded.get_parameter(name), value.bfloat16())
