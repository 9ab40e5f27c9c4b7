"""Losses without some of the teachers (serving.on_missing: drop): every sample keeps its share, whoever answered it."""

import dataclasses

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from rayfuse.batch import Counts, FusionBatch, TeacherTarget
from rayfuse.config import InfiFPO, InfiFusion, InfiGFusion
from rayfuse.errors import LossError
from rayfuse.losses import fuse_logps, fuse_pairs, fused_head
from rayfuse.prepare.targets import graph_features
from rayfuse.stages.infifpo import infifpo_loss
from rayfuse.stages.infifusion import infifusion_loss
from rayfuse.stages.infigfusion import infigfusion_loss

H, V, K = 16, 50, 6
LENGTHS = (5, 9, 7, 2)
N = sum(LENGTHS)


def _case(weights=(1.0, 0.5), twins=True, share=1.0):
    """Hidden states, output layer, labels, and a batch of four samples with two teachers that answered everything.

    `twins`: both teachers say the same at every position, so that losing one of them must not matter.
    """
    make = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, H, generator=make, requires_grad=True)
    weight = torch.randn(V, H, generator=make, requires_grad=True)
    labels = torch.randint(0, V, (N,), generator=make)
    sample = np.repeat(np.arange(len(LENGTHS)), LENGTHS)
    targets = []
    for s, weight_s in enumerate(weights):
        if s and twins:
            targets.append(dataclasses.replace(targets[0], teacher=f"t{s}", weight=weight_s))
            continue
        rows = torch.randperm(N, generator=make)[: int(N * share)].sort().values.numpy()
        logps = torch.randn(len(rows), 40, generator=make).log_softmax(-1).topk(K).values.half().numpy()
        graph = graph_features([logps[sample[rows] == b] for b in range(len(LENGTHS))])
        targets.append(TeacherTarget(f"t{s}", weight_s, rows, logps, graph))
    ids = np.zeros((len(LENGTHS), 1), dtype=np.int64)
    none = np.zeros(0, dtype=np.int64)
    return hidden, weight, labels, FusionBatch(ids, none, none, labels.numpy(), sample, tuple(targets))


def _without(batch, *missing):
    """The batch without the (teacher, sample) pairs that are missing, as a prepare task makes it."""
    targets = []
    for s, target in enumerate(batch.targets):
        answered = np.array([(s, b) not in missing for b in range(len(batch.input_ids))])
        kept = answered[batch.sample[target.rows]]
        graph = None if target.graph is None else np.where(answered[:, None], target.graph, 0)
        targets.append(
            dataclasses.replace(
                target, rows=target.rows[kept], logps=target.logps[kept], graph=graph, answered=answered
            )
        )
    return dataclasses.replace(batch, targets=tuple(targets))


def _loss(function, stage, hidden, weight, labels, batch, totals=None):
    loss, _ = function(stage, fused_head(hidden, weight, labels, K), batch, totals or batch.counts)
    return loss, torch.autograd.grad(loss, (hidden, weight))


METHODS = [
    (infifusion_loss, InfiFusion(lam=0.7)),
    (infifusion_loss, InfiFusion(lam=0.7, over_teachers="mean")),
    (infigfusion_loss, InfiGFusion(lam=0.7, alpha=2.0)),
]


@pytest.mark.parametrize(("function", "stage"), METHODS)
@pytest.mark.parametrize("missing", [[(1, 0)], [(0, 1), (0, 2), (1, 3)], [(1, 0), (1, 1), (1, 2), (1, 3)]])
def test_losing_one_of_two_teachers_that_say_the_same_changes_nothing(function, stage, missing):
    *model, whole = _case()
    expected, expected_grads = _loss(function, stage, *model, whole)
    loss, grads = _loss(function, stage, *model, _without(whole, *missing))
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    for mine, theirs in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("function", "stage"), METHODS)
def test_nothing_missing_gives_the_same_bits(function, stage):
    *model, whole = _case(twins=False, share=0.6)
    expected, grads = _loss(function, stage, *model, whole)
    loss, same = _loss(function, stage, *model, _without(whole))
    assert loss.equal(expected)
    assert all(a.equal(b) for a, b in zip(grads, same, strict=True))


def test_infifusion_equals_its_formula_with_missing_teachers():
    """Different teachers, positions that are not all aligned: the formula of the docstring, written out."""
    hidden, weight, labels, whole = _case(weights=(1.0, 0.5), twins=False, share=0.7)
    missing = [(0, 1), (1, 0), (1, 3)]
    batch = _without(whole, *missing)
    loss, grads = _loss(infifusion_loss, InfiFusion(lam=0.4), hidden, weight, labels, batch)
    logits = hidden @ weight.T
    total = 0.0
    for s, target in enumerate(batch.targets):
        student = logits[torch.from_numpy(target.rows)].topk(K).values
        teacher = torch.from_numpy(target.logps).float()
        student, teacher = ((x - x.mean(-1, True)) / (x.std(-1, keepdim=True) + 1e-7) for x in (student, teacher))
        read = sum(length for b, length in enumerate(LENGTHS) if (s, b) not in missing)
        positions = len(target.rows) * N / read
        for row, distance in zip(target.rows, (student - teacher).abs().sum(-1), strict=True):
            here = [t for t in (0, 1) if (t, batch.sample[row]) not in missing]
            share = 1.5 / sum((1.0, 0.5)[t] for t in here)
            total = total + (1.0, 0.5)[s] * share * distance / positions
    expected = 0.6 * F.cross_entropy(logits, labels) + 0.4 * total
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    for mine, theirs in zip(grads, torch.autograd.grad(expected, (hidden, weight)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("function", "stage"), METHODS)
def test_micro_batches_with_missing_teachers_add_up(function, stage):
    """A teacher that is missing in a whole micro-batch included, and the denominators through the workers' sum."""
    if isinstance(stage, InfiGFusion):
        stage = stage.model_copy(update={"alpha": 0.5})
    hidden, weight, labels, whole = _case(twins=False)
    batch = _without(whole, (1, 0), (1, 1), (0, 3))
    expected, _ = _loss(function, stage, hidden, weight, labels, batch)
    bounds = np.cumsum([0, *LENGTHS])
    cuts = []
    for first, last in ((0, 2), (2, 4)):
        start, stop = bounds[first], bounds[last]
        targets = []
        for target in batch.targets:
            inside = (target.rows >= start) & (target.rows < stop)
            part = {"answered": target.answered[first:last], "graph": target.graph[first:last]}
            rows, logps = target.rows[inside] - start, target.logps[inside]
            targets.append(dataclasses.replace(target, rows=rows, logps=logps, **part))
        ids = np.zeros((last - first, 1), dtype=np.int64)
        sample = batch.sample[start:stop] - first
        cuts.append(FusionBatch(ids, ids, ids, batch.labels[start:stop], sample, tuple(targets)))
    assert len(cuts[0].targets[1].rows) == 0
    totals = Counts.of_array(np.sum([cut.counts.as_array() for cut in cuts], axis=0), 2)
    assert totals == batch.counts
    parts = []
    for cut, (first, last) in zip(cuts, ((0, 2), (2, 4)), strict=True):
        rows = slice(bounds[first], bounds[last])
        parts.append(_loss(function, stage, hidden[rows], weight, labels[rows], cut, totals)[0])
    torch.testing.assert_close(sum(parts), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rule", ["max_margin", "mean", "confidence"])
@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_fusion_asks_only_those_that_answered(rule, side):
    """Each response fused from its own teachers alone, one column at a time."""
    make = torch.Generator().manual_seed(1)
    teachers = -torch.rand(3, 8, generator=make)
    initial, policy = -torch.rand(8, generator=make), -torch.rand(8, generator=make)
    answered = torch.rand(3, 8, generator=make) < 0.6
    answered[0, ~answered.any(0)] = True
    fused = fuse_logps(
        teachers.masked_fill(~answered, float("nan")), initial, policy, side=side, rule=rule, answered=answered
    )
    for n in range(8):
        alone = fuse_logps(
            teachers[answered[:, n], n : n + 1], initial[n : n + 1], policy[n : n + 1], side=side, rule=rule
        )
        torch.testing.assert_close(fused[n : n + 1], alone)
    with pytest.raises(LossError, match="at least one teacher per response"):
        fuse_logps(teachers, initial, policy, side=side, rule=rule, answered=torch.zeros(3, 8, dtype=torch.bool))


def test_infifpo_without_a_teacher_in_one_pair():
    """Two pairs; the first teacher is missing in the second pair: that pair is as if there were only the other one."""
    make = torch.Generator().manual_seed(2)
    tokens = np.array([3.0, 4.0, 5.0, 2.0], dtype=np.float32)
    none = np.zeros(0, dtype=np.int64)

    def model(name, answered=None):
        logps = (-torch.rand(4, generator=make) * 3).numpy() * tokens
        return TeacherTarget(name, 1.0, none, none, None, logps, tokens, answered=answered)

    everywhere = np.ones(4, dtype=bool)
    teachers = [model("a", np.array([True, True, False, False])), model("b", everywhere), model("initial", everywhere)]
    sample = np.repeat(np.arange(4), tokens.astype(int))
    logps_N = (-torch.rand(len(sample), generator=make)).requires_grad_()
    batch = FusionBatch(np.zeros((4, 1), dtype=np.int64), none, none, np.zeros(len(sample)), sample, tuple(teachers))
    loss, _ = infifpo_loss(InfiFPO(rule="mean"), logps_N, batch, batch.counts)

    expected = 0.0
    for pair, present in ((0, teachers), (1, teachers[1:])):
        of_pair = slice(2 * pair, 2 * pair + 2)
        rows = np.isin(sample, [2 * pair, 2 * pair + 1])
        targets = [
            dataclasses.replace(
                t, response_logps=t.response_logps[of_pair], response_tokens=tokens[of_pair], answered=None
            )
            for t in present
        ]
        ids = np.zeros((2, 1), dtype=np.int64)
        alone = FusionBatch(ids, none, none, np.zeros(rows.sum()), sample[rows] - 2 * pair, tuple(targets))
        expected = (
            expected + infifpo_loss(InfiFPO(rule="mean"), logps_N[torch.from_numpy(rows)], alone, batch.counts)[0]
        )
    torch.testing.assert_close(loss, expected)


def test_one_teacher_per_pair_is_chosen_among_those_that_answered():
    """fuse_pairs with per="pair", one column at a time against the teachers that answered it alone."""
    make = torch.Generator().manual_seed(3)
    sides = ("chosen", "rejected")
    teachers = {side: -torch.rand(3, 8, generator=make) for side in sides}
    initial, policy = ({side: -torch.rand(8, generator=make) for side in sides} for _ in range(2))
    answered = torch.rand(3, 8, generator=make) < 0.6
    answered[0, ~answered.any(0)] = True
    fused = fuse_pairs(teachers, initial, policy, per="pair", answered=answered)
    for n in range(8):
        one = slice(n, n + 1)
        alone = fuse_pairs(
            {side: teachers[side][answered[:, n], one] for side in sides},
            {side: initial[side][one] for side in sides},
            {side: policy[side][one] for side in sides},
            per="pair",
        )
        for side in sides:
            torch.testing.assert_close(fused[side][one], alone[side])
