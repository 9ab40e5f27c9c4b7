"""On-policy distillation's loss against a dense one in float64, and what its knobs do."""

import dataclasses

import numpy as np
import pytest
import torch

from rayfuse.batch import Counts
from rayfuse.config import OnPolicy
from rayfuse.losses import fused_head
from rayfuse.stages.on_policy import _budget, on_policy_loss
from tests.stages.batches import K, make_case

DIVERGENCES = ("jsd", "reverse", "forward", "advantage")


def _case(stage):
    case = make_case(stage, stage.targets)
    hidden, weight = case.hidden.detach().double().requires_grad_(), case.weight.detach().double().requires_grad_()
    batch = case.batch
    if stage.divergence == "advantage":
        taught = np.zeros_like(batch.rollouts.taught)
        batch = dataclasses.replace(batch, rollouts=dataclasses.replace(batch.rollouts, taught=taught))
    return hidden, weight, batch


def _found(stage, hidden, weight, batch, totals=None):
    labels, picks = torch.from_numpy(batch.labels), torch.from_numpy(batch.picks)
    head = fused_head(hidden, weight, labels, K, picks=picks, lse_gradient=True)
    return on_policy_loss(stage, head, batch, totals or batch.counts)


def _dense(stage, hidden, weight, batch):
    """Position by position over the whole vocabulary, written without the package's losses."""
    logp = (hidden @ weight.T).log_softmax(1)
    target, total = batch.rollouts, 0.0
    own_tokens = target.own.sum()
    fields = [len(one.rows) for one in batch.targets]
    for n, label in enumerate(batch.labels):
        if not target.own[n]:
            total = total - target.counts[n] * logp[n, label]
            continue
        budget = 1.0
        if stage.budget == "teachers":
            budget = next(own_tokens / (2 * size) for one, size in zip(batch.targets, fields) if n in one.rows)  # noqa: B905
        if target.taught[n]:
            members = [np.flatnonzero(target.cells[n] == cell) for cell in range(3)]
            p = torch.stack([logp[n, batch.picks[n][of_cell]].exp().sum() for of_cell in members])
            p = torch.cat([p, 1 - p.sum()[None]])
            q = torch.from_numpy(target.mass[n, :3]).double()
            q = torch.cat([q, 1 - q.sum()[None]])
            m = (p + q) / 2
            kl = {"forward": (q, p), "reverse": (p, q)}
            pairs = [(q, m), (p, m)] if stage.divergence == "jsd" else [kl[stage.divergence]]
            value = sum((a * (a / b).log()).sum() for a, b in pairs) / len(pairs)
        else:
            chunk = np.flatnonzero(target.chunks == target.chunks[n])
            student = sum(logp[i, batch.labels[i]].detach() for i in chunk)
            advantage = (torch.tensor(float(target.chunk_logps[n])).double() - student).clamp(-stage.bound, stage.bound)
            value = -advantage * logp[n, label]
        total = total + budget * target.counts[n] * value
    return total / len(batch.labels)


@pytest.mark.parametrize("budget", ["tokens", "teachers"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_equals_the_dense_loss_and_its_gradient(divergence, budget):
    stage = OnPolicy(divergence=divergence, budget=budget, teacher_weights="consensus")
    hidden, weight, batch = _case(stage)
    loss, parts = _found(stage, hidden, weight, batch)
    expected = _dense(stage, hidden, weight, batch)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-7)
    for mine, theirs in zip(
        torch.autograd.grad(loss, (hidden, weight)), torch.autograd.grad(expected, (hidden, weight)), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
    own = [parts[name] for name in ("loss_sft", "loss_divergence", "loss_advantage")]
    torch.testing.assert_close(sum(own), loss.detach())
    routed = sum(float(parts[f"routed/{one.teacher}"]) for one in batch.targets)
    assert routed == pytest.approx(batch.rollouts.own.mean())


def test_micro_batches_add_up_to_the_global_batch():
    """The denominators are those of all workers: half of the totals, half of the loss."""
    stage = OnPolicy(budget="teachers", teacher_weights="consensus")
    hidden, weight, batch = _case(stage)
    alone, _ = _found(stage, hidden, weight, batch)
    doubled = Counts.of_array(2 * batch.counts.as_array())
    shared, _ = _found(stage, hidden, weight, batch, doubled)
    torch.testing.assert_close(2 * shared, alone)


def test_every_field_has_an_equal_part_of_the_own_tokens():
    """With losses of one at each position, the budget alone is seen: each teacher's tokens together weigh the same."""
    stage = OnPolicy(budget="teachers", teacher_weights="consensus")
    _, _, batch = _case(stage)
    weights = _budget(stage, batch, batch.counts, torch.device("cpu"))
    sums = [float(weights[one.rows].sum()) for one in batch.targets]
    assert sums == pytest.approx([batch.rollouts.own.sum() / 2] * 2)


def test_a_batch_without_rollouts_is_fine_tuning():
    stage = OnPolicy()
    hidden, weight, batch = _case(stage)
    none = np.zeros_like(batch.rollouts.own)
    rollouts = dataclasses.replace(batch.rollouts, own=none, taught=none, chunks=np.full(len(none), -1))
    rollouts = dataclasses.replace(rollouts, counts=np.ones_like(rollouts.counts))
    loss, _ = _found(stage, hidden, weight, dataclasses.replace(batch, rollouts=rollouts))
    expected = torch.nn.functional.cross_entropy(hidden @ weight.T, torch.from_numpy(batch.labels))
    torch.testing.assert_close(loss, expected)


def test_the_prefix_grows_linearly_to_all_at_the_end():
    stage = OnPolicy(prefix=0.25, max_new_tokens=40)
    assert [stage.longest(step, 4) for step in (1, 2, 3, 4)] == [10, 20, 30, 40]
    assert stage.longest(1, 1) == 10
    assert {OnPolicy(max_new_tokens=40).longest(step, 4) for step in (1, 2, 3, 4)} == {40}
