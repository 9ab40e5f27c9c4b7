"""How strongly the distance pulls: measured at the start, stored, and the same for every worker."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from rayfuse.config import KL, SFT, InfiFusion
from rayfuse.errors import StudentError
from rayfuse.stages import METHODS
from rayfuse.student.gradients import FILE, accumulate, at_the_start, balanced_lam
from tests.stages.batches import K, make_case


class Leaves:
    """An engine whose weights are a case's hidden states and output weight."""

    def __init__(self, case):
        self.case = case
        self.leaves = (case.hidden, case.weight)
        self.barriers = 0

    def score(self, batch, k, *, lse=False):
        torch.rand(1)  # dropout would draw
        return self.case.output(preferences=False)

    def router_loss(self):
        return torch.tensor(5.0)

    def backward(self, loss):
        loss.backward()

    def accumulate(self, *, last):
        return torch.enable_grad()

    def sum_over_workers(self, values):
        return values

    def barrier(self):
        self.barriers += 1

    def take_gradient_norm(self):
        norm = torch.cat([leaf.grad.flatten() for leaf in self.leaves]).norm()
        for leaf in self.leaves:
            leaf.grad = None
        return float(norm)


def _job(folder, stage):
    config = SimpleNamespace(signals=SimpleNamespace(k=K), student=SimpleNamespace(gpus=0))
    spec = SimpleNamespace(teachers=("t0", "t1"))
    return SimpleNamespace(stage=stage, folder=folder, identity="this", name="01-x", config=config, spec=spec)


def _norms(case, stage):
    """|grad L_SFT| and |grad L_D|, each on its own."""
    found = []
    for lam in (0.0, 1.0):
        output = case.output(preferences=False)
        loss, _ = METHODS[stage.method](stage.model_copy(update={"lam": lam}), output, case.batch, case.batch.counts)
        found.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, (case.hidden, case.weight))]).norm())
    return found


@pytest.fixture
def measured(tmp_path):
    stage = InfiFusion(balance=0.3)
    case = make_case(stage, stage.targets)
    return tmp_path, stage, case, Leaves(case)


def test_lam_makes_the_distance_pull_as_strongly_as_asked(measured):
    folder, stage, case, engine = measured
    found, record = at_the_start(_job(folder, stage), engine, [case.batch], 0, 0)
    sft, distance = _norms(case, stage)
    assert record["distance_ratio"] == pytest.approx(float(distance / sft), rel=1e-5)
    assert found.lam == record["lam"]
    assert found.lam * float(distance) == pytest.approx(0.3 * (1 - found.lam) * float(sft), rel=1e-5)
    assert all(leaf.grad is None for leaf in engine.leaves)  # the first step starts clean


def test_measuring_leaves_the_random_numbers_as_they_were(measured):
    folder, stage, case, engine = measured
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    at_the_start(_job(folder, stage), engine, [case.batch], 0, 0)
    assert torch.rand(1) == expected


def test_a_given_lam_is_kept_and_the_ratio_is_told(measured):
    folder = measured[0]
    stage = KL(lam=0.4, merge=None)
    case = make_case(stage, stage.targets)
    found, record = at_the_start(_job(folder, stage), Leaves(case), [case.batch], 0, 0)
    assert found == stage
    sft, distance = _norms(case, stage)
    assert record == pytest.approx({"lam": 0.4, "distance_ratio": float(distance / sft)}, rel=1e-5)


def test_a_resumed_stage_goes_on_with_what_was_stored(measured):
    folder, stage, case, engine = measured
    first, record = at_the_start(_job(folder, stage), engine, [case.batch], 0, 0)
    with torch.no_grad():
        case.weight.mul_(3)  # the weights have moved on
    assert at_the_start(_job(folder, stage), engine, [case.batch], 0, 0) == (first, record)  # begun anew
    assert at_the_start(_job(folder, stage), engine, [case.batch], 40, 0) == (first, {})
    (folder / FILE).unlink()
    with pytest.raises(StudentError, match=r"01-x is at step 40, and .*balance.json is gone"):
        at_the_start(_job(folder, stage), engine, [case.batch], 40, 0)
    plain = InfiFusion(lam=0.1)
    assert at_the_start(_job(folder, plain), engine, [case.batch], 40, 0) == (plain, {})


def test_what_another_stage_stored_is_measured_again(measured):
    folder, stage, case, engine = measured
    (folder / FILE).write_text(json.dumps({"identity": "other", "ratio": 99.0, "lam": 0.9}))
    found, _ = at_the_start(_job(folder, stage), engine, [case.batch], 0, 0)
    assert found.lam < 0.5
    assert json.loads((folder / FILE).read_text())["identity"] == "this"


def test_only_the_first_worker_writes(measured):
    folder, stage, case, engine = measured
    at_the_start(_job(folder, stage), engine, [case.batch], 0, 1)
    assert not (folder / FILE).exists()


def test_a_stage_without_teachers_measures_nothing(measured):
    folder, _, case, engine = measured
    stage = SFT()
    assert at_the_start(_job(folder, stage), engine, [case.batch], 0, 0) == (stage, {})


@pytest.mark.parametrize("ratio", [0.0, float("inf"), float("nan")])
def test_no_lam_balances_a_distance_that_says_nothing(ratio):
    with pytest.raises(StudentError, match=rf"01-x: no lam gives balance 0.3: .*{ratio:g} times"):
        balanced_lam("01-x", 0.3, ratio)


def test_the_routers_loss_is_part_of_the_step_and_not_of_the_ratio(measured):
    folder, stage, case, engine = measured
    parts, totals = accumulate(_job(folder, stage), stage, engine, [case.batch])
    assert float(parts[0]["loss_router"]) == pytest.approx(5.0)
    assert totals.tokens == len(case.batch.labels)
    assert np.isfinite(float(parts[0]["loss"]))
