"""The model that a run ends with: which number format it gets, and what is told of the rounding."""

import json
import shutil
from io import StringIO

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from rayfuse.config import parse_config
from rayfuse.models.loading import stored_dtype
from rayfuse.run.fused_model import write_fused


@pytest.fixture
def written(tiny, tmp_path):
    """Make a pivot of a dtype, and a run whose last stage moved its weights by `change`; returns (Saved, console)."""

    def write(pivot_dtype="bfloat16", change=2.0**-4, base=False, **student):
        pivot, last, out = tmp_path / "pivot", tmp_path / "run/stages/01-sft/model", tmp_path / "out"
        model = AutoModelForCausalLM.from_pretrained(tiny.model("pivot"), dtype=getattr(torch, pivot_dtype))
        (model.base_model if base else model).save_pretrained(pivot)
        tokenizer = AutoTokenizer.from_pretrained(tiny.model("pivot"))
        tokenizer.save_pretrained(pivot)
        model = model.float()
        with torch.no_grad():
            for value in model.parameters():
                value += change
        model.save_pretrained(last)
        tokenizer.save_pretrained(last)
        tree = tiny.tree(tmp_path / "run", stages=["sft"], student={"model": str(pivot), **student})
        out.mkdir()
        console = StringIO()
        saved = write_fused(parse_config(tree), out, Console(file=console, width=300))
        dtypes = {value.dtype for value in load_file(out / "model.safetensors").values()}
        assert dtypes == {getattr(torch, saved.dtype)}
        loaded = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
        assert loaded.dtype == getattr(torch, saved.dtype)
        assert json.loads((out / "config.json").read_text())["dtype"] == saved.dtype
        return saved, console.getvalue()

    return write


@pytest.mark.parametrize(
    ("pivot", "asked", "expected"),
    [
        ("float32", None, "float32"),
        ("bfloat16", None, "bfloat16"),
        ("float16", None, "float16"),
        ("bfloat16", "float32", "float32"),
        ("float32", "bfloat16", "bfloat16"),
    ],
)
def test_the_format_is_the_pivots_unless_asked_and_not_that_of_the_training(written, pivot, asked, expected):
    saved, _ = written(pivot, save_dtype=asked)
    assert saved.dtype == expected


def test_a_student_in_training_in_bfloat16_does_not_make_a_bfloat16_model(written):
    assert written("float32", dtype="bfloat16")[0].dtype == "float32"


def test_what_the_rounding_keeps_is_told(written):
    saved, told = written(change=2.0**-4)
    assert 0.5 < saved.update_kept <= 1.01
    assert f"the pivot's own format; see student.save_dtype): {saved.update_kept:.1%} of the training's" in told
    assert "run/stages/01-sft/model" in told


def test_a_lost_update_is_told_as_lost(written):
    saved, told = written(change=1e-9)
    assert saved.update_kept < 0.05
    assert f"{saved.update_kept:.1%} of the training's update survives" in told


def test_nothing_is_told_where_nothing_is_rounded(written):
    saved, told = written("float32")
    assert (saved.update_kept, told) == (None, "")


def test_a_pivot_whose_files_have_other_names_is_compared_all_the_same(written):
    """The base model's own files lack the prefix that a causal model's have."""
    saved, _ = written(base=True)
    assert 0.5 < saved.update_kept <= 1.01


@pytest.mark.parametrize(("said", "expected"), [("bfloat16", "bfloat16"), (None, "float32"), ("float64", "float32")])
def test_a_format_that_is_not_said_or_cannot_be_written_is_float32(tiny, tmp_path, said, expected):
    folder = shutil.copytree(tiny.model("pivot"), tmp_path / "model")
    tree = json.loads((folder / "config.json").read_text())
    tree.pop("torch_dtype", None)
    tree["dtype"] = said
    (folder / "config.json").write_text(json.dumps(tree))
    config = parse_config(tiny.tree(tmp_path / "run", student={"model": str(folder)}))
    assert stored_dtype(config.student) == expected
