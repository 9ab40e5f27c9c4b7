"""The closed-form graph distance: against the graphs written out, and against POT's Gromov-Wasserstein."""

import warnings

import numpy as np
import ot
import pytest
import torch

from rayfuse.errors import LossError
from rayfuse.losses import gauge, gld_distance, gld_features, gld_loss, standardize


def random_values(L, k, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(L, k, generator=generator, dtype=dtype) * 3 + 20
    return gauge(logits.sort(dim=-1, descending=True).values)


def cosine_graph(values):
    """C [k, k] written out in numpy: the cosine of each pair of columns."""
    Z = np.asarray(values)
    return np.array([[a @ b / np.linalg.norm(a) / np.linalg.norm(b) for b in Z.T] for a in Z.T])


def gw_1(C, D, coupling):
    """Memoli's GW_1 objective of a coupling, without his factor 1/2: sum |C_ij - D_pq| T_ip T_jq."""
    return np.einsum("ijpq,ip,jq->", np.abs(C[:, :, None, None] - D[None, None]), coupling, coupling)


def couplings(C, D, seed):
    """Candidates for the minimum: POT's solutions from several starts, permutations, and the product coupling."""
    rng = np.random.default_rng(seed)
    k = len(C)
    uniform = np.full(k, 1 / k)
    yield np.outer(uniform, uniform)
    for _ in range(10):
        yield np.eye(k)[rng.permutation(k)] / k
    starts = [None, np.eye(k)[rng.permutation(k)] / k]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for start in starts:
            yield ot.gromov.gromov_wasserstein(C, D, uniform, uniform, "square_loss", G0=start)
        yield ot.gromov.entropic_gromov_wasserstein(C, D, uniform, uniform, "square_loss", epsilon=5e-2, max_iter=20)
    # The coupling that sorts both features: the one the closed form solves.
    yield ot.emd(uniform, uniform, np.abs(C.mean(1)[:, None] - D.mean(1)[None]))


def test_equals_the_graphs_written_out():
    student, teacher = random_values(23, 7, seed=0), random_values(31, 7, seed=1)
    features = [np.sort(cosine_graph(values).mean(axis=1)) for values in (student, teacher)]
    assert gld_loss(student, teacher).item() == pytest.approx(np.abs(features[0] - features[1]).sum(), rel=1e-10)


@pytest.mark.parametrize("k", [2, 4, 8])
@pytest.mark.parametrize("block", range(4))
def test_is_a_lower_bound_of_gromov_wasserstein(k, block):
    """(1/k) GW~ <= GW_1 at every coupling (Memoli's first lower bound), on 25 random pairs of graphs per case."""
    for seed in range(25 * block, 25 * (block + 1)):
        student, teacher = random_values(3 + seed % 9, k, seed), random_values(4 + seed % 5, k, 1000 + seed)
        C, D = cosine_graph(student), cosine_graph(teacher)
        bound = gld_loss(student, teacher).item() / k
        for coupling in couplings(C, D, seed):
            assert bound <= gw_1(C, D, coupling) + 1e-9


def test_sorting_solves_the_one_dimensional_transport():
    student, teacher = random_values(12, 10, seed=2), random_values(9, 10, seed=3)
    features = [cosine_graph(values).mean(axis=1) for values in (student, teacher)]
    assert gld_loss(student, teacher).item() / 10 == pytest.approx(ot.wasserstein_1d(*features, p=1), rel=1e-10)


def test_does_not_depend_on_the_order_of_nodes_or_positions():
    student, teacher = random_values(12, 10, seed=4), random_values(9, 10, seed=5)
    generator = torch.Generator().manual_seed(6)
    shuffled = student[torch.randperm(12, generator=generator)][:, torch.randperm(10, generator=generator)]
    torch.testing.assert_close(gld_loss(shuffled, teacher), gld_loss(student, teacher))


def test_does_not_depend_on_repeating_the_response():
    student, teacher = random_values(12, 10, seed=4), random_values(9, 10, seed=5)
    torch.testing.assert_close(gld_loss(student.repeat(3, 1), teacher), gld_loss(student, teacher))


def test_is_zero_for_equal_graphs_and_positive_otherwise():
    student = random_values(12, 10, seed=7)
    assert gld_loss(student, student).item() == 0.0
    assert gld_loss(student, student * 5.0).item() == pytest.approx(0.0, abs=1e-12)
    assert gld_loss(student, random_values(12, 10, seed=8)).item() > 1e-3


def test_gradient_reaches_the_student_only():
    student, teacher = random_values(6, 5, seed=9).requires_grad_(), random_values(4, 5, seed=10).requires_grad_()
    assert torch.autograd.gradcheck(lambda values: gld_loss(values, teacher), (student,))
    gld_loss(student, teacher).backward()
    assert teacher.grad is None
    assert student.grad.norm() > 1e-3


def test_gradient_through_the_gauge():
    logits = torch.randn(6, 5, generator=torch.Generator().manual_seed(11), dtype=torch.float64, requires_grad=True)
    teacher = random_values(4, 5, seed=12)
    assert torch.autograd.gradcheck(lambda values: gld_loss(gauge(values), teacher), (logits,))


def test_a_batch_equals_its_samples():
    lengths, k = [5, 1, 0, 17, 8], 10
    parts = [random_values(L, k, seed=20 + i) for i, L in enumerate(lengths)]
    teachers = [random_values(3 + i, k, seed=30 + i) for i in range(len(lengths))]
    sample = torch.repeat_interleave(torch.arange(5), torch.tensor(lengths))
    order = torch.randperm(len(sample), generator=torch.Generator().manual_seed(0))
    packed = torch.cat(parts)[order].requires_grad_()
    features = gld_features(packed, sample[order], 5)
    teacher_features = torch.cat(
        [gld_features(values, torch.zeros(len(values), dtype=torch.int64), 1) for values in teachers]
    )
    batched = gld_distance(features, teacher_features)
    (gradient,) = torch.autograd.grad(batched.sum(), packed)

    leaves = [values.clone().requires_grad_() for values in parts]
    for i, L in enumerate(lengths):
        if L == 0:
            assert (features[i] == 0).all()
            continue
        alone = gld_loss(leaves[i], teachers[i])
        torch.testing.assert_close(batched[i], alone)
        torch.testing.assert_close(gradient[sample[order] == i].sum(0), torch.autograd.grad(alone, leaves[i])[0].sum(0))


def test_gauge_is_blind_to_a_constant_and_agrees_with_torch():
    logits = torch.randn(6, 503, generator=torch.Generator().manual_seed(13)) * 3
    top = logits.topk(10)
    lse = logits.logsumexp(-1)
    torch.testing.assert_close(gauge(top.values + 40.0), gauge(top.values), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gauge(top.values - lse[:, None]), gauge(top.values), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gauge(top.values).exp().sum(-1), torch.ones(6))
    torch.testing.assert_close(gauge(top.values, lse), logits.log_softmax(-1).gather(1, top.indices))


def test_refuses_z_scores_whose_gram_matrix_has_no_gradient():
    """The proof behind the refusal, checked: the raw Gram features of z-scores are zero, and so is their gradient."""
    logits = torch.randn(8, 10, generator=torch.Generator().manual_seed(14), dtype=torch.float64, requires_grad=True)
    z = standardize(logits, eps=0.0)
    gram_features = (z.T @ z).mean(dim=1)
    (gradient,) = torch.autograd.grad(gram_features.square().sum() + gram_features.abs().sum(), logits)
    assert gram_features.abs().max() < 1e-12
    assert gradient.abs().max() < 1e-10
    for dtype in (torch.float64, torch.float32):
        with pytest.raises(LossError, match="gradient is identically zero"):
            gld_loss(standardize(logits.to(dtype)), random_values(5, 10, seed=15))
        with pytest.raises(LossError, match="gradient is identically zero"):
            gld_loss(random_values(5, 10, seed=15), standardize(logits.to(dtype)))


def test_a_column_of_zeros_has_a_finite_gradient():
    values = random_values(6, 5, seed=16)
    values[:, 0] = 0.0
    values.requires_grad_()
    gld_loss(values, random_values(6, 5, seed=17)).backward()
    assert torch.isfinite(values.grad).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: gld_loss(torch.ones(3), torch.ones(3, 3)), r"student is \(3,\)"),
        (lambda: gld_loss(torch.ones(3, 4), torch.ones(3, 3)), r"student \(1, 4\) and teacher \(1, 3\)"),
        (lambda: gld_loss(torch.full((2, 2), torch.inf), torch.ones(2, 2)), "not finite in rows .0, 1"),
        (lambda: gld_features(torch.ones(2, 2), torch.tensor([0, 2]), 2), "there are 2"),
        (lambda: gld_features(torch.ones(2, 2), torch.tensor([-1, 0]), 2), "there are 2"),
        (lambda: gld_features(torch.ones(2, 2), torch.tensor([0]), 2), r"\(1,\)"),
    ],
)
def test_refuses_what_it_cannot_compare(call, message):
    with pytest.raises(LossError, match=message):
        call()
