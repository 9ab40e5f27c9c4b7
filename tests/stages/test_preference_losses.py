"""InfiFPO and DPO on a batch of pairs, against the losses on hand-made log-probabilities and against TRL's formula."""

import dataclasses

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from rayfuse.batch import FusionBatch, TeacherTarget
from rayfuse.config import DPO, WRPO, InfiFPO
from rayfuse.stages.dpo import dpo_loss
from rayfuse.stages.infifpo import infifpo_loss
from rayfuse.stages.wrpo import wrpo_stage_loss

# Per-token log-probabilities of the golden example of InfiFPO's authors: one pair, three teachers, policy = pivot.
PIVOT = (-0.06974949687719345, -0.13944919407367706)
TEACHERS = (
    (-0.2378779649734497, -0.25559499859809875),
    (-0.2621479332447052, -0.2677876949310303),
    (-0.3679310381412506, -0.3368484675884247),
)
LENGTHS = (3, 2)


def _target(name, values, tokens):
    sums = np.array([v * n for v, n in zip(values, tokens, strict=True)], dtype=np.float32)
    none = np.zeros(0, dtype=np.int64)
    return TeacherTarget(name, 1.0, none, none, None, sums, np.array(tokens, dtype=np.float32))


def _batch(targets):
    sample = np.repeat([0, 1], LENGTHS)
    none = np.zeros(0, dtype=np.int64)
    return FusionBatch(np.zeros((2, 1), dtype=np.int64), none, none, np.zeros(sum(LENGTHS)), sample, tuple(targets))


def _golden():
    teachers = [_target(f"t{i}", values, (4 + i, 5)) for i, values in enumerate(TEACHERS)]
    batch = _batch([*teachers, _target("initial", PIVOT, LENGTHS)])
    logps_N = torch.tensor([PIVOT[0]] * 3 + [PIVOT[1]] * 2, requires_grad=True)
    return logps_N, batch


@pytest.mark.parametrize(
    ("rule", "clip", "loss"),
    [
        ("max_margin", True, 0.970035),
        ("mean", True, 0.894120),
        ("max_margin", False, 0.575084),
        ("mean", False, 0.606879),
    ],
)
def test_golden_vectors(rule, clip, loss):
    logps_N, batch = _golden()
    value, parts = infifpo_loss(InfiFPO(rule=rule, clip=clip), logps_N, batch, batch.counts)
    assert value.item() == pytest.approx(loss, abs=1e-5)
    assert float(parts["preferred"]) == 1.0
    (gradient,) = torch.autograd.grad(value, logps_N)
    assert (gradient[:3] < 0).all()
    assert (gradient[3:] > 0).all()


def test_dpo_golden_value():
    logps_N, batch = _golden()
    value, _ = dpo_loss(DPO(), logps_N, batch, batch.counts)
    assert value.item() == pytest.approx(0.693147, abs=1e-5)


def _random_pairs(seed=0, pairs=6):
    make = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 7, (2 * pairs,), generator=make)
    logps_N = -torch.rand(int(lengths.sum()), generator=make) * 2
    sample = np.repeat(np.arange(2 * pairs), lengths.numpy())
    initial = -torch.rand(2 * pairs, generator=make).numpy() * 8
    none = np.zeros(0, dtype=np.int64)
    target = TeacherTarget("initial", 1.0, none, none, None, initial, lengths.float().numpy())
    batch = FusionBatch(np.zeros((2 * pairs, 1)), none, none, np.zeros(len(logps_N)), sample, (target,))
    return logps_N.requires_grad_(), batch, lengths


def test_one_teacher_equal_to_the_initial_model_is_dpo():
    logps_N, batch, _ = _random_pairs()
    twice = dataclasses.replace(batch, targets=(batch.targets[0], batch.targets[0]))
    fused, _ = infifpo_loss(InfiFPO(), logps_N, twice, batch.counts)
    plain, _ = dpo_loss(DPO(), logps_N, batch, batch.counts)
    torch.testing.assert_close(fused, plain)


def test_dpo_without_length_norm_is_the_published_loss():
    """-log sigmoid(beta [(pi_w - ref_w) - (pi_l - ref_l)]) on summed log-probabilities, averaged over pairs."""
    logps_N, batch, lengths = _random_pairs(1)
    loss, parts = dpo_loss(DPO(beta=0.1, length_norm=False), logps_N, batch, batch.counts)
    policy = torch.stack([part.sum() for part in logps_N.split(lengths.tolist())])
    reference = torch.from_numpy(batch.targets[0].response_logps)
    margin = 0.1 * ((policy - reference)[0::2] - (policy - reference)[1::2])
    torch.testing.assert_close(loss, -F.logsigmoid(margin).mean())
    torch.testing.assert_close(parts["margin"], margin.detach().mean())
    torch.testing.assert_close(
        torch.autograd.grad(loss, logps_N)[0],
        torch.autograd.grad(-F.logsigmoid(margin).mean(), logps_N)[0],
    )


def test_margin_from_initial_differs_from_policy_only_in_the_choice_of_teacher():
    """Two teachers on either side: the one farthest from the policy wins, or the one farthest from the initial."""
    logps_N = torch.tensor([-0.1, -0.1, -0.1, -1.0, -1.0])
    teachers = [_target("near zero", (-0.05, -1.0), LENGTHS), _target("far", (-1.5, -1.0), LENGTHS)]
    batch = _batch([*teachers, _target("initial", (-2.0, -1.0), LENGTHS)])
    from_policy, _ = infifpo_loss(InfiFPO(clip=False), logps_N, batch, batch.counts)
    from_initial, _ = infifpo_loss(InfiFPO(clip=False, margin_from="initial"), logps_N, batch, batch.counts)
    expected_far = -F.logsigmoid(torch.tensor(2.5 * (-0.1 + 1.5)))
    expected_near = -F.logsigmoid(torch.tensor(2.5 * (-0.1 + 0.05)))
    torch.testing.assert_close(from_policy, expected_far)
    torch.testing.assert_close(from_initial, expected_near)


def test_dpo_with_variant_ipo_is_the_published_ipo_loss():
    """(h - 1 / (2 beta))^2 with h the difference of mean log-ratios, as TRL 1.16 has it."""
    logps_N, batch, lengths = _random_pairs(2)
    loss, _ = dpo_loss(DPO(beta=0.3, variant="ipo"), logps_N, batch, batch.counts)
    policy = torch.stack([part.mean() for part in logps_N.split(lengths.tolist())])
    ratio = policy - torch.from_numpy(batch.targets[0].response_logps) / lengths
    torch.testing.assert_close(loss, (ratio[0::2] - ratio[1::2] - 1 / 0.6).square().mean())


def test_one_teacher_for_both_responses():
    """Per response the far teachers of each side win; per pair the one whose two margins add up to most."""
    policy = (-0.1, -0.1)
    chosen_far, rejected_far, both = (-2.0, -0.2), (-0.2, -1.9), (-1.2, -1.2)
    logps_N = torch.tensor([policy[0]] * 3 + [policy[1]] * 2)
    targets = [_target(str(i), v, LENGTHS) for i, v in enumerate((chosen_far, rejected_far, both))]
    batch = _batch([*targets, _target("initial", policy, LENGTHS)])

    def u(fused):
        return -F.logsigmoid(torch.tensor(2.5 * ((policy[0] - fused[0]) - (policy[1] - fused[1]))))

    per_response, _ = infifpo_loss(InfiFPO(clip=False), logps_N, batch, batch.counts)
    torch.testing.assert_close(per_response, u((chosen_far[0], rejected_far[1])))
    per_pair, _ = infifpo_loss(InfiFPO(clip=False, fuse_per="pair"), logps_N, batch, batch.counts)
    torch.testing.assert_close(per_pair, u(both))


def _random_triples(teachers=1, prompts=5, seed=3):
    make = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 7, (3 * prompts,), generator=make)
    logps_N = -torch.rand(int(lengths.sum()), generator=make) * 2
    none = np.zeros(0, dtype=np.int64)
    targets = tuple(
        TeacherTarget(
            str(i), 1.0, none, none, None, -torch.rand(3 * prompts, generator=make).numpy() * 8, lengths.float().numpy()
        )
        for i in range(teachers + 1)
    )
    sample = np.repeat(np.arange(3 * prompts), lengths.numpy())
    batch = FusionBatch(np.zeros((3 * prompts, 1)), none, none, np.zeros(len(logps_N)), sample, targets)
    return logps_N.requires_grad_(), batch, lengths


def test_wrpo_is_its_formula_on_the_log_ratios():
    logps_N, batch, lengths = _random_triples(teachers=0)
    loss, parts = wrpo_stage_loss(WRPO(alpha=0.3, beta=2.0), logps_N, batch, batch.counts)
    policy = torch.stack([part.mean() for part in logps_N.split(lengths.tolist())])
    d = (policy - torch.from_numpy(batch.targets[-1].response_logps) / lengths).reshape(-1, 3)
    margin = 2.0 * (0.3 * d[:, 0] + 0.7 * d[:, 1] - d[:, 2])
    torch.testing.assert_close(loss, -F.logsigmoid(margin).mean())
    torch.testing.assert_close(parts["margin"], margin.detach().mean())
    (gradient,) = torch.autograd.grad(loss, logps_N)
    of_sides = [part.sum() for part in gradient.split(lengths.tolist())]
    assert all(g < 0 for g in [*of_sides[0::3], *of_sides[1::3]])
    assert all(g > 0 for g in of_sides[2::3])


def test_wrpo_against_fused_teachers_with_alpha_1_is_infifpo_on_the_teachers_responses():
    logps_N, batch, lengths = _random_triples(teachers=2)
    loss, _ = wrpo_stage_loss(WRPO(alpha=1.0, reference="fused"), logps_N, batch, batch.counts)
    keep = np.tile([True, False, True], 5)
    pairs = dataclasses.replace(
        batch,
        input_ids=batch.input_ids[keep],
        sample=np.repeat(np.arange(10), lengths.numpy()[keep]),
        targets=tuple(
            dataclasses.replace(t, response_logps=t.response_logps[keep], response_tokens=t.response_tokens[keep])
            for t in batch.targets
        ),
    )
    of_pairs = logps_N[torch.from_numpy(np.repeat(keep, lengths.numpy()))]
    expected, _ = infifpo_loss(InfiFPO(), of_pairs, pairs, pairs.counts)
    torch.testing.assert_close(loss, expected)
