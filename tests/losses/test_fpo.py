"""Preference losses: the paper's example to six digits, and TRL's DPO trainer where the two coincide."""

import itertools
import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from rayfuse.errors import LossError
from rayfuse.losses import fpo_loss, fuse_logps, fuse_pairs, wrpo_loss

# The InfiFPO authors' example: one pair, three teachers, policy = initial pivot.
PIVOT = {"chosen": [-0.06974949687719345], "rejected": [-0.13944919407367706]}
TEACHERS = {
    "chosen": [[-0.2378779649734497], [-0.2621479332447052], [-0.3679310381412506]],
    "rejected": [[-0.25559499859809875], [-0.2677876949310303], [-0.3368484675884247]],
}
GOLDEN = [
    ("max_margin", True, -0.069749, -0.336848, -0.493498, 0.970035),
    ("mean", True, -0.069749, -0.286744, -0.368236, 0.894120),
    ("max_margin", False, -0.367931, -0.336848, 0.251956, 0.575084),
    ("mean", False, -0.289319, -0.286744, 0.180687, 0.606879),
]


def random_logps(*shape, seed=0):
    return -torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 - 0.01


def trl_dpo(policy, reference, lengths, beta, loss_type):
    """TRL's DPOTrainer._compute_loss on given summed log-probabilities [2N] (chosen first): its mean over pairs."""
    from trl.trainer.dpo_trainer import DPOTrainer

    n, T = len(policy), int(max(lengths)) + 1
    completion_mask = (torch.arange(T) >= 1) & (torch.arange(T)[None] <= lengths[:, None])
    per_token = (policy / lengths)[:, None] * completion_mask[:, 1:]
    outputs = SimpleNamespace(
        log_probs=per_token,
        entropy=torch.zeros(n, T - 1),
        mean_logits=torch.zeros(n, T - 1),
        is_top1=torch.zeros(n, T - 1, dtype=torch.bool),
    )
    accelerator = SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x)
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=False),
        accelerator=accelerator,
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=[loss_type],
        loss_weights=[1.0],
        beta=beta,
        label_smoothing=0.0,
        use_weighting=False,
        _metrics={"eval": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    reference_chosen, reference_rejected = reference.chunk(2)
    inputs = {
        "input_ids": torch.zeros(n, T, dtype=torch.int64),
        "attention_mask": torch.ones(n, T, dtype=torch.int64),
        "completion_mask": completion_mask.long(),
        "ref_chosen_logps": reference_chosen,
        "ref_rejected_logps": reference_rejected,
    }
    return DPOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, return_outputs=False)


@pytest.mark.parametrize(("rule", "clip", "chosen", "rejected", "u", "loss"), GOLDEN)
def test_the_papers_example(rule, clip, chosen, rejected, u, loss):
    pivot = {side: torch.tensor(values, dtype=torch.float64) for side, values in PIVOT.items()}
    fused = {
        side: fuse_logps(
            torch.tensor(TEACHERS[side], dtype=torch.float64), pivot[side], pivot[side], side=side, rule=rule, clip=clip
        )
        for side in ("chosen", "rejected")
    }
    assert fused["chosen"].item() == pytest.approx(chosen, abs=1e-6)
    assert fused["rejected"].item() == pytest.approx(rejected, abs=1e-6)
    result = fpo_loss(pivot["chosen"], pivot["rejected"], fused["chosen"], fused["rejected"], beta=2.5)
    assert result.item() == pytest.approx(loss, abs=1e-6)
    assert math.log(math.exp(-result.item()) / (1 - math.exp(-result.item()))) == pytest.approx(u, abs=1e-5)


@pytest.mark.parametrize("rule", ["max_margin", "mean", "confidence"])
@pytest.mark.parametrize("clip", [True, False])
def test_one_teacher_equal_to_the_initial_pivot_is_length_normalised_dpo(rule, clip):
    """TRL's `sigmoid_norm` divides by the same token counts: equal to it, value and gradient."""
    lengths = torch.tensor([7, 3, 9, 5, 8, 4])
    initial, policy = random_logps(6, seed=1), random_logps(6, seed=2).requires_grad_()
    fused = [
        fuse_logps(initial_N[None], initial_N, policy_N, side=side, rule=rule, clip=clip)
        for initial_N, policy_N, side in zip(initial.chunk(2), policy.chunk(2), ("chosen", "rejected"), strict=True)
    ]
    ours = fpo_loss(*policy.chunk(2), *fused, beta=2.5).mean()
    theirs = trl_dpo(policy * lengths, initial * lengths, lengths, 2.5, "sigmoid_norm")
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(torch.autograd.grad(ours, policy), torch.autograd.grad(theirs, policy))


def test_summed_log_probabilities_of_one_source_are_dpo():
    lengths = torch.tensor([7, 3, 9, 5, 8, 4])
    reference, policy = random_logps(6, seed=3) * 6, random_logps(6, seed=4) * 6
    fused = [
        fuse_logps(values[None], values - 1.0, policy[:3], side=side, clip=False)
        for values, side in zip(reference.chunk(2), ("chosen", "rejected"), strict=True)
    ]
    ours = fpo_loss(*policy.chunk(2), *fused, beta=0.1).mean()
    torch.testing.assert_close(ours, trl_dpo(policy, reference, lengths, 0.1, "sigmoid"), rtol=1e-6, atol=1e-8)


def test_ipo_equals_trl():
    lengths = torch.tensor([7, 3, 9, 5])
    reference, policy = random_logps(4, seed=5), random_logps(4, seed=6)
    ours = fpo_loss(*policy.chunk(2), *reference.chunk(2), beta=2.5, variant="ipo").mean()
    theirs = trl_dpo(policy * lengths, reference * lengths, lengths, 2.5, "ipo")
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("rule", ["max_margin", "mean", "confidence"])
def test_clipping_never_starts_with_a_positive_margin(rule):
    """policy = initial pivot: u <= 0 for every pair, so every loss is at least log 2."""
    chosen, rejected = random_logps(400, seed=7), random_logps(400, seed=8)
    fused_chosen = fuse_logps(random_logps(4, 400, seed=9), chosen, chosen, side="chosen", rule=rule)
    fused_rejected = fuse_logps(random_logps(4, 400, seed=10), rejected, rejected, side="rejected", rule=rule)
    assert (fused_chosen >= chosen - 1e-12).all()
    assert (fused_rejected <= rejected + 1e-12).all()
    assert (fpo_loss(chosen, rejected, fused_chosen, fused_rejected) >= math.log(2) - 1e-12).all()


def test_max_margin_takes_the_farthest_teacher_of_each_side():
    teachers = torch.tensor([[-1.0, -0.5], [-0.2, -0.5], [-3.0, -0.5]])
    policy = torch.tensor([-0.3, -2.0])
    initial = torch.tensor([-9.0, -9.0])
    assert fuse_logps(teachers, initial, policy, side="chosen", clip=False).tolist() == [-3.0, -0.5]
    # |exp(lp) - exp(policy)| per teacher at response 0: 0.373, 0.078, 0.691; nearer to certain the second one wins.
    assert fuse_logps(teachers, initial, torch.tensor([-9.0, -9.0]), side="chosen").tolist() == pytest.approx(
        [-0.2, -0.5]
    )


RULES = [("max_margin", "response"), ("max_margin", "pair"), ("mean", "response"), ("confidence", "response")]


@pytest.mark.parametrize(("rule", "per"), RULES)
@pytest.mark.parametrize("scale", [1.0, 300.0], ids=["per token", "sums"])
@pytest.mark.parametrize("clip", [True, False])
def test_the_order_of_the_teachers_changes_nothing(rule, per, scale, clip):
    """To the bit, in float32; with teachers that are equal, equally far, or equal to the policy; and some missing."""
    make = torch.Generator().manual_seed(30)
    sides = ("chosen", "rejected")
    teachers = {side: -torch.rand(5, 60, generator=make) * scale - 0.01 for side in sides}
    for side in sides:
        teachers[side][3, :20] = teachers[side][1, :20]
    policy = {side: -torch.rand(60, generator=make) * scale - 0.01 for side in sides}
    for side in sides:
        teachers[side][:, 40:45] = policy[side][40:45]
        teachers[side][2, 45:50] = policy[side][45:50]
    initial = {side: -torch.rand(60, generator=make) * scale - 0.01 for side in sides}
    answered = torch.rand(5, 60, generator=make) < 0.7
    answered[0, ~answered.any(0)] = True
    weights = None if rule == "max_margin" else torch.tensor([1.0, 3.0, 0.5, 1.0, 2.0])
    options = {"rule": rule, "per": per, "clip": clip}
    for where in (None, answered):
        fused = fuse_pairs(teachers, initial, policy, answered=where, weights=weights, **options)
        for order in list(itertools.permutations(range(5)))[::7]:
            again = fuse_pairs(
                {side: values[list(order)] for side, values in teachers.items()},
                initial,
                policy,
                answered=None if where is None else where[list(order)],
                weights=None if weights is None else weights[list(order)],
                **options,
            )
            assert all(fused[side].equal(again[side]) for side in sides)


@pytest.mark.parametrize("per", ["response", "pair"])
def test_long_responses_are_told_apart_where_their_probabilities_are_zero_in_float32(per):
    """exp(-150) is 0: the farthest teacher is that of the largest probability, wherever it is in the list."""
    lps = [-400.0, -150.0, -310.0]
    policy = torch.tensor([-300.0])
    for order in itertools.permutations(lps):
        teachers = {side: torch.tensor(order)[:, None] for side in ("chosen", "rejected")}
        at = {"chosen": policy, "rejected": policy}
        fused = fuse_pairs(teachers, at, at, per=per, clip=False)
        assert [float(value) for value in fused.values()] == [-150.0, -150.0]
    # Below the policy too: the margins are exp(-120) - exp(-125) and exp(-120) - exp(-121).
    near = fuse_logps(torch.tensor([[-121.0], [-125.0]]), policy, torch.tensor([-120.0]), side="chosen", clip=False)
    assert near.item() == -125.0


def test_of_teachers_that_are_equally_far_on_both_sides_one_wins_whatever_their_order():
    """Above and below the policy by the same probability: which one is a matter of the last bit, not of the list."""
    policy = torch.tensor([math.log(0.5)])
    teachers = torch.tensor([[0.25], [0.75]]).log()
    one, other = (fuse_logps(teachers[order], policy, policy, side="chosen", clip=False) for order in ([0, 1], [1, 0]))
    assert one.equal(other)


def test_weights_count_in_the_means_and_equal_ones_change_no_bit():
    teachers = torch.tensor([[-0.5], [-0.1], [-2.0]], dtype=torch.float64)
    weights = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    mean = fuse_logps(teachers, teachers[0], teachers[0], side="chosen", rule="mean", clip=False, weights=weights)
    assert mean.item() == pytest.approx((-0.5 - 0.2 - 8.0) / 7)
    inverse = [w / (-lp + 1e-6) for w, lp in zip([1, 2, 4], [-0.5, -0.1, -2.0], strict=True)]
    expected = sum(w * lp for w, lp in zip(inverse, [-0.5, -0.1, -2.0], strict=True)) / sum(inverse)
    fused = fuse_logps(
        teachers, teachers[0], teachers[0], side="chosen", rule="confidence", clip=False, weights=weights
    )
    assert fused.item() == pytest.approx(expected, rel=1e-12)
    many = random_logps(4, 50, seed=31).float()
    for rule in ("mean", "confidence"):
        plain, same = (
            fuse_logps(many, many[0], many[0], side="chosen", rule=rule, weights=weights)
            for weights in (None, torch.full((4,), 0.7))
        )
        assert plain.equal(same)


def test_confidence_weighs_by_the_inverse_of_the_negative_log_probability():
    teachers = torch.tensor([[-0.5], [-0.1], [-2.0]], dtype=torch.float64)
    weights = [1 / (0.5 + 1e-6), 1 / (0.1 + 1e-6), 1 / (2.0 + 1e-6)]
    expected = sum(w * lp for w, lp in zip(weights, [-0.5, -0.1, -2.0], strict=True)) / sum(weights)
    fused = fuse_logps(teachers, teachers[0], teachers[0], side="chosen", rule="confidence", clip=False)
    assert fused.item() == pytest.approx(expected, rel=1e-12)
    certain = fuse_logps(teachers * 0, teachers[0], teachers[0], side="chosen", rule="confidence", clip=False)
    assert certain.item() == 0.0


def test_one_teacher_per_pair_is_the_one_with_the_largest_sum_of_margins():
    """Against a plain loop over pairs; clipped, no pair starts with a positive margin either."""
    sides = ("chosen", "rejected")
    teachers = {side: random_logps(4, 200, seed=i) for i, side in enumerate(sides, start=22)}
    initial = {side: random_logps(200, seed=i) for i, side in enumerate(sides, start=24)}
    fused = fuse_pairs(teachers, initial, initial, per="pair", clip=False)
    for n in range(200):
        margins = [sum(abs(teachers[s][i, n].exp() - initial[s][n].exp()) for s in sides) for i in range(4)]
        winner = max(range(4), key=lambda i: margins[i])
        assert all(fused[side][n] == teachers[side][winner, n] for side in sides)
    clipped = fuse_pairs(teachers, initial, initial, per="pair")
    assert (fpo_loss(*initial.values(), *clipped.values()) >= math.log(2) - 1e-12).all()
    alone = fuse_pairs(teachers, initial, initial)
    for side in sides:
        assert alone[side].equal(fuse_logps(teachers[side], initial[side], initial[side], side=side))


def test_nothing_but_the_policy_has_a_gradient():
    policy = [random_logps(3, seed=i).requires_grad_() for i in (11, 12)]
    fused = [random_logps(3, seed=i).requires_grad_() for i in (13, 14)]
    assert torch.autograd.gradcheck(lambda *p: fpo_loss(*p, *fused), policy)
    assert torch.autograd.gradcheck(lambda *p: fpo_loss(*p, *fused, variant="ipo"), policy)
    fpo_loss(*policy, *fused).sum().backward()
    assert fused[0].grad is None
    teachers = random_logps(2, 3, seed=15).requires_grad_()
    assert not fuse_logps(teachers, policy[0], policy[0], side="chosen").requires_grad


def test_wrpo_is_the_formula_and_ends_in_fpo():
    policy = [random_logps(3, seed=i) for i in (16, 17, 18)]
    fused = [random_logps(3, seed=i) for i in (19, 20, 21)]
    d = [p - f for p, f in zip(policy, fused, strict=True)]
    u = 0.3 * 2.0 * d[0] + 0.7 * 2.0 * d[1] - 2.0 * d[2]
    expected = torch.tensor([math.log1p(math.exp(-x)) for x in u.tolist()], dtype=torch.float64)
    torch.testing.assert_close(wrpo_loss(*policy, *fused, alpha=0.3, beta=2.0), expected)
    torch.testing.assert_close(
        wrpo_loss(*policy, *fused, alpha=0.0), fpo_loss(policy[1], policy[2], fused[1], fused[2])
    )
    torch.testing.assert_close(
        wrpo_loss(*policy, *fused, alpha=1.0), fpo_loss(policy[0], policy[2], fused[0], fused[2])
    )


LP = -torch.ones(2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fuse_logps(-torch.ones(0, 2), LP, LP, side="chosen"), r"\(0, 2\)"),
        (lambda: fuse_logps(-torch.ones(3, 2), LP[:1], LP, side="chosen"), r"\(1,\)"),
        (lambda: fuse_logps(LP, LP, LP, side="chosen"), r"teachers \[S, N\]"),
        (lambda: fuse_logps(LP[None], LP, LP, side="better"), "better"),
        (lambda: fuse_logps(LP[None], LP, LP, side="chosen", rule="best"), "best"),
        (lambda: fuse_logps(-LP[None], LP, LP, side="chosen"), "teachers must be finite log-probabilities"),
        (lambda: fuse_logps(LP[None], LP * torch.nan, LP, side="chosen"), "initial must be finite"),
        (lambda: fuse_logps(LP[None], LP, LP * torch.inf, side="chosen"), "policy must be finite"),
        (lambda: fuse_pairs({}, {}, {}, rule="mean", per="pair"), "per 'pair'.*'mean'"),
        (lambda: fpo_loss(LP, LP, LP, LP[:1]), r"\(1,\)"),
        (lambda: fpo_loss(LP, LP, LP, LP, beta=0.0), "beta is 0.0"),
        (lambda: fpo_loss(LP, LP, LP, LP, variant="dpo"), "dpo"),
        (lambda: wrpo_loss(LP, LP, LP, LP, LP, LP, alpha=1.5), "alpha is 1.5"),
    ],
)
def test_refuses_what_it_cannot_fuse(call, message):
    with pytest.raises(LossError, match=message):
        call()
