"""The load-balancing loss of mixtures of experts, against transformers' own."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    GraniteMoeConfig,
    GraniteMoeForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from rayfuse.config import DPO, Data, Stage, Student
from rayfuse.data.rows import read_samples
from rayfuse.errors import ModelError
from rayfuse.models.loading import load_tokenizer
from rayfuse.prepare.preparer import Preparer
from rayfuse.prepare.spec import PrepareSpec
from rayfuse.stages.sft import sft_loss
from rayfuse.student import loop
from rayfuse.student.engines.ddp import DDPEngine
from rayfuse.student.job import StageJob

SMALL = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "router_aux_loss_coef": 0.05,
    "pad_token_id": 0,
    "initializer_range": 0.3,
}
FAMILIES = {
    "mixtral": (MixtralConfig, MixtralForCausalLM),
    "qwen2_moe": (Qwen2MoeConfig, Qwen2MoeForCausalLM),
    "qwen3_moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM),
    "olmoe": (OlmoeConfig, OlmoeForCausalLM),
    "granitemoe": (GraniteMoeConfig, GraniteMoeForCausalLM),
    "gpt_oss": (GptOssConfig, GptOssForCausalLM),
}
STAGE = Stage(method="sft", learning_rate=1e-3, batch_size=24)


def _save(tiny, folder, family):
    tokenizer = load_tokenizer(Student(model=tiny.model("pivot")))
    config, model = FAMILIES[family]
    torch.manual_seed(0)
    model(config(**SMALL, vocab_size=len(tokenizer))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def mixtral(tiny, tmp_path):
    return _save(tiny, tmp_path / "mixtral", "mixtral")


@pytest.fixture
def batch_of(tiny, tmp_path):
    samples, _ = read_samples(Data(path=str(tiny.root / "train.jsonl"), limit=24))

    def prepared(model, part=slice(None)):
        spec = PrepareSpec(Student(model=model), (), str(tmp_path / "store"), 4, "bytes", 200)
        return Preparer(spec, lambda *_: None)(samples[part])

    return prepared


def _engine(model, stage=STAGE, **changes):
    return DDPEngine(Student(model=model, **changes), model, stage, torch.device("cpu"))


def _expected(model, batch):
    """Loss of transformers on the same positions, with its router loss, and the gradients."""
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    rows = torch.from_numpy(batch.positions)
    inputs, mask = torch.from_numpy(batch.input_ids), torch.from_numpy(batch.attention_mask)
    out = reference(input_ids=inputs, attention_mask=mask, output_router_logits=True)
    cross_entropy = torch.nn.functional.cross_entropy(out.logits.flatten(0, 1)[rows], torch.from_numpy(batch.labels))
    loss = cross_entropy + reference.router_aux_loss_coef * out.aux_loss
    loss.backward()
    return loss.detach(), out.aux_loss.detach(), {name: p.grad for name, p in reference.named_parameters()}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_value_and_gradient_are_those_of_transformers(tiny, tmp_path, batch_of, family, checkpointing):
    model = _save(tiny, tmp_path / family, family)
    batch = batch_of(model)
    engine = _engine(model, gradient_checkpointing=checkpointing)
    loss, _ = sft_loss(STAGE, engine.score(batch, 4), batch, batch.counts)
    router = engine.router_loss()
    engine.backward(loss + router)
    expected, balance, gradients = _expected(model, batch)
    torch.testing.assert_close(router.detach(), 0.05 * balance, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close((loss + router).detach(), expected, rtol=1e-5, atol=1e-6)
    assert set(gradients) == set(engine.named)
    for name, gradient in gradients.items():
        torch.testing.assert_close(engine.named[name].grad, gradient, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("cuts", [[slice(None)], [slice(0, 5), slice(5, 24)]])
def test_a_step_counts_every_token_once(mixtral, batch_of, cuts, monkeypatch):
    """One micro-batch gives transformers' loss; of several, each counts by its real tokens, prompts among them."""
    batches = [batch_of(mixtral, cut) for cut in cuts]
    engine = _engine(mixtral)
    job = StageJob.__new__(StageJob)
    object.__setattr__(job, "config", SimpleNamespace(signals=SimpleNamespace(k=4)))
    object.__setattr__(job, "index", 0)
    monkeypatch.setattr(StageJob, "stage", STAGE)
    object.__setattr__(job, "spec", PrepareSpec(Student(model=mixtral), (), "", 4, "bytes", 200))
    record = loop._step(job, STAGE, engine, batches, 1e-3, rank=0, world=1)
    tokens = np.array([batch.attention_mask.sum() for batch in batches])
    balances = [float(_expected(mixtral, batch)[1]) for batch in batches]
    assert record["loss_router"] == pytest.approx(0.05 * np.average(balances, weights=tokens), rel=1e-5)
    assert record["loss"] == pytest.approx(record["loss_sft"] + record["loss_router"], rel=1e-6)


def test_it_can_be_turned_off_and_changed(mixtral, batch_of):
    batch = batch_of(mixtral)
    values = []
    for coefficient in (0, 0.05, 0.1):
        engine = _engine(mixtral, router_loss=coefficient)
        engine.score(batch, 4)
        values.append(engine.router_loss())
    assert values[0] is None
    torch.testing.assert_close(2 * values[1], values[2])


def test_preference_stages_have_it_too(mixtral, batch_of):
    engine = _engine(mixtral, DPO())
    engine.log_probabilities(batch_of(mixtral))
    assert engine.router_loss() is not None


def test_a_model_without_a_router_has_none_and_refuses_a_coefficient(tiny, batch_of):
    model = tiny.model("pivot")
    engine = _engine(model)
    engine.score(batch_of(model), 4)
    assert engine.router_loss() is None
    with pytest.raises(ModelError, match=r"router_loss is 0\.1, but \w+ has no router loss"):
        _engine(model, router_loss=0.1)
