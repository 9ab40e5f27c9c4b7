"""Divergences on cells of the vocabulary, against dense ones of torch and against finite differences."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import Categorical, kl_divergence

from rayfuse.errors import LossError
from rayfuse.losses import UNUSED, advantage_losses, cell_logps, divergences, used_columns

N, V = 7, 11
KINDS = ("jsd", "reverse", "forward")


def _draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _dense(kind, logits, teacher):
    """Over the whole vocabulary, by torch.distributions."""
    p, q = Categorical(logits=logits), Categorical(probs=teacher)
    if kind == "forward":
        return kl_divergence(q, p)
    if kind == "reverse":
        return kl_divergence(p, q)
    m = Categorical(probs=(p.probs + q.probs) / 2)
    return (kl_divergence(q, m) + kl_divergence(p, m)) / 2


def _value(kind, logits, picks, mass, cells, bound=20.0):
    logp = cell_logps(logits.gather(1, picks), logits.logsumexp(1), cells)
    return divergences(kind, logp, mass, used_columns(cells), bound)


def _everything():
    picks = torch.stack([torch.randperm(V, generator=torch.Generator().manual_seed(n)) for n in range(N)])
    return picks, torch.arange(V).expand(N, V)


@pytest.mark.parametrize("kind", KINDS)
def test_a_support_of_the_whole_vocabulary_gives_the_dense_divergence_and_its_gradient(kind):
    logits = (2 * _draw(N, V)).requires_grad_()
    teacher = (2 * _draw(N, V, seed=1)).softmax(1)
    picks, cells = _everything()
    found = _value(kind, logits, picks, teacher.gather(1, picks), cells)
    expected = _dense(kind, logits, teacher)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
    (mine,) = torch.autograd.grad(found.sum(), logits)
    (theirs,) = torch.autograd.grad(expected.sum(), logits)
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_the_rest_is_one_outcome_and_a_cell_is_the_sum_of_its_tokens(kind):
    """The oracle merges the tokens first: {3, 5}, {0}, and all others."""
    logits = (2 * _draw(N, V)).requires_grad_()
    teacher = (2 * _draw(N, V, seed=1)).softmax(1)
    picks = torch.tensor([[3, 0, 5, 3]]).expand(N, 4)
    cells = torch.tensor([[0, 1, 0, UNUSED]]).expand(N, 4)

    def merged(chances):
        two = torch.stack([chances[:, 3] + chances[:, 5], chances[:, 0]], 1)
        return torch.cat([two, 1 - two.sum(1, keepdim=True)], 1)

    mass = torch.cat([merged(teacher)[:, :2], torch.zeros(N, 2, dtype=torch.float64)], 1)
    found = _value(kind, logits, picks, mass, cells)
    expected = _dense(kind, merged(logits.softmax(1)).log(), merged(teacher))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
    assert (found <= _dense(kind, logits, teacher) + 1e-9).all(), "merging tokens cannot raise a divergence"
    (mine,) = torch.autograd.grad(found.sum(), logits)
    (theirs,) = torch.autograd.grad(expected.sum(), logits)
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_finite_differences_with_the_support_held(kind):
    """By definition nothing flows through the choice: what changes the ranks leaves the picks as they are."""
    logits = _draw(2, V).requires_grad_()
    picks = logits.detach().topk(3).indices
    cells = torch.tensor([[0, 1, 1], [0, 1, 2]])
    mass = torch.tensor([[0.5, 0.2, 0.0], [0.1, 0.6, 0.1]], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda z: _value(kind, z, picks, mass, cells), logits, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_a_teacher_that_is_the_student_gives_zero_and_no_gradient(kind):
    logits = (3 * _draw(N, V)).requires_grad_()
    picks, cells = logits.detach().topk(4).indices, torch.arange(4).expand(N, 4)
    mass = logits.detach().softmax(1).gather(1, picks)
    found = _value(kind, logits, picks, mass, cells, bound=30.0)
    (gradient,) = torch.autograd.grad(found.sum(), logits)
    assert found.abs().max() < 1e-9
    assert gradient.abs().max() < 1e-8


@given(st.sampled_from(KINDS), st.floats(1.0, 12.0), st.floats(0.1, 60.0), st.integers(0, 50))
def test_the_bound_holds_for_any_student_in_float32(kind, bound, scale, seed):
    logits = (scale * _draw(N, V, seed=seed)).float().requires_grad_()
    teacher = (scale * _draw(N, V, seed=seed + 1)).softmax(1).float()
    picks, cells = teacher.topk(3).indices, torch.arange(3).expand(N, 3)
    found = _value(kind, logits, picks, teacher.gather(1, picks), cells, bound)
    (gradient,) = torch.autograd.grad(found.sum(), logits)
    assert torch.isfinite(gradient).all()
    assert (found >= -1e-5).all()
    assert (found <= bound + 1e-4).all()
    assert (gradient.norm(dim=1) <= 2 * bound + 2).all()


def test_a_value_above_the_bound_keeps_the_direction_of_its_gradient():
    logits = torch.tensor([[0.0, 0.0, 30.0]], dtype=torch.float64, requires_grad=True)
    picks, cells = torch.tensor([[0, 1]]), torch.tensor([[0, 1]])
    mass = torch.tensor([[0.9, 0.1]], dtype=torch.float64)
    low = _value("forward", logits, picks, mass, cells, 5.0)
    high = _value("forward", logits, picks, mass, cells, 60.0)
    assert low.item() == pytest.approx(5.0)
    assert high.item() > 25
    (small,) = torch.autograd.grad(low.sum(), logits)
    (large,) = torch.autograd.grad(high.sum(), logits)
    torch.testing.assert_close(small / small.norm(), large / large.norm(), rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(small.norm() / large.norm(), 5.0 / high[0].detach(), rtol=2e-2, atol=0)


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(LossError, match=r"picked \(2, 3\) and cells \(2, 4\) must have one shape"):
        cell_logps(torch.zeros(2, 3), torch.zeros(2), torch.zeros(2, 4, dtype=torch.long))


def test_advantages_belong_to_chunks_are_bounded_and_carry_no_gradient_of_their_own():
    """Two chunks of two and one tokens, and a token in none."""
    logps = torch.tensor([-1.0, -0.5, -0.2, -3.0], dtype=torch.float64, requires_grad=True)
    chunks = torch.tensor([0, 0, 1, UNUSED])
    teacher = torch.tensor([-2.0, -2.0, -40.0, 0.0], dtype=torch.float64)
    found = advantage_losses(logps, chunks, teacher, 10.0)
    advantage = torch.tensor([-0.5, -0.5, -10.0, 0.0], dtype=torch.float64)
    torch.testing.assert_close(found, -advantage * logps)
    (gradient,) = torch.autograd.grad(found.sum(), logps)
    torch.testing.assert_close(gradient, -advantage)


def test_in_expectation_the_advantage_has_the_gradient_of_the_reverse_divergence():
    """Summed over all tokens of one position, weighted by how often the student writes them."""
    logits, teacher = _draw(1, V).requires_grad_(), _draw(1, V, seed=1).log_softmax(1)[0]
    logps = logits.log_softmax(1)[0]
    losses = advantage_losses(logps, torch.arange(V), teacher, math.inf)
    (mine,) = torch.autograd.grad((losses * logps.detach().exp()).sum(), logits, retain_graph=True)
    (theirs,) = torch.autograd.grad(_dense("reverse", logits, teacher.exp()[None]).sum(), logits)
    torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-9)
