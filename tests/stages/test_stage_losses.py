"""The stages' losses against formulas written out over full logits."""

import dataclasses
import itertools
from time import perf_counter, sleep

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from rayfuse.batch import Counts, FusionBatch, TeacherTarget
from rayfuse.config import SFT, InfiFusion, InfiGFusion
from rayfuse.losses import fused_head, gw_couplings
from rayfuse.prepare.targets import graph_features, graph_matrices
from rayfuse.stages.infifusion import infifusion_loss
from rayfuse.stages.infigfusion import infigfusion_loss
from rayfuse.stages.sft import sft_loss

N, H, V, K = 23, 16, 50, 6


def _case(seed=0):
    make = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, H, generator=make, requires_grad=True)
    weight = torch.randn(V, H, generator=make, requires_grad=True)
    labels = torch.randint(0, V, (N,), generator=make)
    targets = []
    for s, weight_s in enumerate((1.0, 0.5)):
        rows = torch.randperm(N, generator=make)[: 10 + 3 * s].sort().values
        logps = torch.randn(len(rows), 40, generator=make).log_softmax(-1).topk(K).values.half()
        targets.append(TeacherTarget(f"t{s}", weight_s, rows.numpy(), logps.numpy()))
    empty = np.zeros((0,), dtype=np.int64)
    return hidden, weight, labels, FusionBatch(empty, empty, empty, labels.numpy(), empty, tuple(targets))


def _naive(hidden, weight, labels, batch, stage):
    logits = hidden @ weight.T
    total = 0.0
    for target in batch.targets:
        student = logits[torch.from_numpy(target.rows)].topk(K).values
        teacher = torch.from_numpy(target.logps).float()
        if stage.standardized:
            student = (student - student.mean(-1, True)) / (student.std(-1, keepdim=True) + 1e-7)
            teacher = (teacher - teacher.mean(-1, True)) / (teacher.std(-1, keepdim=True) + 1e-7)
        elif stage.space == "logits":  # one gauge: log-probabilities against log-probabilities
            student = student - logits[torch.from_numpy(target.rows)].logsumexp(-1, keepdim=True)
        if stage.space == "probs":
            student, teacher = student.softmax(-1), teacher.softmax(-1)
        total = total + target.weight * (student - teacher).abs().sum(-1).mean()
    if stage.over_teachers == "mean":
        total = total / len(batch.targets)
    return (1 - stage.lam) * F.cross_entropy(logits, labels) + stage.lam * total


@pytest.mark.parametrize(
    "stage",
    [
        InfiFusion(),
        InfiFusion(lam=0.1, over_teachers="mean"),
        InfiFusion(standardized=False, space="probs"),
        InfiFusion(standardized=False, space="logits"),
        InfiFusion(standardized=True, space="probs", lam=1.0),
        InfiFusion(lam=0.0),
    ],
)
def test_infifusion_equals_its_formula_in_value_and_gradient(stage):
    hidden, weight, labels, batch = _case()
    head = fused_head(hidden, weight, labels, K, lse_gradient=stage.lse_gradient)
    loss, parts = infifusion_loss(stage, head, batch, batch.counts)
    grads = torch.autograd.grad(loss, (hidden, weight))
    naive = _naive(hidden, weight, labels, batch, stage)
    expected = torch.autograd.grad(naive, (hidden, weight))
    torch.testing.assert_close(loss, naive, rtol=1e-5, atol=1e-6)
    for mine, theirs in zip(grads, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
    assert set(parts) == {"loss_sft", "loss_uld/t0", "loss_uld/t1"}


def test_sft_is_the_mean_cross_entropy():
    hidden, weight, labels, batch = _case(1)
    loss, _ = sft_loss(SFT(), fused_head(hidden, weight, labels, 2), batch, Counts(N, 1))
    torch.testing.assert_close(loss, F.cross_entropy(hidden @ weight.T, labels), rtol=1e-5, atol=1e-6)


def test_micro_batches_add_up_to_the_global_batch():
    """However a batch is cut, the losses with the global denominators have the same sum."""
    hidden, weight, labels, whole = _case(2)
    stage = InfiFusion(lam=0.3)
    at_once, _ = infifusion_loss(stage, fused_head(hidden, weight, labels, K), whole, whole.counts)
    parts = []
    for start, stop in ((0, 4), (4, 15), (15, N)):
        targets = []
        for target in whole.targets:
            inside = (target.rows >= start) & (target.rows < stop)
            targets.append(
                TeacherTarget(target.teacher, target.weight, target.rows[inside] - start, target.logps[inside])
            )
        batch = FusionBatch(
            whole.input_ids, whole.input_ids, whole.input_ids, whole.labels[start:stop], whole.sample, tuple(targets)
        )
        head = fused_head(hidden[start:stop], weight, labels[start:stop], K)
        parts.append(infifusion_loss(stage, head, batch, whole.counts)[0])
    torch.testing.assert_close(sum(parts), at_once, rtol=1e-5, atol=1e-6)


def _graph_case(seed=3):
    """Two samples of 9 and 14 rows, two teachers with graphs of their own lengths."""
    hidden, weight, labels, batch = _case(seed)
    make = torch.Generator().manual_seed(seed + 1)
    sample = np.repeat([0, 1], [9, 14])
    teachers = [[torch.randn(L, 30, generator=make).log_softmax(-1).topk(K).values for L in (7, 16)] for _ in range(2)]
    targets = tuple(
        dataclasses.replace(target, graph=graph_features([rows.numpy() for rows in of_teacher]))
        for target, of_teacher in zip(batch.targets, teachers, strict=True)
    )
    input_ids = np.zeros((2, 1), dtype=np.int64)
    return (
        hidden,
        weight,
        labels,
        dataclasses.replace(batch, input_ids=input_ids, sample=sample, targets=targets),
        teachers,
    )


def _naive_graph(values):
    """Sorted row means of the cosine graph of log-softmax values [L, K], with the graph written out."""
    return _cosines(values).mean(1).sort().values


def _cosines(values):
    Z = values.log_softmax(-1)
    Z = Z / Z.norm(dim=0, keepdim=True)
    return Z.T @ Z


def target_distance(top, target):
    """L_s of the z-scored ranks, from the student's kept logits [N, K]."""
    sides = (top[torch.from_numpy(target.rows)], torch.from_numpy(target.logps).float())
    student, teacher = ((x - x.mean(-1, True)) / (x.std(-1, keepdim=True) + 1e-7) for x in sides)
    return (student - teacher).abs().sum(-1).mean()


def test_infigfusion_equals_its_formula_in_value_and_gradient():
    hidden, weight, labels, batch, teachers = _graph_case()
    stage = InfiGFusion(lam=0.4, alpha=0.7)
    head = fused_head(hidden, weight, labels, K)
    loss, parts = infigfusion_loss(stage, head, batch, batch.counts)
    grads = torch.autograd.grad(loss, (hidden, weight))
    top = (hidden @ weight.T).topk(K).values
    naive = _naive(hidden, weight, labels, batch, InfiFusion(lam=stage.lam))
    for target, of_teacher in zip(batch.targets, teachers, strict=True):
        distances = [
            (_naive_graph(top[torch.from_numpy(batch.sample) == b]) - _naive_graph(of_teacher[b])).abs().sum()
            for b in (0, 1)
        ]
        naive = naive + stage.lam * stage.alpha * target.weight * torch.stack(distances).mean()
    torch.testing.assert_close(loss, naive, rtol=1e-4, atol=1e-5)
    for mine, theirs in zip(grads, torch.autograd.grad(naive, (hidden, weight), retain_graph=True), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)
    ranks = [target_distance(top, target) for target in batch.targets]
    graph_part = naive - _naive(hidden, weight, labels, batch, InfiFusion(lam=stage.lam))
    rank_part = stage.lam * sum(target.weight * rank for target, rank in zip(batch.targets, ranks, strict=True))
    norms = [torch.autograd.grad(part, top, retain_graph=True)[0].norm() for part in (graph_part, rank_part)]
    assert float(parts["gradient_ratio"]) == pytest.approx(float(norms[0] / norms[1]), rel=1e-3)


def test_exact_infigfusion_is_the_minimum_over_all_couplings(monkeypatch):
    """K! permutations written out: the graphs are Gram matrices, so one of them is the minimum (see losses/gw.py)."""
    hidden, weight, labels, batch, teachers = _graph_case(10)
    matrices = [graph_matrices([rows.numpy() for rows in of_teacher]) for of_teacher in teachers]
    exact = [dataclasses.replace(target, graph=graph) for target, graph in zip(batch.targets, matrices, strict=True)]
    batch = dataclasses.replace(batch, targets=tuple(exact))
    sent = []

    def begin_couplings(student, graphs):
        sent.append(student.detach().double().numpy())
        return lambda: sleep(0.05) or [torch.from_numpy(gw_couplings(sent[0], graph)) for graph in graphs]

    monkeypatch.setattr("rayfuse.stages.couplings.begin_couplings", begin_couplings)
    stage = InfiGFusion(lam=0.4, alpha=30.0, mode="exact")
    begun = perf_counter()
    loss, parts = infigfusion_loss(stage, fused_head(hidden, weight, labels, K), batch, batch.counts)
    grads = torch.autograd.grad(loss, (hidden, weight))
    naive = _naive(hidden, weight, labels, batch, InfiFusion(lam=stage.lam))
    top = (hidden @ weight.T).topk(K).values
    for s, (target, of_teacher) in enumerate(zip(batch.targets, teachers, strict=True)):
        distances = []
        for b in (0, 1):
            C, D = (_cosines(rows) for rows in (top[torch.from_numpy(batch.sample) == b], of_teacher[b]))
            orders = [list(order) for order in itertools.permutations(range(K))]
            distances.append(torch.stack([(C - D[order][:, order]).square().mean() for order in orders]).min())
        expected = torch.stack(distances).mean()
        torch.testing.assert_close(parts[f"loss_gld/t{s}"], expected.detach(), rtol=1e-4, atol=1e-6)
        naive = naive + stage.lam * stage.alpha * target.weight * expected
    torch.testing.assert_close(loss, naive, rtol=1e-4, atol=1e-5)
    for mine, theirs in zip(grads, torch.autograd.grad(naive, (hidden, weight)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)
    assert len(sent) == 1
    assert 0.05 <= float(parts["coupling_wait"]) <= perf_counter() - begun


def test_infigfusion_without_graphs_is_infifusion():
    hidden, weight, labels, batch, _ = _graph_case(5)
    plain, _ = infifusion_loss(InfiFusion(lam=0.4), fused_head(hidden, weight, labels, K), batch, batch.counts)
    head = fused_head(hidden, weight, labels, K)
    without, _ = infigfusion_loss(InfiGFusion(lam=0.4, alpha=0.0), head, batch, batch.counts)
    torch.testing.assert_close(without, plain)
