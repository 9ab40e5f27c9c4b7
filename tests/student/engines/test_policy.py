"""The reference of a preference stage and its policy before the first step: one model, two ways to the numbers."""

import json

import numpy as np
import pytest
import torch

from rayfuse.config import DPO, Data, InfiFPO, parse_config
from rayfuse.config.run import as_reference, as_teacher
from rayfuse.data.rows import read_samples
from rayfuse.prepare.preparer import Preparer
from rayfuse.prepare.spec import INITIAL, PrepareSpec
from rayfuse.student.engines.ddp import DDPEngine
from rayfuse.teachers.identity import fingerprint
from rayfuse.teachers.transformers import TransformersTeacher

HALF = 2.0**-11
"""A response's log-probability per token may differ by float16's rounding of a number of about one."""


def _config(model, dtype, tmp_path):
    student = {"model": str(model), "dtype": dtype}
    return parse_config({"student": student, "data": "d", "stages": ["sft"], "output": str(tmp_path)})


@pytest.fixture
def trained(tiny, tmp_path):
    """A stage's model: float32 weights that bfloat16 cannot hold, and a configuration with dropout."""
    config = _config(tiny.model("pivot"), "bfloat16", tmp_path)
    engine = DDPEngine(config.student, config.student.model, InfiFPO(), torch.device("cpu"))
    with torch.no_grad():
        for value in engine.named.values():
            value += 1e-4 * torch.randn_like(value)
    engine.export(tmp_path / "model")
    written = json.loads((tmp_path / "model/config.json").read_text())
    (tmp_path / "model/config.json").write_text(json.dumps({**written, "attention_dropout": 0.1}))
    return tmp_path / "model"


@pytest.fixture
def samples(tiny):
    return read_samples(Data(path=str(tiny.root / "train.jsonl"), limit=24))[0]


def _per_response(policy, batch):
    with torch.no_grad():
        logps = policy.log_probabilities(batch).double().numpy()
    return np.bincount(batch.sample, weights=logps, minlength=len(batch.input_ids))


@pytest.mark.parametrize("stage", [InfiFPO(), DPO()], ids=["infifpo", "dpo"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_they_are_equal_to_half_precision(trained, samples, tmp_path, stage, dtype):
    """With u = 0 the first step of DPO has loss ln 2. In bfloat16 both round every product, and in the same places."""
    config = _config(trained, dtype, tmp_path)
    spec = PrepareSpec(config.student, (), str(tmp_path / "store"), None, "bytes", 200)
    batch = Preparer(spec, lambda *_: None)(samples)
    policy = DDPEngine(config.student, str(trained), stage, torch.device("cpu"))
    reference = TransformersTeacher(as_reference(config, INITIAL, str(trained)), 4)
    tokens = np.bincount(batch.sample, minlength=len(samples))
    scored = np.array([signals.token_logps.sum(dtype=np.float64) for signals in reference.score(samples)])
    difference = np.abs(_per_response(policy, batch) - scored) / tokens
    assert difference.max() < HALF


def test_weights_rounded_to_the_students_format_are_another_model(trained, samples, tmp_path):
    """What the reference would be if it read a stage's float32 file in bfloat16: the test above can fail."""
    config = _config(trained, "bfloat16", tmp_path)
    exact, rounded = (
        TransformersTeacher(teacher, 4).score(samples)
        for teacher in (as_reference(config, INITIAL, str(trained)), as_teacher(config, INITIAL, str(trained)))
    )
    gaps = [np.abs(a.token_logps - b.token_logps).mean() for a, b in zip(exact, rounded, strict=True)]
    assert max(gaps) > 2 * HALF


def test_a_reference_has_a_fingerprint_of_its_own(trained, tmp_path):
    """Signals of another precision are other signals; those of a float32 student are what they were."""
    prints = {
        dtype: fingerprint(as_reference(_config(trained, dtype, tmp_path), INITIAL, str(trained)), 4)
        for dtype in ("float32", "bfloat16")
    }
    plain = fingerprint(as_teacher(_config(trained, "float32", tmp_path), INITIAL, str(trained)), 4)
    assert prints["float32"] == plain != prints["bfloat16"]


def test_autocast_is_for_transformers(tiny, tmp_path):
    tree = tiny.tree(tmp_path)
    tree["teachers"][0] |= {"backend": "vllm", "autocast": "bfloat16"}
    with pytest.raises(ValueError, match="autocast is bfloat16: it is for backend transformers, not vllm"):
        parse_config(tree)
