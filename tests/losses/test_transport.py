"""Batched transport against POT, one problem at a time: values, plans and gradients."""

import numpy as np
import ot
import pytest
import torch

from rayfuse.errors import LossError
from rayfuse.losses.transport import channels, rank_costs, sinkhorn_plan, sinkhorn_positions, wasserstein_ranks


def masses(N, k, seed):
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(N, k, generator=generator, dtype=torch.float64)).softmax(dim=1)


@pytest.mark.parametrize(("k", "m", "iterations"), [(2, 2, 1), (5, 5, 10), (10, 7, 10), (6, 6, 300)])
def test_plans_and_gradients_are_pots_after_as_many_iterations(k, m, iterations):
    """POT's own Sinkhorn on torch tensors, differentiated through its iterations, problem by problem."""
    costs = torch.rand(k, m, generator=torch.Generator().manual_seed(k), dtype=torch.float64)
    a, b = masses(4, k, 0).requires_grad_(), masses(4, m, 1)
    plans = sinkhorn_plan(a, b, costs, 0.05, iterations)
    (gradient,) = torch.autograd.grad((plans * costs).sum(), a)
    torch.testing.assert_close(plans.sum(2), a)
    for n in range(4):
        alone = a[n].detach().clone().requires_grad_()
        pot = ot.sinkhorn(alone, b[n], costs, 0.05, numItermax=iterations, stopThr=0.0, warn=False)
        torch.testing.assert_close(plans[n], pot, rtol=1e-7, atol=1e-12)
        (expected,) = torch.autograd.grad((pot * costs).sum(), alone)
        torch.testing.assert_close(gradient[n], expected, rtol=1e-5, atol=1e-8)


def test_little_entropy_is_exact_transport():
    a, b, costs = masses(5, 6, 2), masses(5, 6, 3), rank_costs(6).double()
    plans = sinkhorn_plan(a, b, costs, 0.002, 3000)
    torch.testing.assert_close(plans.sum(1), b, rtol=0, atol=2e-4)
    for n in range(5):
        assert (plans[n] * costs).sum().item() == pytest.approx(
            ot.emd2(a[n].numpy(), b[n].numpy(), costs.numpy()), abs=2e-3
        )


def test_a_mass_of_zero_has_a_finite_plan_and_gradient():
    a = torch.tensor([[1.0, 0.0, 0.0]], requires_grad=True)
    plans = sinkhorn_plan(a, torch.tensor([[0.0, 0.5, 0.5]]), rank_costs(3), 0.05, 10)
    (gradient,) = torch.autograd.grad((plans * rank_costs(3)).sum(), a)
    assert torch.isfinite(gradient).all()
    torch.testing.assert_close((plans * rank_costs(3)).sum(), torch.tensor(0.75))


@pytest.mark.parametrize("k", [2, 5, 10])
def test_ranks_on_a_line_are_pots_exact_transport(k):
    a, b = masses(6, k, 4).requires_grad_(), masses(6, k, 5)
    distances = wasserstein_ranks(a, b)
    where = np.arange(k) / (k - 1)
    for n in range(6):
        p, q = a[n].detach().numpy(), b[n].numpy()
        assert distances[n].item() == pytest.approx(ot.emd2(p, q, rank_costs(k).double().numpy()), rel=1e-6)
        assert distances[n].item() == pytest.approx(ot.wasserstein_1d(where, where, p, q, p=1), rel=1e-9)
    assert torch.autograd.gradcheck(
        lambda values: wasserstein_ranks(values.softmax(1), b), (a.detach().log().requires_grad_(),)
    )


def test_channels_are_one_order_for_all_positions():
    """Tokens by summed mass, written out with a dictionary."""
    generator = torch.Generator().manual_seed(6)
    mass = masses(12, 4, 7).requires_grad_()
    ids = torch.stack([torch.randperm(9, generator=generator)[:4] * 1000 for _ in range(12)])
    for width in (3, 9, 20):
        totals = {}
        for row, tokens in zip(mass.tolist(), ids.tolist(), strict=True):
            for value, token in zip(row, tokens, strict=True):
                totals[token] = totals.get(token, 0.0) + value
        order = sorted(totals, key=lambda token: -totals[token])[:width]
        expected = torch.zeros(12, width, dtype=torch.float64)
        for n, tokens in enumerate(ids.tolist()):
            for i, token in enumerate(tokens):
                if token in order:
                    expected[n, order.index(token)] = mass[n, i].detach()
        found = channels(mass, ids, width)
        torch.testing.assert_close(found.detach(), expected)
        kept = torch.tensor([[token in order for token in tokens] for tokens in ids.tolist()])
        (gradient,) = torch.autograd.grad(found.sum(), mass)
        assert torch.equal(gradient, kept.double())


def test_positions_of_a_batch_are_pots_plans_sample_by_sample():
    """POT with uniform masses on the transposed cost takes the authors' steps in order: rows first, columns last."""
    lengths = [4, 1, 0, 6]
    x, y = masses(11, 5, 8).requires_grad_(), masses(11, 5, 9)
    distances = sinkhorn_positions(x, y, lengths, 0.1, 10)
    (gradient,) = torch.autograd.grad(distances.sum(), x)
    assert distances[2] == 0
    for b, (one, other) in enumerate(zip(x.detach().split(lengths), y.split(lengths), strict=True)):
        n = len(one)
        if n == 0:
            continue
        alone = one.clone().requires_grad_()
        costs = (alone[:, None] - other[None]).abs().sum(-1)
        uniform = torch.full((n,), 1 / n, dtype=torch.float64)
        plan = n * ot.sinkhorn(uniform, uniform, costs.T, 0.1, numItermax=10, stopThr=0.0, warn=False).T
        expected = (plan * costs).sum()
        torch.testing.assert_close(distances[b], expected, rtol=1e-7, atol=1e-12)
        (of_sample,) = torch.autograd.grad(expected, alone)
        torch.testing.assert_close(gradient.split(lengths)[b], of_sample, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rank_costs(1), "at least 2 ranks, got 1"),
        (lambda: wasserstein_ranks(torch.ones(2, 3), torch.ones(2, 4)), r"got \(2, 3\), \(2, 4\)"),
        (lambda: sinkhorn_positions(torch.ones(3, 2), torch.ones(3, 2), [1, 1], 0.1, 1), "for 2 rows in all"),
    ],
)
def test_refuses_what_does_not_fit(call, message):
    with pytest.raises(LossError, match=message):
        call()
