"""The baselines' losses against their formulas over full logits, and against TRL's ULD where all of V is kept."""

import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from rayfuse.batch import FusionBatch, TeacherTarget
from rayfuse.config import KL, ULD, FuseLLM, MiniLogit, ULDHybrid
from rayfuse.losses import fused_head
from rayfuse.stages.fusellm import fusellm_loss
from rayfuse.stages.kl import kl_loss
from rayfuse.stages.minilogit import minilogit_loss
from rayfuse.stages.uld import uld_original_loss
from rayfuse.stages.uld_hybrid import uld_hybrid_loss

N, H, V, K = 21, 12, 40, 6


def _case(seed=0, k=K, vocabulary=V):
    """Hidden states, head, labels and a batch of two teachers; some of their tokens have no counterpart."""
    make = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, H, generator=make, requires_grad=True)
    weight = torch.randn(vocabulary, H, generator=make, requires_grad=True)
    labels = torch.randint(0, vocabulary, (N,), generator=make)
    picks = labels[:, None].repeat(1, 2 * k).numpy()
    targets = []
    for s, weight_s in enumerate((1.0, 0.5)):
        rows = torch.randperm(N, generator=make)[: 12 + 4 * s].sort().values.numpy()
        logits = torch.randn(len(rows), 2 * vocabulary, generator=make) * 2
        logps = logits.log_softmax(-1).topk(k).values
        ids = torch.stack([torch.randperm(vocabulary, generator=make)[:k] for _ in rows])
        ids[torch.rand(ids.shape, generator=make) < 0.4] = -1
        ids[1], ids[2, 1:] = -1, -1  # nothing shared, and one token only
        ids = ids.numpy()
        columns = np.arange(s * k, (s + 1) * k)
        picks[rows[:, None], columns] = np.where(ids < 0, labels.numpy()[rows, None], ids)
        targets.append(TeacherTarget(f"t{s}", weight_s, rows, logps.numpy(), ids=ids))
    none = np.zeros(0, dtype=np.int64)
    batch = FusionBatch(none, none, none, labels.numpy(), none, tuple(targets), picks=picks)
    return hidden, weight, labels, batch


def _check(loss_of, stage, case, naive_of, k=K, lse_gradient=False):
    """Value and gradients of a stage's loss against (1 - lam) CE + lam sum_s w_s mean over positions of `naive_of`."""
    hidden, weight, labels, batch = case
    head = fused_head(
        hidden, weight, labels, k, picks=torch.from_numpy(batch.picks), lse_gradient=lse_gradient, chunk=8
    )
    loss, parts = loss_of(stage, head, batch, batch.counts)
    grads = torch.autograd.grad(loss, (hidden, weight))
    logits = hidden @ weight.T
    naive = (1 - stage.lam) * F.cross_entropy(logits, labels)
    for s, target in enumerate(batch.targets):
        distances = [naive_of(logits[row], s, p) for p, row in enumerate(target.rows.tolist())]
        distance = torch.stack([torch.as_tensor(value) for value in distances]).mean()
        naive = naive + stage.lam * target.weight * distance
        (name,) = [name for name in parts if name.endswith(f"/t{s}")]
        torch.testing.assert_close(parts[name], distance.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(loss, naive, rtol=1e-4, atol=1e-5)
    for mine, theirs in zip(grads, torch.autograd.grad(naive, (hidden, weight)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd"])
def test_kl_equals_torchs_divergences_on_the_shared_tokens(divergence, temperature):
    case = _case()

    def naive(logits_V, s, p):
        target = case[3].targets[s]
        shared = target.ids[p] >= 0
        if not shared.any():
            return 0.0
        log_q = (torch.from_numpy(target.logps[p])[shared] / temperature).log_softmax(0)
        log_p = (logits_V[target.ids[p][shared]] / temperature).log_softmax(0)
        log_m = ((log_q.exp() + log_p.exp()) / 2).log()

        def kl(a, b):  # KL(a || b)
            return F.kl_div(b, a, reduction="sum", log_target=True)

        both = {
            "forward": lambda: kl(log_q, log_p),
            "reverse": lambda: kl(log_p, log_q),
            "jsd": lambda: (kl(log_q, log_m) + kl(log_p, log_m)) / 2,
        }
        return temperature**2 * both[divergence]()

    _check(kl_loss, KL(lam=0.7, divergence=divergence, temperature=temperature), case, naive)


def test_kl_without_any_shared_token_is_the_sft_part():
    hidden, weight, labels, batch = _case(1)
    for target in batch.targets:
        target.ids[:] = -1
    head = fused_head(hidden, weight, labels, K, picks=torch.from_numpy(batch.picks))
    loss, _ = kl_loss(KL(lam=0.25), head, batch, batch.counts)
    torch.testing.assert_close(loss, 0.75 * head.loss_ce)
    loss.backward()
    assert torch.isfinite(hidden.grad).all()


def test_minilogit_is_the_variance_of_the_logits_difference():
    """The mean square of a centred difference is its (biased) variance, which numpy knows."""
    case = _case(2)

    def naive(logits_V, s, p):
        target = case[3].targets[s]
        shared = target.ids[p] >= 0
        if not shared.any():
            return 0.0
        return (logits_V[target.ids[p][shared]] - torch.from_numpy(target.logps[p])[shared]).var(correction=0)

    _check(minilogit_loss, MiniLogit(lam=0.3), case, naive)


def _trl(**options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from trl.experimental.gold.gold_trainer import ULDLoss
    config = SimpleNamespace(
        uld_crossentropy_weight=0.0,
        uld_distillation_weight=1.0,
        uld_student_temperature=1.0,
        uld_teacher_temperature=1.0,
        uld_skip_student_eos=False,
        uld_skip_teacher_eos=False,
        use_extended_uld=False,
        uld_token_merge_strategy="observed",
        uld_use_hybrid_loss="student" in options,
        uld_hybrid_matched_weight=options.get("matched_weight"),
        uld_hybrid_unmatched_weight=options.get("unmatched_weight"),
        beta=options.get("beta", 0.5),
    )
    if "student" not in options:
        return ULDLoss(config)
    student, teacher = (SimpleNamespace(get_vocab=options[side].copy) for side in ("student", "teacher"))
    return ULDLoss(config, student, teacher)


def _same_as_trl(loss_of, stage, trl, target_options=None, mapping=None):
    """One teacher at every position, all of V kept on both sides: the distance, and its gradients."""
    make = torch.Generator().manual_seed(5)
    hidden = torch.randn(N, H, generator=make, requires_grad=True)
    weight = torch.randn(V, H, generator=make, requires_grad=True)
    labels = torch.randint(0, V, (N,), generator=make)
    teacher = torch.randn(N, V, generator=make) * 2
    order = teacher.log_softmax(-1).sort(descending=True)
    ids = None if mapping is None else mapping[order.indices.numpy()]
    picks = None if ids is None else torch.from_numpy(np.where(ids < 0, labels[:, None].numpy(), ids))
    target = TeacherTarget("t", 1.0, np.arange(N), order.values.numpy(), ids=ids, **(target_options or {}))
    none = np.zeros(0, dtype=np.int64)
    batch = FusionBatch(none, none, none, labels.numpy(), none, (target,))
    head = fused_head(hidden, weight, labels, V, picks=picks, lse_gradient=True, chunk=5)
    loss, _ = loss_of(stage, head, batch, batch.counts)
    grads = torch.autograd.grad(loss, (hidden, weight))

    logits = hidden @ weight.T
    distance = trl(logits[None], teacher[None], labels[None], labels[None], labels[None], labels[None])
    expected = (1 - stage.lam) * F.cross_entropy(logits, labels) + stage.lam * distance
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)
    for mine, theirs in zip(grads, torch.autograd.grad(expected, (hidden, weight)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("lam", [0.6, 1.0])
def test_uld_is_trls_loss_where_the_whole_vocabulary_is_kept(lam):
    _same_as_trl(uld_original_loss, ULD(lam=lam), _trl())


def test_uld_compares_the_largest_true_probabilities():
    case = _case(3)

    def naive(logits_V, s, p):
        teacher = torch.from_numpy(case[3].targets[s].logps[p]).exp()
        return (logits_V.softmax(0).sort(descending=True).values[:K] - teacher).abs().sum()

    _check(uld_original_loss, ULD(lam=0.6), case, naive, lse_gradient=True)


@pytest.mark.parametrize(
    ("shared", "stage", "options"),
    [
        (range(5, 31), ULDHybrid(), {}),
        (range(5, 31), ULDHybrid(lam=0.5, beta=0.2), {"beta": 0.2}),
        (range(5, 31), ULDHybrid(matched_weight=0.9), {"matched_weight": 0.9, "unmatched_weight": 1 - 0.9}),
        (range(V), ULDHybrid(), {}),
    ],
)
def test_uld_hybrid_is_trls_loss_where_the_whole_vocabulary_is_kept(shared, stage, options):
    """The teacher's token i is the student's token i + 1 (modulo V), if it is among the shared ones."""
    mapping = np.array([(i + 1) % V if i in shared else -1 for i in range(V)])
    student = {f"token {i}" if (i - 1) % V in shared else f"student {i}": i for i in range(V)}
    teacher = {f"token {(i + 1) % V}" if i in shared else f"teacher {i}": i for i in range(V)}
    lonely = np.ones(V, dtype=bool)
    lonely[mapping[mapping >= 0]] = False
    target = {"unmatched": np.packbits(lonely), "overlap": len(shared) / V}
    trl = _trl(student=student, teacher=teacher, **options)
    _same_as_trl(uld_hybrid_loss, stage, trl, target, mapping)


def test_uld_hybrid_with_fewer_kept_compares_what_is_kept():
    """JSD over the teacher's kept shared tokens; ranks of what each side's top-K has of unshared ones."""
    case = _case(4)
    lonely = np.arange(V) % 3 == 0
    batch = case[3]
    for target in batch.targets:
        target.ids[np.isin(target.ids, np.flatnonzero(lonely))] = -1
        object.__setattr__(target, "unmatched", np.packbits(lonely))
        object.__setattr__(target, "overlap", 0.3)

    def naive(logits_V, s, p):
        target, beta = batch.targets[s], 0.5
        student, teacher = logits_V.softmax(0), torch.from_numpy(target.logps[p]).exp()
        shared = torch.from_numpy(target.ids[p] >= 0)
        q, r = teacher[shared], student[target.ids[p][target.ids[p] >= 0]]
        m = beta * q + (1 - beta) * r
        jsd = (beta * q * (q / m).log() + (1 - beta) * r * (r / m).log()).sum()
        top = student.topk(K)
        mine = torch.where(torch.from_numpy(lonely)[top.indices], top.values, 0).sort(descending=True).values
        theirs = torch.where(shared, 0, teacher).sort(descending=True).values
        return 0.3 * jsd + 0.7 * (mine - theirs).abs().sum()

    _check(uld_hybrid_loss, ULDHybrid(lam=0.8), case, naive, lse_gradient=True)


def test_fusellm_is_nine_parts_written_text_and_one_part_teacher():
    make = torch.Generator().manual_seed(6)
    hidden, weight, labels, _ = _case(6)
    ids = torch.stack([torch.randperm(V, generator=make)[:K] for _ in range(N)])
    ids[:, 0] = labels
    mass = torch.rand(N, K, generator=make)
    mass /= mass.sum(1, keepdim=True)
    none = np.zeros(0, dtype=np.int64)
    batch = FusionBatch(none, none, none, labels.numpy(), none, picks=ids.numpy(), mass=mass.numpy())
    loss, _ = fusellm_loss(FuseLLM(), fused_head(hidden, weight, labels, 3, picks=ids), batch, batch.counts)
    logits = hidden @ weight.T
    teacher = torch.zeros(N, V).scatter_add_(1, ids, mass)
    expected = 0.9 * F.cross_entropy(logits, labels) + 0.1 * F.cross_entropy(logits, teacher)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(
        torch.autograd.grad(loss, (hidden, weight)), torch.autograd.grad(expected, (hidden, weight)), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
