"""The held-coupling distance against POT: its value, its gradient, finite differences of its minimum, and all k!."""

import itertools
import math

import numpy as np
import ot
import pytest
import torch

from rayfuse.errors import LossError
from rayfuse.losses import gauge, gld_features, gld_graphs, gw_couplings, gw_distance


def random_logits(L, k, seed):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(L, k, generator=generator, dtype=torch.float64) * 3).sort(dim=-1, descending=True).values


def graph(logits):
    return gld_graphs(gauge(logits), torch.zeros(len(logits), dtype=torch.int64), 1)


def held(C, D):
    """The distance at POT's coupling of the detached graphs, and that coupling."""
    coupling = gw_couplings(C.detach().numpy(), D.numpy())
    return gw_distance(C, D, torch.from_numpy(coupling)), coupling


def all_permutations(C, D):
    """The minimum over all k! permutations, written out: the true one, for Gram matrices."""
    C, D, k = C[0].numpy(), D[0].numpy(), len(C[0])
    orders = (list(order) for order in itertools.permutations(range(k)))
    return min(((C - D[np.ix_(order, order)]) ** 2).mean() for order in orders)


def test_graphs_are_the_cosines_and_their_sorted_row_means_the_features():
    lengths = torch.tensor([5, 1, 9])
    values = gauge(torch.cat([random_logits(int(L), 6, seed) for seed, L in enumerate(lengths)]))
    sample = torch.repeat_interleave(torch.arange(3), lengths)
    graphs = gld_graphs(values, sample, 3)
    for b, part in enumerate(values.split(lengths.tolist())):
        expected = torch.nn.functional.cosine_similarity(part[:, :, None], part[:, None, :], dim=0)
        torch.testing.assert_close(graphs[b], expected)
    torch.testing.assert_close(graphs.mean(2).sort(1).values, gld_features(values, sample, 3))


@pytest.mark.parametrize("k", [2, 3, 4, 5, 6])
def test_value_is_that_of_pot_and_the_minimum_over_all_permutations(k):
    """On 20 random pairs: never above POT from its own start, never below the true minimum, and at it nearly always."""
    reached = 0
    for seed in range(20):
        C, D = graph(random_logits(4 + seed % 7, k, seed)), graph(random_logits(5 + seed % 5, k, 1000 + seed))
        value, coupling = held(C, D)
        uniform = np.full(k, 1 / k)
        pot = ot.gromov.gromov_wasserstein2(C[0].numpy(), D[0].numpy(), uniform, uniform, "square_loss")
        again = ot.gromov.gromov_wasserstein2(
            C[0].numpy(), D[0].numpy(), uniform, uniform, "square_loss", G0=coupling[0]
        )
        lowest = all_permutations(C, D)
        assert value.item() == pytest.approx(again, rel=1e-9, abs=1e-15)
        assert lowest - 1e-12 <= value.item() <= pot + 1e-12
        reached += math.isclose(value.item(), lowest, rel_tol=1e-9, abs_tol=1e-14)
    assert reached >= 18


@pytest.mark.parametrize("k", [2, 3, 4, 5, 6])
def test_gradient_is_that_of_pots_minimum_by_finite_differences(k):
    """Along three random directions of the student's logits, with the graphs solved anew on both sides, to 1e-5."""
    h = 1e-5
    for seed in range(3):
        logits, D = random_logits(7, k, seed).requires_grad_(), graph(random_logits(6, k, 50 + seed))
        (gradient,) = torch.autograd.grad(held(graph(logits), D)[0].sum(), logits)
        direction = torch.randn(logits.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        with torch.no_grad():
            sides = [held(graph(logits + sign * h * direction), D)[0].item() for sign in (1, -1)]
        slope = (sides[0] - sides[1]) / (2 * h)
        assert (gradient * direction).sum().item() == pytest.approx(slope, rel=1e-5, abs=1e-9)
        assert gradient.norm() > 1e-6


def test_gradient_on_the_graph_is_the_one_pot_gives():
    """POT's torch backend sets the gradient of its minimum with respect to C itself."""
    C = graph(random_logits(8, 7, 3)).requires_grad_()
    D = graph(random_logits(9, 7, 4))
    value, coupling = held(C, D)
    (mine,) = torch.autograd.grad(value.sum(), C)
    theirs = C.detach()[0].clone().requires_grad_()
    uniform = torch.full((7,), 1 / 7, dtype=torch.float64)
    pot = ot.gromov.gromov_wasserstein2(theirs, D[0], uniform, uniform, "square_loss", G0=torch.from_numpy(coupling[0]))
    pot.backward()
    assert value.item() == pytest.approx(pot.item(), rel=1e-9)
    torch.testing.assert_close(mine[0], theirs.grad)


def test_gradcheck_with_the_coupling_held():
    logits, D = random_logits(5, 4, 7).requires_grad_(), graph(random_logits(6, 4, 8))
    coupling = torch.from_numpy(gw_couplings(graph(logits).detach().numpy(), D.numpy()))
    assert torch.autograd.gradcheck(lambda values: gw_distance(graph(values), D, coupling), (logits,))


def test_zero_for_equal_graphs_whatever_the_order_of_their_nodes():
    for seed in range(5):
        C = graph(random_logits(9, 6, seed))
        order = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
        assert held(C, C)[0].item() == pytest.approx(0, abs=1e-12)
        assert held(C, C[:, order][:, :, order])[0].item() == pytest.approx(0, abs=1e-12)


def test_couplings_are_couplings_and_a_batch_equals_its_pairs():
    C = torch.cat([graph(random_logits(9, 5, seed)) for seed in range(4)])
    D = torch.cat([graph(random_logits(8, 5, 20 + seed)) for seed in range(4)])
    values, coupling = held(C, D)
    np.testing.assert_allclose(coupling.sum(1), 1 / 5, atol=1e-12)
    np.testing.assert_allclose(coupling.sum(2), 1 / 5, atol=1e-12)
    assert coupling.min() >= 0
    for b in range(4):
        torch.testing.assert_close(values[b : b + 1], held(C[b : b + 1], D[b : b + 1])[0])


def test_refuses_what_does_not_fit():
    with pytest.raises(LossError, match=r"two arrays \[B, k, k\], got \(1, 2, 2\) and \(1, 3, 3\)"):
        gw_couplings(np.ones((1, 2, 2)), np.ones((1, 3, 3)))
    with pytest.raises(LossError, match=r"couplings \[B, k, k\], got \(1, 2, 2\), \(1, 2, 2\), \(2, 2\)"):
        gw_distance(torch.ones(1, 2, 2), torch.ones(1, 2, 2), torch.ones(2, 2))
