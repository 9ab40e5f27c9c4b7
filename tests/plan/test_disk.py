"""Disk space of a run, against the files that are written."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from rayfuse.config import parse_config
from rayfuse.plan.disk import disk_need


@pytest.fixture
def parameters(tiny):
    return sum(value.numel() for value in load_file(f"{tiny.model('pivot')}/model.safetensors").values())


def _need(tiny, tmp_path, index=0, **changes):
    return disk_need(parse_config(tiny.tree(tmp_path, **changes)), index)


def test_a_stage_holds_its_model_and_checkpoints_in_float32(tiny, tmp_path, parameters):
    stages = [{"method": "sft", "steps": 10, "save_every": 2, "keep": 3}, "infifusion"]
    assert _need(tiny, tmp_path, stages=stages) == parameters * (4 + 4 * 12)
    stages[0] = {**stages[0], "save_every": 10}
    assert _need(tiny, tmp_path, stages=stages) == parameters * 4


def test_the_pivots_own_format_changes_the_last_model_only(tiny, tmp_path, parameters):
    """Its file says how many weights there are, not how large they become."""
    model = AutoModelForCausalLM.from_pretrained(tiny.model("pivot"), dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "bf16")
    stages = [{"method": "sft", "steps": 1}, {"method": "infifusion", "steps": 1}]
    for student, last in (({}, 2), ({"save_dtype": "float32"}, 4), ({"dtype": "bfloat16"}, 2)):
        changes = {"stages": stages, "student": {"model": str(tmp_path / "bf16"), **student}}
        assert _need(tiny, tmp_path / "run", 0, **changes) == parameters * 4
        assert _need(tiny, tmp_path / "run", 1, **changes) == parameters * (4 + last)


def test_a_pairwise_stage_has_a_student_per_teacher_and_the_merged_model(tiny, tmp_path, parameters):
    stages = [{"method": "infifusion", "steps": 9, "save_every": 3, "keep": 1, "merge": "sce"}]
    assert _need(tiny, tmp_path, stages=stages) == parameters * (2 * (4 + 2 * 12) + 4 + 4)


def test_weights_that_are_not_here_are_not_counted(tiny, tmp_path):
    assert _need(tiny, tmp_path, student={"model": "org/model"}) == 0
