"""The losses in optimal transport against POT and formulas written out, position by position over full logits."""

import dataclasses

import numpy as np
import ot
import pytest
import torch
from torch.nn import functional as F

from rayfuse.batch import FusionBatch, TeacherTarget
from rayfuse.config import MultiLevelOT, Sinkhorn, WassersteinKL
from rayfuse.losses import fused_head
from rayfuse.stages.multilevelot import multilevelot_loss
from rayfuse.stages.sinkhorn import sinkhorn_loss
from rayfuse.stages.wasserstein_kl import wasserstein_kl_loss

N, H, V, K = 17, 12, 30, 6
LENGTHS = (7, 10)


def _case(seed=0):
    """Hidden states, head, labels and a batch of two samples and two teachers."""
    make = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, H, generator=make, requires_grad=True)
    weight = torch.randn(V, H, generator=make, requires_grad=True)
    labels = torch.randint(0, V, (N,), generator=make)
    targets = []
    for s, weight_s in enumerate((1.0, 0.5)):
        rows = torch.randperm(N, generator=make)[: 9 + 3 * s].sort().values.numpy()
        top = (torch.randn(len(rows), 2 * V, generator=make) * 2).log_softmax(-1).topk(K)
        targets.append(TeacherTarget(f"t{s}", weight_s, rows, top.values.numpy(), teacher_ids=top.indices.numpy()))
    none, sample = np.zeros(0, dtype=np.int64), np.repeat([0, 1], LENGTHS)
    batch = FusionBatch(np.zeros((2, 1), dtype=np.int64), none, none, labels.numpy(), sample, tuple(targets))
    return hidden, weight, labels, batch


def _check(loss_of, stage, naive_of, seed=0):
    """Value and gradients against (1 - lam) CE + lam sum_s w_s naive_of(logits at the rows, teacher)."""
    hidden, weight, labels, batch = _case(seed)
    loss, parts = loss_of(stage, fused_head(hidden, weight, labels, K, chunk=8), batch, batch.counts)
    grads = torch.autograd.grad(loss, (hidden, weight))
    logits = hidden @ weight.T
    naive = (1 - stage.lam) * F.cross_entropy(logits, labels)
    for s, target in enumerate(batch.targets):
        distance = naive_of(logits[torch.from_numpy(target.rows)], target, batch.sample[target.rows])
        (name,) = [name for name in parts if name.endswith(f"/t{s}")]
        torch.testing.assert_close(parts[name], distance.detach().float(), rtol=1e-4, atol=1e-6)
        naive = naive + stage.lam * target.weight * distance
    torch.testing.assert_close(loss.double(), naive.double(), rtol=1e-4, atol=1e-5)
    for mine, theirs in zip(grads, torch.autograd.grad(naive, (hidden, weight)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)


def _distributions(logits_PV, target, temperature):
    student = (logits_PV.topk(K).values.double() / temperature).softmax(1)
    return student, (torch.from_numpy(target.logps).double() / temperature).softmax(1)


LINE = np.abs(np.arange(K)[:, None] - np.arange(K)[None]) / (K - 1)


@pytest.mark.parametrize("stage", [Sinkhorn(lam=0.4), Sinkhorn(temperature=2, regularisation=0.2, iterations=25)])
def test_sinkhorn_is_pots_plan_at_every_position(stage):
    costs = torch.from_numpy(LINE)

    def naive(logits_PV, target, sample_P):
        options = {"numItermax": stage.iterations, "stopThr": 0.0, "warn": False}
        pairs = zip(*_distributions(logits_PV, target, stage.temperature), strict=True)
        plans = [ot.sinkhorn(p, q, costs, stage.regularisation, **options) for p, q in pairs]
        return torch.stack([(plan * costs).sum() for plan in plans]).mean()

    _check(sinkhorn_loss, stage, naive)


@pytest.mark.parametrize("stage", [WassersteinKL(lam=0.4), WassersteinKL(mix=1.0, temperature=2), WassersteinKL(mix=0)])
def test_wasserstein_kl_is_pots_exact_transport_and_torchs_divergence(stage):
    """POT's emd2 on torch tensors has the gradient of the exact transport's value (its dual potentials)."""
    costs = torch.from_numpy(LINE)

    def naive(logits_PV, target, sample_P):
        p_Pk, q_Pk = _distributions(logits_PV, target, stage.temperature)
        moved = torch.stack([ot.emd2(p, q, costs) for p, q in zip(p_Pk, q_Pk, strict=True)]).mean()
        kl = F.kl_div(p_Pk.log(), q_Pk, reduction="batchmean") * stage.temperature**2
        return stage.mix * moved + (1 - stage.mix) * kl

    _check(wasserstein_kl_loss, stage, naive)


def _dense(values_Pk, ids_Pk, width):
    """The scaled distributions over a whole vocabulary, then the columns with most mass: with 0 where not kept."""
    scaled = (values_Pk / (values_Pk.std(1, keepdim=True) + 1e-4)).softmax(1)
    dense = scaled.new_zeros(len(scaled), int(ids_Pk.max()) + 1).scatter(1, ids_Pk, scaled)
    order = dense.detach().sum(0).argsort(descending=True, stable=True)[:width]
    return F.pad(dense[:, order], (0, width - len(order)))


@pytest.mark.parametrize("stage", [MultiLevelOT(lam=0.4), MultiLevelOT(channels=8, sequence_weight=400.0, ce_weight=2)])
def test_multilevelot_is_the_authors_formula_on_what_is_kept(stage):
    def naive(logits_PV, target, sample_P):
        top = logits_PV.topk(K)
        S = _dense(top.values, top.indices, stage.channels)
        T = _dense(torch.from_numpy(target.logps), torch.from_numpy(target.teacher_ids), stage.channels)
        token = (S - T).abs().sum(-1).mean() - stage.ce_weight * (S.softmax(-1) * T.log_softmax(-1)).sum(-1).mean()
        sequence = []
        for b in (0, 1):
            own = torch.from_numpy(sample_P == b)
            costs = torch.cdist((T[own] / 2).softmax(-1), (S[own] / 2).softmax(-1), p=1)
            plan = torch.exp(-costs / 0.1)
            for _ in range(10):
                plan = plan / plan.sum(1, keepdim=True)
                plan = plan / plan.sum(0, keepdim=True)
            sequence.append((plan * costs).sum())
        return token + stage.sequence_weight * 0.001 * torch.stack(sequence).mean()

    _check(multilevelot_loss, stage, naive)


@pytest.mark.parametrize(
    ("loss_of", "stage"), [(sinkhorn_loss, Sinkhorn()), (wasserstein_kl_loss, WassersteinKL())], ids=["sinkhorn", "wkl"]
)
def test_losses_of_parts_of_a_batch_add_up(loss_of, stage):
    hidden, weight, labels, whole = _case(3)
    at_once, _ = loss_of(stage, fused_head(hidden, weight, labels, K), whole, whole.counts)
    total = 0.0
    for start, stop in ((0, 7), (7, N)):
        targets = []
        for target in whole.targets:
            inside = (target.rows >= start) & (target.rows < stop)
            targets.append(dataclasses.replace(target, rows=target.rows[inside] - start, logps=target.logps[inside]))
        part = dataclasses.replace(whole, labels=whole.labels[start:stop], targets=tuple(targets))
        head = fused_head(hidden[start:stop], weight, labels[start:stop], K)
        total = total + loss_of(stage, head, part, whole.counts)[0]
    torch.testing.assert_close(total, at_once, rtol=1e-5, atol=1e-6)


def test_a_teacher_that_meets_the_student_nowhere_costs_nothing():
    hidden, weight, labels, batch = _case(4)
    empty = [
        dataclasses.replace(t, rows=t.rows[:0], logps=t.logps[:0], teacher_ids=t.teacher_ids[:0]) for t in batch.targets
    ]
    batch = dataclasses.replace(batch, targets=tuple(empty))
    methods = ((sinkhorn_loss, Sinkhorn()), (wasserstein_kl_loss, WassersteinKL()), (multilevelot_loss, MultiLevelOT()))
    for loss_of, stage in methods:
        loss, _ = loss_of(stage, fused_head(hidden, weight, labels, K), batch, batch.counts)
        sft = F.cross_entropy(hidden @ weight.T, labels)
        torch.testing.assert_close(loss, (1 - stage.lam) * sft, rtol=1e-5, atol=1e-6)
        assert torch.isfinite(torch.autograd.grad(loss, hidden)[0]).all()
