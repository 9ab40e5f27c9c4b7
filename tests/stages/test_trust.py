"""Trust-weighted fine-tuning: against SFT, and against weights worked out by hand."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from rayfuse.batch import FusionBatch, TeacherTarget
from rayfuse.config import Trust
from rayfuse.stages.trust import sample_weights, trust_loss

NONE = np.zeros(0, dtype=np.int64)


def _batch(*of_teachers: tuple[list[float], list[int]]) -> FusionBatch:
    """Two samples of 3 and 2 tokens; per teacher the responses' log-probabilities and the teacher's token counts."""
    targets = tuple(
        TeacherTarget(
            f"t{s}",
            1.0,
            NONE,
            np.zeros((0, 0), dtype=np.float16),
            response_logps=np.array(logps, dtype=np.float32),
            response_tokens=np.array(tokens, dtype=np.float32),
        )
        for s, (logps, tokens) in enumerate(of_teachers)
    )
    return FusionBatch(np.zeros((2, 1), dtype=np.int64), NONE, NONE, np.zeros(5), np.array([0, 0, 0, 1, 1]), targets)


def _student() -> torch.Tensor:
    return torch.tensor([-0.1, -0.2, -0.3, -1.0, -2.0], dtype=torch.float64, requires_grad=True)


def test_the_surest_teacher_decides_for_each_sample():
    """Per token of its own: 4 tokens at -2 are surer than 2 tokens at -2."""
    batch = _batch(([-2.0, -8.0], [4, 4]), ([-2.0, -0.5], [2, 5]))
    assert sample_weights(Trust(trust=3.0), batch).tolist() == pytest.approx([math.exp(-1.5), math.exp(-0.3)])
    loss, parts = trust_loss(Trust(trust=3.0), _student(), batch, batch.counts)
    by_hand = (math.exp(-1.5) * 0.6 + math.exp(-0.3) * 3.0) / 5
    assert loss.item() == pytest.approx(by_hand, rel=1e-6)
    assert float(parts["trusted"]) == pytest.approx((math.exp(-1.5) + math.exp(-0.3)) / 2)
    assert float(parts["loss_sft"]) == pytest.approx(3.6 / 5)


def test_no_trust_is_sft():
    logps = _student()
    batch = _batch(([-2.0, -8.0], [4, 4]))
    loss, _ = trust_loss(Trust(trust=0.0), logps, batch, batch.counts)
    (gradient,) = torch.autograd.grad(loss, logps)
    assert loss.item() == pytest.approx(3.6 / 5)
    assert gradient.tolist() == pytest.approx([-1 / 5] * 5)


def test_a_response_that_nobody_believes_does_not_count():
    batch = _batch(([-0.1, -400.0], [4, 4]), ([-90.0, -300.0], [3, 3]))
    logps = _student()
    loss, _ = trust_loss(Trust(trust=5.0), logps, batch, batch.counts)
    (gradient,) = torch.autograd.grad(loss, logps)
    assert gradient[3:].abs().max() < 1e-20
    assert gradient[:3].tolist() == pytest.approx([-math.exp(-0.125) / 5] * 3, rel=1e-6)


def test_a_teachers_weight_scales_its_belief_and_equal_ones_change_no_bit():
    batch = _batch(([-2.0, -8.0], [4, 4]), ([-2.0, -0.5], [2, 5]))
    plain = sample_weights(Trust(trust=3.0), batch)
    for weights, expected in (((0.5, 0.5), plain.tolist()), ((1.0, 4.0), None)):
        targets = [dataclasses.replace(t, weight=w) for t, w in zip(batch.targets, weights, strict=True)]
        found = sample_weights(Trust(trust=3.0), dataclasses.replace(batch, targets=tuple(targets))).tolist()
        by_hand = [max(0.25 * math.exp(-1.5), math.exp(-3.0)), max(0.25 * math.exp(-6.0), math.exp(-0.3))]
        assert found == (expected or pytest.approx(by_hand))
