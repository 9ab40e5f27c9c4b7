"""Weights of teachers and samples from the consensus: one teacher alone, an order that says nothing, and formulas."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from rayfuse.batch import FusionBatch
from rayfuse.config import SFT, STAGES, InfiFusion, InfiGFusion, Trust
from rayfuse.losses import fused_head, gw_couplings, token_logps
from rayfuse.stages import METHODS
from rayfuse.stages.sft import sft_loss
from tests.stages.batches import LENGTHS, K, every_stage, make_case

B = len(LENGTHS)
WEIGHED = {
    name: stage
    for name, stage in {**every_stage(), "exact": InfiGFusion(mode="exact", lam=0.5)}.items()
    if "teacher_weights" in type(stage).model_fields
}
"""Every method that has weights of teachers by sample."""
COMPARED = {name: stage for name, stage in WEIGHED.items() if not {"carried", "mined", "routed"} & set(stage.targets)}
"""Those whose loss adds teachers up; the others mix them in the prepare task (tests/prepare)."""
SUMMED = {name: stage for name, stage in COMPARED.items() if name != "trust"}


@pytest.fixture(autouse=True)
def solved_here(monkeypatch):
    """Exact couplings without Ray."""
    monkeypatch.setattr(
        "rayfuse.stages.couplings.begin_couplings",
        lambda student, graphs: (
            lambda: [torch.from_numpy(gw_couplings(student.detach().double().numpy(), graph)) for graph in graphs]
        ),
    )


def with_weights(batch: FusionBatch, *weights, samples=None) -> FusionBatch:
    """The batch with these weights [B] of each teacher, and of the samples."""
    targets = [
        dataclasses.replace(target, sample_weights=None if w is None else np.array(w, dtype=np.float32))
        for target, w in zip(batch.targets, weights, strict=True)
    ]
    of_samples = None if samples is None else np.array(samples, dtype=np.float32)
    return dataclasses.replace(batch, targets=tuple(targets), sample_weights=of_samples)


def measured(stage, case, batch):
    """Loss and gradients."""
    if stage.kept(K) is None:
        output = token_logps(case.hidden, case.weight, torch.from_numpy(batch.labels))
    else:
        picks = None if batch.picks is None else torch.from_numpy(batch.picks)
        weights = None if batch.row_weights is None else torch.from_numpy(batch.row_weights)
        labels = torch.from_numpy(batch.labels)
        output = fused_head(case.hidden, case.weight, labels, K, picks=picks, lse_gradient=True, weights=weights)
    loss, _ = METHODS[stage.method](stage, output, batch, batch.counts)
    return loss.detach(), torch.autograd.grad(loss, (case.hidden, case.weight))


def assert_same(one, other, *, bits=False):
    torch.testing.assert_close(one[0], other[0], rtol=0 if bits else 1e-5, atol=0 if bits else 1e-6)
    for mine, theirs in zip(one[1], other[1], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0 if bits else 1e-4, atol=0 if bits else 1e-6)


def only(batch: FusionBatch, s: int) -> FusionBatch:
    """The batch with teacher s alone."""
    picks = batch.picks
    if picks is not None and picks.shape[1] == K * len(batch.targets):
        picks = np.ascontiguousarray(picks[:, s * K : (s + 1) * K])
    return dataclasses.replace(batch, targets=(batch.targets[s],), picks=picks)


def test_every_distillation_has_the_knob_and_every_method_on_responses_weighs_samples():
    assert set(WEIGHED) - {"exact"} == {name for name, kind in STAGES.items() if not kind(method=name).sides} - {"sft"}
    samples = {name for name, kind in STAGES.items() if "sample_weights" in kind.model_fields}
    # On-policy the student learns from its own texts, which no row is sure of.
    assert samples == {name for name, kind in STAGES.items() if not kind(method=name).sides} - {"onpolicy"}


@pytest.mark.parametrize(("name", "stage"), COMPARED.items(), ids=list(COMPARED))
@pytest.mark.parametrize("s", [0, 1])
def test_a_one_hot_weight_is_the_single_teacher(name, stage, s):
    case = make_case(stage, stage.targets)
    one_hot = [np.eye(2)[s][t] * np.ones(B) for t in range(2)]
    assert_same(
        measured(stage, case, with_weights(case.batch, *one_hot)),
        measured(stage, case, only(case.batch, s)),
    )


@pytest.mark.parametrize(("name", "stage"), COMPARED.items(), ids=list(COMPARED))
def test_the_order_of_the_teachers_says_nothing(name, stage):
    case = make_case(stage, stage.targets)
    draw = np.random.default_rng(0)
    weights = draw.random((2, B))
    batch = with_weights(case.batch, *weights, samples=draw.random(B))
    picks = batch.picks
    if picks is not None and picks.shape[1] == 2 * K:
        picks = np.concatenate((picks[:, K:], picks[:, :K]), axis=1)
    turned = dataclasses.replace(batch, targets=batch.targets[::-1], picks=picks)
    assert_same(measured(stage, case, batch), measured(stage, case, turned))


@pytest.mark.parametrize(("name", "stage"), COMPARED.items(), ids=list(COMPARED))
def test_full_weights_are_the_papers_sum(name, stage):
    case = make_case(stage, stage.targets)
    ones = np.ones(B)
    weighted = with_weights(case.batch, ones, ones, samples=ones)
    assert_same(measured(stage, case, weighted), measured(stage, case, case.batch))


@pytest.mark.parametrize(("name", "stage"), SUMMED.items(), ids=list(SUMMED))
def test_equal_shares_are_the_mean_over_the_teachers(name, stage):
    case = make_case(stage, stage.targets)
    half = np.full(B, 0.5)
    assert_same(
        measured(stage, case, with_weights(case.batch, half, half)),
        measured(stage.model_copy(update={"over_teachers": "mean"}), case, case.batch),
    )


def test_equal_shares_of_two_teachers_are_plain_trust():
    case = make_case(Trust(), ("responses",))
    half = np.full(B, 0.5)
    assert_same(measured(Trust(), case, with_weights(case.batch, half, half)), measured(Trust(), case, case.batch))


def test_trust_by_hand():
    """p 0.5 and 0.2: the first counts fully, the second 0.4 times as much, and 0.7 of it all is known."""
    stage, case = Trust(trust=2.0), make_case(Trust(), ("responses",))
    batch = with_weights(case.batch, np.full(B, 0.5), np.full(B, 0.2), samples=np.linspace(0, 1, B))
    per_token = [target.response_logps / target.response_tokens for target in batch.targets]
    believed = np.maximum(np.exp(2 * per_token[0]), 0.4 * np.exp(2 * per_token[1]))
    expected = 0.7 * believed * np.linspace(0, 1, B)
    logps = token_logps(case.hidden, case.weight, torch.from_numpy(batch.labels)).detach().numpy()
    loss, _ = measured(stage, case, batch)
    assert float(loss) == pytest.approx(-(expected[batch.sample] * logps).sum() / len(logps), rel=1e-5)


@pytest.mark.parametrize("stage", [InfiFusion(lam=0.4), InfiFusion(lam=0.4, standardized=False)])
def test_infifusion_equals_its_formula_over_full_logits(stage):
    """Every sample has its own weights of teachers and its own weight."""
    case = make_case(stage, stage.targets)
    draw = np.random.default_rng(1)
    p, v = draw.random((2, B)).astype(np.float32), draw.random(B).astype(np.float32)
    batch = with_weights(case.batch, *p, samples=v)
    logits = case.hidden @ case.weight.T
    total = 0.0
    for s, target in enumerate(batch.targets):
        for row, logps in zip(target.rows, target.logps, strict=True):
            b = batch.sample[row]
            student, teacher = logits[row].topk(K).values, torch.from_numpy(logps).float()
            if stage.standardized:
                student, teacher = ((x - x.mean()) / (x.std() + 1e-7) for x in (student, teacher))
            else:
                student = student - logits[row].logsumexp(-1)
            distance = (student - teacher).abs().sum()
            total = total + target.weight * float(v[b] * p[s, b]) * distance / len(target.rows)
    sft = (
        F.cross_entropy(logits, torch.from_numpy(batch.labels), reduction="none") * torch.from_numpy(v[batch.sample])
    ).mean()
    expected = (1 - stage.lam) * sft + stage.lam * total
    assert_same(
        measured(stage, case, batch),
        (expected.detach(), torch.autograd.grad(expected, (case.hidden, case.weight))),
    )


SAMPLED = {**{name: stage for name, stage in WEIGHED.items() if name != "onpolicy"}, "sft": SFT()}


@pytest.mark.parametrize(("name", "stage"), SAMPLED.items(), ids=list(SAMPLED))
def test_a_sample_without_weight_is_not_learnt(name, stage):
    """Its rows get no gradient from SFT or any distance; the others keep theirs."""
    case = make_case(stage, stage.targets)
    batch = dataclasses.replace(case.batch, sample_weights=np.array([1, 0, 1, 0, 1, 1], dtype=np.float32))
    if name == "multilevelot":  # one order of channels for the micro-batch: its softmaxes see all samples
        pytest.skip("its positions share one order of channels")
    _, (of_hidden, _) = measured(stage, case, batch)
    _, (whole, _) = measured(stage, case, case.batch)
    silent = np.isin(batch.sample, [1, 3])
    assert not of_hidden[silent].any()
    torch.testing.assert_close(of_hidden[~silent], whole[~silent], rtol=1e-4, atol=1e-7)


def test_an_engine_that_leaves_the_weights_out_is_found():
    case = make_case(SFT(), ())
    batch = dataclasses.replace(case.batch, sample_weights=np.ones(B, dtype=np.float32))
    head = fused_head(case.hidden, case.weight, torch.from_numpy(batch.labels), K)
    with pytest.raises(AssertionError, match="the engine left the samples' weights out"):
        sft_loss(SFT(), head, batch, batch.counts)


def test_micro_batches_of_weighted_samples_add_up():
    stage = InfiGFusion(lam=0.5)
    case = make_case(stage, stage.targets)
    draw = np.random.default_rng(2)
    whole = with_weights(case.batch, *draw.random((2, B)), samples=draw.random(B))
    at_once, _ = measured(stage, case, whole)
    parts = []
    for of_part in ([0, 1], [2, 3, 4], [5]):
        rows = np.isin(whole.sample, of_part)
        first = np.flatnonzero(rows)[0]
        targets = []
        for target in whole.targets:
            kept = rows[target.rows]
            targets.append(
                dataclasses.replace(
                    target,
                    rows=target.rows[kept] - first,
                    logps=target.logps[kept],
                    graph=target.graph[of_part],
                    sample_weights=target.sample_weights[of_part],
                )
            )
        part = dataclasses.replace(
            whole,
            input_ids=whole.input_ids[of_part],
            labels=whole.labels[rows],
            sample=whole.sample[rows] - of_part[0],
            targets=tuple(targets),
            sample_weights=whole.sample_weights[of_part],
        )
        weights = torch.from_numpy(part.row_weights)
        labels = torch.from_numpy(part.labels)
        head = fused_head(case.hidden[torch.from_numpy(rows)], case.weight, labels, K, weights=weights)
        parts.append(METHODS["infigfusion"](stage, head, part, whole.counts)[0])
    torch.testing.assert_close(sum(parts), at_once, rtol=1e-5, atol=1e-6)


def test_a_dropped_expert_leaves_nobody_to_speak_for_it():
    """The teacher that counts in a sample was dropped there: the other's weight is 0, and so is its share."""
    stage = InfiFusion(lam=0.5)
    case = make_case(stage, stage.targets)
    batch = with_weights(case.batch, [1, 0, 1, 0, 1, 0], [0, 1, 0, 1, 0, 1])
    answered = np.array([True, True, False, True, True, True])
    kept = answered[batch.sample[batch.targets[0].rows]]
    first = dataclasses.replace(
        batch.targets[0],
        rows=batch.targets[0].rows[kept],
        logps=batch.targets[0].logps[kept],
        answered=answered,
    )
    second = dataclasses.replace(batch.targets[1], answered=np.ones(B, dtype=bool))
    dropped = dataclasses.replace(batch, targets=(first, second))
    np.testing.assert_allclose(dropped.shares, [1, 1, 0, 1, 1, 1])
    _, (gradient, _) = measured(stage.model_copy(update={"lam": 1.0}), case, dropped)
    assert not gradient[dropped.sample == 2].any()
    assert gradient[dropped.sample == 0].any()
