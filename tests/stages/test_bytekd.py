"""Byte-prefix distillation's loss against a dense cross-entropy with soft targets."""

import numpy as np
import torch
from torch.nn import functional as F

from rayfuse.batch import FusionBatch
from rayfuse.config import ByteKD
from rayfuse.losses import fused_head
from rayfuse.stages.bytekd import bytekd_loss

N, H, V, M = 19, 12, 40, 5


def test_equals_dense_cross_entropy_with_the_mixed_target():
    make = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, H, generator=make, requires_grad=True)
    weight = torch.randn(V, H, generator=make, requires_grad=True)
    labels = torch.randint(0, V, (N,), generator=make)
    ids = torch.stack([torch.randperm(V, generator=make)[:M] for _ in range(N)])
    ids[:, 0] = labels
    mass = torch.rand(N, M, generator=make)
    mass[2] = torch.tensor([1.0, 0, 0, 0, 0])
    mass = mass / mass.sum(1, keepdim=True)
    none = np.zeros(0, dtype=np.int64)
    batch = FusionBatch(none, none, none, labels.numpy(), none, picks=ids.numpy(), mass=mass.numpy().astype(np.float32))
    stage = ByteKD(lam=0.3)
    head = fused_head(hidden, weight, labels, 3, picks=ids, chunk=4)
    loss, parts = bytekd_loss(stage, head, batch, batch.counts)
    grads = torch.autograd.grad(loss, (hidden, weight))

    logits = hidden @ weight.T
    teacher = torch.zeros(N, V).scatter_add_(1, ids, mass)
    target = (1 - stage.lam) * F.one_hot(labels, V) + stage.lam * teacher
    expected = F.cross_entropy(logits, target)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(grads, torch.autograd.grad(expected, (hidden, weight), retain_graph=True), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    kl = F.kl_div(logits.log_softmax(-1), teacher, reduction="batchmean")
    torch.testing.assert_close(parts["loss_kl"], kl.detach(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(parts["label_mass"], mass[:, 0].mean())
