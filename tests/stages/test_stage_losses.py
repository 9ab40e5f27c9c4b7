"""The stages' losses against formulas written out over full logits."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from rayfuse.batch import FusionBatch, TeacherTarget
from rayfuse.config import SFT, InfiFusion
from rayfuse.losses import fused_head
from rayfuse.stages.infifusion import infifusion_loss
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
        InfiFusion(standardized=True, space="probs", lam=1.0),
        InfiFusion(lam=0.0),
    ],
)
def test_infifusion_equals_its_formula_in_value_and_gradient(stage):
    hidden, weight, labels, batch = _case()
    loss, parts = infifusion_loss(stage, fused_head(hidden, weight, labels, K), batch, batch.counts)
    grads = torch.autograd.grad(loss, (hidden, weight))
    naive = _naive(hidden, weight, labels, batch, stage)
    expected = torch.autograd.grad(naive, (hidden, weight))
    torch.testing.assert_close(loss, naive, rtol=1e-5, atol=1e-6)
    for mine, theirs in zip(grads, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
    assert set(parts) == {"loss_sft", "loss_uld/t0", "loss_uld/t1"}


def test_sft_is_the_mean_cross_entropy():
    hidden, weight, labels, batch = _case(1)
    loss, _ = sft_loss(SFT(), fused_head(hidden, weight, labels, 2), batch, np.array([N]))
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
