"""The fused head against full logits: values, gradients, bits, and the largest tensor it makes."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from rayfuse.errors import LossError
from rayfuse.losses import fused_head, teacher_topk
from rayfuse.losses.head import chunk_size
from rayfuse.losses.topk import BLOCK, block_topk
from tests.doubles import LargestTensor

HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scale": {"scale": 0.0625},
    "softcap": {"softcap": 6.0},
    "padded": {"valid_vocab": 490},
    "all": {"scale": 1.7, "softcap": 9.0, "valid_vocab": 490},
}


def naive(hidden, weight, labels, k, *, bias=None, scale=1.0, softcap=None, valid_vocab=None, ignore_index=-100):
    """The same answer from [N, V] logits and torch's own cross_entropy and topk."""
    logits_NV = F.linear(hidden, weight, bias).to(torch.promote_types(hidden.dtype, torch.float32)) * scale
    if softcap is not None:
        logits_NV = softcap * torch.tanh(logits_NV / softcap)
    if valid_vocab is not None:
        logits_NV = logits_NV.masked_fill(torch.arange(len(weight)) >= valid_vocab, -torch.inf)
    top = logits_NV.topk(k)
    ignored = labels == ignore_index
    return SimpleNamespace(
        loss_ce=F.cross_entropy(logits_NV, labels, ignore_index=ignore_index),
        topk=top.values,
        ids=top.indices,
        lse=logits_NV.logsumexp(-1),
        label_logps=-F.cross_entropy(logits_NV, labels, ignore_index=ignore_index, reduction="none"),
        count=int((~ignored).sum()),
    )


def head_inputs(dtype=torch.float32, N=41, H=24, V=503, with_bias=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, H, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(V, H, generator=generator).to(dtype).requires_grad_()
    bias = torch.randn(V, generator=generator).to(dtype).requires_grad_() if with_bias else None
    labels = torch.randint(0, 490, (N,), generator=generator)
    labels[::5] = -100
    return hidden, weight, bias, labels


def loss_of(out):
    """Uses both differentiable outputs, with different gradients per rank."""
    return 0.3 * out.loss_ce + 0.7 * out.topk.softmax(-1)[:, 0].sum() + 0.01 * (out.topk * out.topk.detach()).sum()


@pytest.mark.parametrize("head", HEADS, ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("chunk", [1, 7, None])
def test_equals_full_logits_in_float32(head, with_bias, chunk):
    hidden, weight, bias, labels = head_inputs(with_bias=with_bias)
    leaves = [x for x in (hidden, weight, bias) if x is not None]
    ours = fused_head(hidden, weight, labels, 10, bias=bias, chunk=chunk, **HEADS[head])
    theirs = naive(hidden, weight, labels, 10, bias=bias, **HEADS[head])
    for name in ("loss_ce", "topk", "lse", "label_logps"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=1e-5, atol=1e-5, msg=name)
    assert torch.equal(ours.ids, theirs.ids)
    assert ours.count == theirs.count
    for got, want in zip(
        torch.autograd.grad(loss_of(ours), leaves), torch.autograd.grad(loss_of(theirs), leaves), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * want.abs().max().item())


@pytest.mark.parametrize("head", HEADS, ids=str)
@pytest.mark.parametrize("chunk", [7, None])
def test_losses_on_probabilities_have_the_gradient_of_full_logits(head, chunk):
    """With `lse_gradient`, through the log-sum-exp too, at positions with and without a label."""

    def loss(out):
        probs = (out.topk - out.lse[:, None]).exp()
        return loss_of(out) + (probs * torch.arange(10.0)).sum() + 0.1 * out.lse.square().mean()

    hidden, weight, bias, labels = head_inputs(with_bias=True)
    leaves = (hidden, weight, bias)
    ours = fused_head(hidden, weight, labels, 10, bias=bias, chunk=chunk, lse_gradient=True, **HEADS[head])
    theirs = naive(hidden, weight, labels, 10, bias=bias, **HEADS[head])
    for got, want in zip(
        torch.autograd.grad(loss(ours), leaves), torch.autograd.grad(loss(theirs), leaves), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * want.abs().max().item())
    alone = fused_head(hidden, weight, labels, 10, bias=bias, chunk=chunk, lse_gradient=True, **HEADS[head])
    for got, want in zip(
        torch.autograd.grad(alone.lse.sum(), leaves),
        torch.autograd.grad(naive(hidden, weight, labels, 10, bias=bias, **HEADS[head]).lse.sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * want.abs().max().item())


@pytest.mark.parametrize("head", HEADS, ids=str)
def test_equals_full_logits_in_float64_to_the_last_digits(head):
    hidden, weight, bias, labels = head_inputs(torch.float64, N=9, with_bias=True)
    outputs = [
        fused_head(hidden, weight, labels, 5, bias=bias, chunk=2, **HEADS[head]),
        naive(hidden, weight, labels, 5, bias=bias, **HEADS[head]),
    ]
    ours, theirs = (torch.autograd.grad(loss_of(out), (hidden, weight, bias)) for out in outputs)
    for got, want in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("head", HEADS, ids=str)
def test_gradients_equal_finite_differences(head):
    """One directional derivative per input, in float64: an oracle that shares nothing with autograd."""
    hidden, weight, bias, labels = head_inputs(torch.float64, N=6, H=5, with_bias=True)

    def value(*leaves):
        out = fused_head(leaves[0], leaves[1], labels, 4, bias=leaves[2], chunk=4, **HEADS[head])
        return out.loss_ce + out.topk.cos().sum()

    leaves = (hidden, weight, bias)
    generator = torch.Generator().manual_seed(1)
    for i, gradient in enumerate(torch.autograd.grad(value(*leaves), leaves)):
        direction = torch.randn(leaves[i].shape, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            up, down = ([*leaves[:i], leaves[i] + step * direction, *leaves[i + 1 :]] for step in (1e-6, -1e-6))
            slope = (value(*up) - value(*down)) / 2e-6
        assert (gradient * direction).sum().item() == pytest.approx(slope.item(), rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("head", HEADS, ids=str)
def test_bfloat16_is_within_its_rounding_of_float64(head):
    """Values and gradients to 2% of their largest entry (bfloat16 keeps 8 bits: 0.4% per rounding)."""
    hidden, weight, _, labels = head_inputs(torch.bfloat16)
    ours = fused_head(hidden, weight, labels, 10, chunk=8, **HEADS[head])
    exact_leaves = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    theirs = naive(*exact_leaves, labels, 10, **HEADS[head])
    assert ours.topk.dtype == ours.loss_ce.dtype == torch.float32
    torch.testing.assert_close(ours.loss_ce.double(), theirs.loss_ce, rtol=0.01, atol=0.0)
    torch.testing.assert_close(ours.topk.double(), theirs.topk, rtol=0.01, atol=0.02)
    # Rounding may swap neighbours in the top-K: the exact side is read at our ids, through the exact head's own logits.
    exact_logits = naive(*exact_leaves, labels, HEADS[head].get("valid_vocab", 503), **HEADS[head])
    kept = exact_logits.topk.gather(1, (exact_logits.ids[:, None] == ours.ids[..., None]).int().argmax(-1))
    ours_grads = torch.autograd.grad(ours.loss_ce + 0.01 * ours.topk.sum(), (hidden, weight))
    theirs_grads = torch.autograd.grad(theirs.loss_ce + 0.01 * kept.sum(), exact_leaves)
    for got, want in zip(ours_grads, theirs_grads, strict=True):
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(got.double(), want, rtol=0.02, atol=0.02 * want.abs().max().item())


def test_a_weight_tied_to_the_embedding_gets_both_gradients():
    weights, grads = [], []
    for head in (fused_head, naive):
        embedding = torch.nn.Embedding(503, 24)
        torch.nn.init.normal_(embedding.weight, generator=torch.Generator().manual_seed(3))
        ids = torch.arange(40) * 11
        out = head(torch.tanh(embedding(ids)), embedding.weight, ids.roll(-1), 10)
        loss_of(out).backward()
        weights.append(embedding.weight)
        grads.append(embedding.weight.grad)
    assert torch.equal(*weights)
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-5 * grads[1].abs().max().item())


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_a_frozen_input_leaves_the_other_gradient_unchanged(frozen):
    hidden, weight, _, labels = head_inputs()
    both = torch.autograd.grad(loss_of(fused_head(hidden, weight, labels, 10)), (hidden, weight))
    (weight if frozen == "weight" else hidden).requires_grad_(False)
    loss_of(fused_head(hidden, weight, labels, 10)).backward()
    got, want = (hidden.grad, both[0]) if frozen == "weight" else (weight.grad, both[1])
    assert torch.equal(got, want)
    assert (weight if frozen == "weight" else hidden).grad is None


def test_each_output_can_be_used_alone():
    hidden, weight, _, labels = head_inputs()
    for use in (lambda out: out.loss_ce, lambda out: out.topk.square().sum()):
        got = torch.autograd.grad(use(fused_head(hidden, weight, labels, 10)), (hidden, weight))
        want = torch.autograd.grad(use(naive(hidden, weight, labels, 10)), (hidden, weight))
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * b.abs().max().item())


def test_all_labels_ignored_still_gives_the_topk_gradient():
    hidden, weight, _, labels = head_inputs()
    out = fused_head(hidden, weight, torch.full_like(labels, -100), 10)
    assert out.loss_ce.item() == 0.0
    assert out.count == 0
    got = torch.autograd.grad(out.loss_ce + out.topk.sum(), hidden)[0]
    torch.testing.assert_close(got, torch.autograd.grad((hidden @ weight.T).topk(10).values.sum(), hidden)[0])


def test_no_positions():
    hidden = torch.zeros(0, 24, requires_grad=True)
    out = fused_head(hidden, torch.ones(503, 24, requires_grad=True), torch.zeros(0, dtype=torch.int64), 10)
    (out.loss_ce + out.topk.sum()).backward()
    assert out.loss_ce.item() == 0.0
    assert hidden.grad is not None


def test_same_input_same_bits():
    hidden, weight, _, labels = head_inputs(N=300, V=5003)
    runs = []
    for _ in range(3):
        out = fused_head(hidden, weight, labels, 10, chunk=64)
        runs.append((out.loss_ce, out.topk, out.ids, *torch.autograd.grad(loss_of(out), (hidden, weight))))
    for again in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], again, strict=True))


def test_backward_runs_once():
    hidden, weight, _, labels = head_inputs()
    out = fused_head(hidden, weight, labels, 10)
    out.loss_ce.backward(retain_graph=True)
    with pytest.raises(LossError, match="backward ran twice"):
        out.topk.sum().backward()


@pytest.mark.parametrize("head", HEADS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_teacher_topk_is_the_same_computation(head, dtype):
    hidden, weight, bias, labels = head_inputs(dtype, with_bias=True)
    teacher = teacher_topk(hidden, weight, labels, 10, bias=bias, chunk=7, **HEADS[head])
    student = fused_head(hidden, weight, labels, 10, bias=bias, chunk=7, **HEADS[head])
    assert not teacher.logps.requires_grad
    assert torch.equal(teacher.logps, student.topk.detach() - student.lse[:, None])
    assert torch.equal(teacher.ids, student.ids)
    assert torch.equal(teacher.lse, student.lse)
    assert torch.equal(teacher.next_logps, student.label_logps)
    full = naive(hidden.double(), weight.double(), labels, 10, bias=bias.double(), **HEADS[head])
    tolerance = 1e-4 if dtype == torch.float32 else 0.15
    torch.testing.assert_close(teacher.lse.double(), full.lse, rtol=0.0, atol=tolerance)
    torch.testing.assert_close(teacher.next_logps.double(), full.label_logps, rtol=0.0, atol=tolerance)
    assert (teacher.logps.exp().sum(-1) <= 1 + 1e-5).all()


@pytest.mark.parametrize("V", [1, 9, BLOCK, 20 * BLOCK - 1, 20 * BLOCK, 20 * BLOCK + 1, 40 * BLOCK + 17])
def test_block_topk_equals_torch_topk(V):
    generator = torch.Generator().manual_seed(V)
    for k in {1, min(10, V), min(V, 33)}:
        logits = torch.randn(13, V, generator=generator).bfloat16().float()  # with ties
        values, ids = block_topk(logits, k)
        assert torch.equal(values, logits.topk(k).values)
        assert torch.equal(logits.gather(1, ids), values)
        assert all(len(set(row)) == k for row in ids.tolist())


@pytest.mark.parametrize("head", HEADS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tensor_is_larger_than_a_chunk_or_the_weight_gradient(head, dtype):
    N, H, V, chunk, k = 64, 8, 2003, 8, 10
    hidden, weight, _, labels = head_inputs(dtype, N=N, H=H, V=V)
    with LargestTensor((hidden, weight)) as seen:
        loss_of(fused_head(hidden, weight, labels, k, chunk=chunk, **HEADS[head])).backward()
    assert max(seen.sizes) <= max(chunk * V, V * H)
    with LargestTensor((hidden, weight)) as seen, torch.no_grad():
        fused_head(hidden, weight, labels, k, chunk=chunk, **HEADS[head])
        teacher_topk(hidden, weight, labels, k, chunk=chunk, **HEADS[head])
    assert max(seen.sizes) <= chunk * V


def test_evaluation_makes_no_gradient_buffer():
    hidden, weight, _, labels = head_inputs(V=503, H=400, N=9)
    with LargestTensor((hidden, weight)) as seen, torch.no_grad():
        out = fused_head(hidden, weight, labels, 10)
    assert max(seen.sizes) < weight.numel()
    assert not out.loss_ce.requires_grad


@pytest.mark.parametrize(("device", "mib", "rows"), [("cpu", 64, 167), ("cuda", 256, 668), ("xpu", 64, 167)])
def test_default_chunk_is_so_many_mib_of_logits(device, mib, rows):
    assert chunk_size(100_352, device) == rows
    for V in (1000, 32_000, 151_936, 262_144):
        size = chunk_size(V, device)
        assert size * V * 4 <= mib * 2**20 < (size + 1) * V * 4


def test_a_weight_gradient_in_bfloat16_is_added_in_small_slices(monkeypatch):
    H, V, chunk = 32, 2003, 4
    hidden, weight, _, labels = head_inputs(torch.bfloat16, N=16, H=H, V=V)
    (whole,) = torch.autograd.grad(fused_head(hidden, weight, labels, 10, chunk=chunk).loss_ce, weight)
    monkeypatch.setattr("rayfuse.losses.head.SLICE_BYTES", 300 * H * 4)
    with LargestTensor((hidden, weight), torch.bfloat16) as seen:
        out = fused_head(hidden, weight, labels, 10, chunk=chunk)
    out.loss_ce.backward()
    assert max(seen.sizes) <= max(chunk * V, 300 * H) < V * H
    torch.testing.assert_close(weight.grad, whole, rtol=0.01, atol=0.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 0}, "k is 0"),
        ({"k": 504}, "k is 504"),
        ({"k": 491, "valid_vocab": 490}, "k is 491"),
        ({"labels": torch.full((41,), 503)}, "outside the vocabulary of 503"),
        ({"labels": torch.full((41,), 490), "valid_vocab": 490}, "outside the vocabulary of 490"),
        ({"labels": torch.full((41,), -1)}, "outside the vocabulary"),
        ({"labels": torch.zeros(40, dtype=torch.int64)}, "41"),
        ({"labels": torch.zeros(41)}, "float32"),
        ({"weight": torch.zeros(503, 25)}, r"\(503, 25\)"),
        ({"weight": torch.zeros(503, 24, dtype=torch.bfloat16)}, "bfloat16"),
        ({"hidden": torch.zeros(1, 41, 24)}, r"\(1, 41, 24\)"),
        ({"bias": torch.zeros(502)}, "bias"),
        ({"valid_vocab": 504}, "valid_vocab is 504"),
        ({"softcap": 0.0}, "softcap"),
        ({"chunk": 0}, "chunk is 0"),
    ],
)
@pytest.mark.parametrize("function", [fused_head, teacher_topk])
def test_refuses_inputs_that_do_not_fit(function, change, message):
    hidden, weight, _, labels = head_inputs()
    arguments = {"hidden": hidden, "weight": weight, "labels": labels, "k": 10} | change
    positional = [arguments.pop(name) for name in ("hidden", "weight", "labels", "k")]
    with pytest.raises(LossError, match=message):
        function(*positional, **arguments)


@pytest.mark.parametrize("head", HEADS, ids=str)
@pytest.mark.parametrize("lse_gradient", [False, True])
def test_weighted_labels_equal_a_weighted_cross_entropy(head, lse_gradient):
    hidden, weight, bias, labels = head_inputs(with_bias=True)
    weights = torch.rand(len(labels), generator=torch.Generator().manual_seed(3))
    weights[3] = 0
    out = fused_head(hidden, weight, labels, 5, bias=bias, weights=weights, lse_gradient=lse_gradient, **HEADS[head])
    expected = naive(hidden, weight, labels, 5, bias=bias, **HEADS[head])
    loss = -(expected.label_logps * weights).sum() / expected.count
    torch.testing.assert_close(out.loss_ce, loss, rtol=1e-5, atol=1e-6)
    both = out.loss_ce + 0.1 * out.topk.softmax(-1)[:, 0].sum()
    expected_both = loss + 0.1 * expected.topk.softmax(-1)[:, 0].sum()
    inputs = (hidden, weight, bias)
    for mine, theirs in zip(torch.autograd.grad(both, inputs), torch.autograd.grad(expected_both, inputs), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def test_weights_of_one_change_no_bit():
    hidden, weight, _, labels = head_inputs()
    plain, weighted = (fused_head(hidden, weight, labels, 5, weights=w) for w in (None, torch.ones(len(labels))))
    assert plain.loss_ce.equal(weighted.loss_ce)
    for mine, theirs in zip(
        torch.autograd.grad(plain.loss_ce, (hidden, weight)),
        torch.autograd.grad(weighted.loss_ce, (hidden, weight)),
        strict=True,
    ):
        assert mine.equal(theirs)


@pytest.mark.parametrize("weights", [torch.ones(3), -torch.ones(41), torch.full((41,), torch.nan)])
def test_weights_that_are_none_are_refused(weights):
    hidden, weight, _, labels = head_inputs()
    with pytest.raises(LossError, match=r"weights must be \[41\] numbers >= 0"):
        fused_head(hidden, weight, labels, 5, weights=weights)
