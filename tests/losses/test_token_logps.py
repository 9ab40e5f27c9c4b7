"""Differentiable log-probabilities of given tokens, against torch's cross_entropy on full logits."""

import pytest
import torch

from rayfuse.losses import fused_head, token_logps
from tests.doubles import LargestTensor
from tests.losses.test_fused_head import HEADS, head_inputs, naive


def preference_loss(logps):
    """A loss whose weight on each half depends on both halves, as a preference loss does."""
    middle = len(logps) // 2
    return -torch.nn.functional.logsigmoid(logps[:middle].mean() - logps[middle:].mean())


@pytest.mark.parametrize("head", HEADS, ids=str)
@pytest.mark.parametrize("chunk", [1, 7, None])
def test_equals_full_logits(head, chunk):
    hidden, weight, bias, labels = head_inputs(with_bias=True)
    leaves = (hidden, weight, bias)
    ours = token_logps(hidden, weight, labels, bias=bias, chunk=chunk, **HEADS[head])
    theirs = naive(hidden, weight, labels, 1, bias=bias, **HEADS[head]).label_logps
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    got, want = (torch.autograd.grad(preference_loss(logps), leaves) for logps in (ours, theirs))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * b.abs().max().item())


@pytest.mark.parametrize("head", HEADS, ids=str)
def test_gradients_equal_finite_differences(head):
    hidden, weight, bias, labels = head_inputs(torch.float64, N=5, H=3, V=60, with_bias=True)
    labels = torch.where(labels < 0, labels, labels % 40)
    options = HEADS[head] | ({"valid_vocab": 50} if "valid_vocab" in HEADS[head] else {})
    assert torch.autograd.gradcheck(
        lambda *leaves: token_logps(leaves[0], leaves[1], labels, bias=leaves[2], chunk=2, **options),
        (hidden, weight, bias),
    )


def test_agrees_with_the_fused_head_to_the_bit():
    hidden, weight, _, labels = head_inputs(torch.bfloat16)
    logps = token_logps(hidden, weight, labels, chunk=7)
    assert torch.equal(logps.detach(), fused_head(hidden, weight, labels, 10, chunk=7).label_logps)


def test_no_tensor_is_larger_than_a_chunk_or_the_weight_gradient():
    N, H, V, chunk = 64, 8, 2003, 8
    hidden, weight, _, labels = head_inputs(N=N, H=H, V=V)
    with LargestTensor((hidden, weight)) as seen:
        preference_loss(token_logps(hidden, weight, labels, chunk=chunk)).backward()
    assert max(seen.sizes) <= max(chunk * V, V * H)
