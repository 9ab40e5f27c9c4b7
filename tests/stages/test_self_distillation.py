"""A teacher that is the student: every method's distance is zero, or the offset that its formula has.

Through the real path: the teacher scores the samples, prepare tasks make the targets, the student's own head answers.
Signals are float16, so zero is zero up to its rounding: log-probabilities down to -16 are off by 2^-8 at most.
"""

from __future__ import annotations

import math
import shutil

import numpy as np
import pytest
import torch

from rayfuse.alignment.token_bytes import encode_response
from rayfuse.config import STAGES, Data, InfiGFusion, Student, Teacher
from rayfuse.data.render import Renderer
from rayfuse.data.rollout import Rollout
from rayfuse.data.rows import read_preferences, read_samples
from rayfuse.losses import fused_head, gw_couplings, token_logps
from rayfuse.losses.transport import channels, rank_costs, sinkhorn_plan, sinkhorn_positions
from rayfuse.models.loading import load_causal_lm
from rayfuse.prepare.preparer import Preparer
from rayfuse.prepare.spec import INITIAL, PrepareSpec
from rayfuse.stages import METHODS
from rayfuse.teachers.identity import IdentifiedTeacher
from rayfuse.teachers.transformers import TransformersTeacher

K = 6
ROUNDING = K * 2.0**-8
"""Of a sum over K float16 log-probabilities, or of what is made of them."""


class Local:
    """The teacher in this process."""

    def __init__(self, teacher):
        self.backend = TransformersTeacher(teacher, K)

    def score(self, samples):
        return lambda: self.backend.score(samples)


class Itself:
    """The tiny pivot as student and as teacher, and its answers.

    It is untrained: its logits are made as far apart as a trained model's, or rounding would reorder them.
    """

    def __init__(self, tiny, folder):
        self.tiny, self.folder, self.path = tiny, folder, str(folder / "model")
        shutil.copytree(tiny.model("pivot"), self.path)
        self.model = load_causal_lm(Student(model=self.path), dtype="float32")
        with torch.no_grad():
            self.model.get_output_embeddings().weight.mul_(10)
        self.model.save_pretrained(self.path)
        self.teacher = Teacher(model=self.path, name="itself", dtype="float32")
        self.local = Local(self.teacher)

    def batch(self, stage):
        names = (["itself"] if stage.uses_teachers else []) + ([INITIAL] if stage.sides else [])
        teachers = tuple(IdentifiedTeacher(self.teacher.model_copy(update={"name": name}), name) for name in names)
        spec = PrepareSpec(
            student=Student(model=self.path),
            teachers=teachers,
            store=str(self.folder / "store"),
            k=stage.kept(K),
            alignment=stage.meets_by,
            max_length=200,
            targets=stage.targets,
            stage=stage,
        )
        return Preparer(spec, lambda *_: self.local)(self.samples(stage))

    def samples(self, stage):
        if not stage.sides:
            return read_samples(Data(path=str(self.tiny.root / "train.jsonl"), limit=12))[0]
        groups = read_preferences(Data(path=str(self.tiny.root / "pairs.jsonl"), limit=6), ("chosen", "rejected"))[0]
        middle = len(stage.sides) == 3  # the pivot's own response: the chosen one again
        return [sample for chosen, rejected in groups for sample in (chosen, *[chosen] * middle, rejected)]

    def hidden(self, batch):
        with torch.no_grad():
            out = self.model.base_model(
                input_ids=torch.from_numpy(batch.input_ids), attention_mask=torch.from_numpy(batch.attention_mask)
            )
        return out.last_hidden_state.flatten(0, 1)[torch.from_numpy(batch.positions)].requires_grad_()

    def answer(self, stage, batch):
        """Hidden states, and what the stage's loss is given."""
        hidden, weight = self.hidden(batch), self.model.get_output_embeddings().weight.detach()
        labels = torch.from_numpy(batch.labels)
        if stage.kept(K) is None:
            return hidden, token_logps(hidden, weight, labels)
        picks = None if batch.picks is None else torch.from_numpy(batch.picks)
        return hidden, fused_head(hidden, weight, labels, K, picks=picks, lse_gradient=stage.lse_gradient)


@pytest.fixture(scope="module")
def student(tiny, tmp_path_factory):
    return Itself(tiny, tmp_path_factory.mktemp("itself"))


def _couplings(student, graphs):
    return lambda: [torch.from_numpy(gw_couplings(student.detach().double().numpy(), graph)) for graph in graphs]


def _distance(student, stage, monkeypatch):
    """The batch, the student's answer, the loss's parts, and the gradient of the loss at lam 1."""
    monkeypatch.setattr("rayfuse.stages.couplings.begin_couplings", _couplings)
    batch = student.batch(stage)
    hidden, output = student.answer(stage, batch)
    loss, parts = METHODS[stage.method](stage, output, batch, batch.counts)
    (gradient,) = torch.autograd.grad(loss, hidden)
    return batch, output, loss.detach(), parts, gradient


ZERO = {
    "infifusion": [
        {},
        {"space": "probs"},
        {"standardized": False},  # raw logits against log-probabilities were 110 apart here
        {"standardized": False, "space": "probs"},
        {"alignment": "position"},
    ],
    "infigfusion": [{}, {"standardized": False}, {"mode": "exact"}],
    "kl": [{}, {"divergence": "reverse"}, {"divergence": "jsd", "temperature": 2.0}],
    "minilogit": [{}],
    "uld": [{}],
    "uld_hybrid": [{}],
    "wasserstein_kl": [{}, {"temperature": 3.0}],
}


@pytest.mark.parametrize(
    ("method", "knobs"), [(method, knobs) for method, several in ZERO.items() for knobs in several], ids=str
)
def test_the_distance_to_itself_is_zero(student, method, knobs, monkeypatch):
    stage = STAGES[method](method=method, lam=1.0, **knobs)
    batch, _, loss, parts, _ = _distance(student, stage, monkeypatch)
    assert len(batch.targets[0].rows) == len(batch.labels)  # one tokenizer: every position meets
    distances = {key: float(value) for key, value in parts.items() if key.endswith("/itself")}
    assert len(distances) == 1 + isinstance(stage, InfiGFusion)
    assert all(abs(value) < ROUNDING for value in distances.values()), distances
    assert abs(float(loss)) < 2 * ROUNDING


def _teacher(batch):
    return torch.from_numpy(batch.targets[0].logps).float()


def _sinkhorn(stage, batch, output):
    """The entropic plan moves mass between equal distributions too; exact transport would not."""
    q = (_teacher(batch) / stage.temperature).softmax(1)
    costs = rank_costs(K)
    return (sinkhorn_plan(q, q, costs, stage.regularisation, stage.iterations) * costs).sum() / len(q)


def _multilevelot(stage, batch, output):
    """The cross-entropy of a distribution with itself, which is its entropy; and the entropic plan as above."""
    values, target = _teacher(batch), batch.targets[0]
    scaled = (values / (values.std(dim=1, keepdim=True) + 1e-4)).softmax(1)
    S = channels(scaled, torch.from_numpy(target.teacher_ids), stage.channels)
    entropy = -(S.softmax(1) * S.log_softmax(1)).sum() / len(S)
    lengths = np.bincount(batch.sample, minlength=len(batch.input_ids)).tolist()
    half = (S / 2).softmax(1)
    sequence = sinkhorn_positions(half, half, lengths, 0.1, 10).mean()
    return stage.ce_weight * entropy + stage.sequence_weight * 0.001 * sequence


@pytest.mark.parametrize(
    ("method", "knobs", "offset", "rounding"),
    [
        ("sinkhorn", {"temperature": 8.0}, _sinkhorn, 1e-3),
        ("multilevelot", {}, _multilevelot, ROUNDING),  # which also swaps channels of nearly the same mass
    ],
)
def test_the_distance_to_itself_is_the_offset_of_the_formula(student, method, knobs, offset, rounding, monkeypatch):
    stage = STAGES[method](method=method, lam=1.0, **knobs)
    batch, output, loss, parts, _ = _distance(student, stage, monkeypatch)
    expected = float(offset(stage, batch, output))
    assert expected > 2 * rounding
    assert float(parts["loss_ot/itself"]) == pytest.approx(expected, abs=rounding)
    assert float(loss) == pytest.approx(expected, abs=rounding)


def test_sinkhorns_offset_is_that_of_its_entropy(student, monkeypatch):
    """Towards exact transport it vanishes."""
    stage = STAGES["sinkhorn"](method="sinkhorn", lam=1.0, temperature=8.0, regularisation=0.002, iterations=500)
    _, _, loss, _, _ = _distance(student, stage, monkeypatch)
    assert float(loss) < ROUNDING


@pytest.mark.parametrize("method", ["bytekd", "fusellm", "fusechat"])
def test_a_mixture_with_itself_is_off_by_what_the_top_k_leave_out(student, method, monkeypatch):
    """KL(q || p) is 0 but for the mass that q has not: q is p on the kept tokens, renormalised.

    bytekd moves the mass of tokens that begin with the written one onto it: those are left out here, position by
    position, by comparing with the target itself.
    """
    stage = STAGES[method](method=method, lam=1.0)
    batch, head, loss, parts, _ = _distance(student, stage, monkeypatch)
    q = torch.from_numpy(batch.mass)
    picked = (head.picked - head.lse[:, None]).detach()  # log p
    kept = q > 0
    mass = (picked.exp() * kept).sum(1)
    aside = ((q - picked.exp() / mass[:, None]) * kept).abs().sum(1)  # where q is not p, renormalised
    plain = aside < ROUNDING
    if method == "bytekd":
        assert plain.float().mean() > 0.5
    else:
        assert plain.all()
    kl = torch.where(kept, q * (q.clamp_min(1e-30).log() - picked), 0.0).sum(1)
    torch.testing.assert_close(kl[plain], -mass[plain].log(), rtol=0, atol=ROUNDING)
    assert float(parts["loss_kl"]) == pytest.approx(float(kl.mean()), abs=1e-3)
    entropy = -torch.xlogy(q, q).sum(1).mean()
    assert float(loss) == pytest.approx(float(kl.mean() + entropy), abs=1e-3)


@pytest.mark.parametrize(
    ("method", "knobs", "expected"),
    [
        ("infifpo", {}, math.log(2)),
        ("infifpo", {"rule": "mean"}, math.log(2)),
        ("infifpo", {"rule": "confidence", "clip": False}, math.log(2)),
        ("infifpo", {"fuse_per": "pair"}, math.log(2)),
        ("infifpo", {"length_norm": False, "beta": 0.1}, math.log(2)),
        ("infifpo", {"variant": "ipo"}, (1 / (2 * 2.5)) ** 2),
        ("dpo", {}, math.log(2)),
        ("dpo", {"variant": "ipo"}, (1 / (2 * 2.5)) ** 2),
        ("wrpo", {}, math.log(2)),
        ("wrpo", {"reference": "fused"}, math.log(2)),
    ],
)
def test_a_preference_loss_against_itself_starts_without_a_margin(student, method, knobs, expected, monkeypatch):
    """Teachers, reference and policy are one model: u is 0, so the loss is log 2, or IPO's distance to its goal."""
    stage = STAGES[method](method=method, **knobs)
    _, _, loss, parts, gradient = _distance(student, stage, monkeypatch)
    assert float(loss) == pytest.approx(expected, abs=1e-3)
    assert float(parts["margin"]) == pytest.approx(0.0, abs=1e-3)
    assert gradient.norm() > 0


def test_trust_in_itself_is_its_own_belief(student, monkeypatch):
    """There is no distance: a sample's weight is the student's own probability per token, to the power `trust`."""
    stage = STAGES["trust"](method="trust", trust=2.0)
    batch, logps, loss, parts, _ = _distance(student, stage, monkeypatch)
    sample = torch.from_numpy(batch.sample)
    B = len(batch.input_ids)
    sums = torch.zeros(B).index_add(0, sample, logps.detach())
    weights = torch.exp(2.0 * sums / torch.bincount(sample, minlength=B))
    assert float(parts["trusted"]) == pytest.approx(float(weights.mean()), rel=1e-3)
    assert float(loss) == pytest.approx(float(-(weights[sample] * logps.detach()).mean()), rel=1e-3)


def test_sft_has_no_teacher(student, monkeypatch):
    stage = STAGES["sft"](method="sft")
    batch, head, loss, parts, _ = _distance(student, stage, monkeypatch)
    assert batch.targets == ()
    assert set(parts) == {"loss_sft"}
    assert float(loss) == pytest.approx(float(-head.label_logps.mean()), rel=1e-5)


@pytest.mark.parametrize("divergence", ["jsd", "reverse", "forward", "advantage"])
def test_on_policy_against_itself_is_zero(student, divergence, monkeypatch):
    """Texts in the tokens that the tokenizer itself writes: teacher and student are in the same state everywhere."""
    tokenizer = Renderer.of(Student(model=student.path)).tokenizer

    def samples(stage):
        made = []
        for sample in read_samples(Data(path=str(student.tiny.root / "train.jsonl"), limit=12))[0]:
            ids, ends = encode_response(tokenizer, sample.response)
            tokens = {"token_ids": tuple(ids.tolist()), "ends": tuple(ends.tolist())}
            made.append(Rollout(sample.messages, sample.response, **tokens, written=sample))
        return made

    monkeypatch.setattr(student, "samples", samples)
    stage = STAGES["onpolicy"](method="onpolicy", divergence=divergence, share=1.0, max_new_tokens=100)
    _, output, loss, parts, gradient = _distance(student, stage, monkeypatch)
    shared = float(parts["taught_by_advantage"])
    assert shared == (1.0 if divergence == "advantage" else 0.0)
    assert float(parts["loss_sft"]) == 0.0
    other = STAGES["sft"](method="sft")
    batch = student.batch(stage)
    hidden, output = student.answer(stage, batch)
    (scale,) = torch.autograd.grad(METHODS["sft"](other, output, batch, batch.counts)[0], hidden)
    if divergence != "advantage":
        assert abs(float(loss)) < 2e-3
    assert gradient.norm() < 5e-3 * scale.norm()


def test_every_method_was_asked():
    offset = {"sinkhorn", "multilevelot", "bytekd", "fusellm", "fusechat"}
    assert {*ZERO, *offset, "infifpo", "dpo", "wrpo", "trust", "sft", "onpolicy"} == set(STAGES)
