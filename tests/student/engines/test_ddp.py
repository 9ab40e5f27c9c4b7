"""The student's engine against plain transformers and torch, and the bound on its memory."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from rayfuse.batch import Counts
from rayfuse.config import DPO, Data, Stage, Student
from rayfuse.data.rows import read_samples
from rayfuse.errors import StudentError
from rayfuse.losses import fused_head
from rayfuse.prepare.preparer import Preparer
from rayfuse.prepare.spec import PrepareSpec
from rayfuse.stages.sft import sft_loss
from rayfuse.student.engines import head as head_module
from rayfuse.student.engines.ddp import DDPEngine

STAGE = Stage(method="sft", learning_rate=1e-3)


@pytest.fixture
def student(tiny):
    return Student(model=tiny.model("pivot"))


@pytest.fixture
def batch(tiny, student, tmp_path):
    samples, _ = read_samples(Data(path=str(tiny.root / "train.jsonl"), limit=24))
    spec = PrepareSpec(student, (), str(tmp_path / "store"), 4, "bytes", 200)
    return Preparer(spec, lambda *_: None)(samples)


def _engine(student, **changes):
    return DDPEngine(student.model_copy(update=changes), student.model, STAGE, torch.device("cpu"))


def test_loss_and_gradients_equal_transformers(student, batch):
    """Cross-entropy and every gradient equal those of transformers' own loss over full logits."""
    engine = _engine(student)
    head = engine.score(batch, 4)
    loss, _ = sft_loss(STAGE, head, batch, batch.counts)
    engine.backward(loss)

    reference = AutoModelForCausalLM.from_pretrained(student.model, dtype=torch.float32)
    input_ids = torch.from_numpy(batch.input_ids)
    logits = reference(input_ids, attention_mask=torch.from_numpy(batch.attention_mask)).logits
    expected = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1)[torch.from_numpy(batch.positions)], torch.from_numpy(batch.labels)
    )
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(engine.named[name].grad, parameter.grad, rtol=1e-3, atol=1e-6)


def test_steps_equal_torch_adamw(student, batch):
    """Three steps end at the weights that a plain torch loop reaches."""
    engine = _engine(student)
    reference = AutoModelForCausalLM.from_pretrained(student.model, dtype=torch.float32)
    optimizer = torch.optim.AdamW(reference.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)
    for _ in range(3):
        loss, _ = sft_loss(STAGE, engine.score(batch, 4), batch, batch.counts)
        engine.backward(loss)
        engine.step(1e-3)
        logits = reference(
            torch.from_numpy(batch.input_ids), attention_mask=torch.from_numpy(batch.attention_mask)
        ).logits
        torch.nn.functional.cross_entropy(
            logits.flatten(0, 1)[torch.from_numpy(batch.positions)], torch.from_numpy(batch.labels)
        ).backward()
        torch.nn.utils.clip_grad_norm_(reference.parameters(), STAGE.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(engine.named[name], parameter, rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("changes", [{"gradient_checkpointing": True}, {"dtype": "bfloat16"}])
def test_options_keep_the_loss(student, batch, changes):
    plain = _engine(student).score(batch, 4).loss_ce
    other = _engine(student, **changes).score(batch, 4).loss_ce
    tolerance = 3e-2 if "dtype" in changes else 1e-6
    torch.testing.assert_close(other, plain, rtol=tolerance, atol=tolerance)


def test_state_round_trip_continues_with_the_same_bits(student, batch):
    first = _engine(student)
    for _ in range(2):
        loss, _ = sft_loss(STAGE, first.score(batch, 4), batch, batch.counts)
        first.backward(loss)
        first.step(1e-3)
    second = _engine(student)
    second.load_state({name: {k: v.clone() for k, v in part.items()} for name, part in first.state().items()})
    for engine in (first, second):
        loss, _ = sft_loss(STAGE, engine.score(batch, 4), batch, batch.counts)
        engine.backward(loss)
        engine.step(1e-3)
    for name, value in first.named.items():
        assert torch.equal(value, second.named[name])


def test_state_of_another_model_is_refused(student, batch):
    engine = _engine(student)
    with pytest.raises(StudentError, match="another model"):
        engine.load_state({"weights": {"other": torch.zeros(1)}, "optimizer": {}})


def test_a_gradient_that_is_not_finite_stops_the_run(student, batch):
    engine = _engine(student)
    loss, _ = sft_loss(STAGE, engine.score(batch, 4), batch, batch.counts)
    engine.backward(loss * float("inf"))
    with pytest.raises(StudentError, match="gradient norm is"):
        engine.step(1e-3)


def test_export_is_a_complete_hugging_face_model(student, batch, tmp_path):
    engine = _engine(student)
    loss, _ = sft_loss(STAGE, engine.score(batch, 4), batch, batch.counts)
    engine.backward(loss)
    engine.step(1e-3)
    engine.export(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, engine.named[name])
    messages = [{"role": "user", "content": "hello"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == AutoTokenizer.from_pretrained(
        student.model
    ).apply_chat_template(messages, tokenize=False)
    assert json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"] == tokenizer.eos_token_id
    assert not list(tmp_path.glob("*.bin"))


def test_a_tied_weight_is_exported_once_and_in_float32_whatever_the_student_computes_in(student, tmp_path):
    engine = _engine(student, dtype="bfloat16")
    assert engine.model.config.tie_word_embeddings
    engine.export(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert set(stored) == set(engine.named)
    assert all(torch.equal(stored[name], value) for name, value in engine.named.items())
    assert {value.dtype for value in stored.values()} == {torch.float32}
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert torch.equal(model.lm_head.weight, engine.model.lm_head.weight)


def test_a_stage_at_a_small_rate_hands_its_whole_update_on(student, batch, tmp_path):
    """With bfloat16 files between stages an update of 1e-7 would be lost."""
    engine = _engine(student, dtype="bfloat16")
    before = {name: value.detach().clone() for name, value in engine.named.items()}
    loss, _ = sft_loss(STAGE, engine.score(batch, 4), batch, batch.counts)
    engine.backward(loss)
    engine.step(1e-7)
    engine.export(tmp_path)
    after = _engine(student.model_copy(update={"model": str(tmp_path)})).named
    assert all(torch.equal(after[name], value) for name, value in engine.named.items())
    assert all(not torch.equal(after[name], value) for name, value in before.items())


def test_generation_settings_that_transformers_refuses_to_write_are_kept(student, tmp_path):
    """A temperature without sampling is read, and must not lose the stage when it is written."""
    engine = _engine(student)
    engine.model.generation_config.update(temperature=0.6, do_sample=False)
    engine.export(tmp_path)
    settings = json.loads((tmp_path / "generation_config.json").read_text())
    assert settings["temperature"] == 0.6
    assert GenerationConfig.from_pretrained(tmp_path).temperature == 0.6


@pytest.fixture
def with_dropout(student, tmp_path):
    """The student with attention dropout 0.1."""
    folder = shutil.copytree(student.model, tmp_path / "dropout")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "attention_dropout": 0.1}))
    return student.model_copy(update={"model": str(folder)})


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_policy_has_no_dropout_and_equals_its_reference_at_the_first_step(with_dropout, batch, checkpointing):
    """So u = 0 in the first step of DPO: the log-probability of a response, from the policy and from the reference."""
    changes = {"gradient_checkpointing": checkpointing}
    policy = DDPEngine(with_dropout.model_copy(update=changes), with_dropout.model, DPO(), torch.device("cpu"))
    noisy = DDPEngine(with_dropout.model_copy(update=changes), with_dropout.model, STAGE, torch.device("cpu"))
    first, again = policy.log_probabilities(batch), policy.log_probabilities(batch)
    assert torch.equal(first, again)
    assert not torch.equal(noisy.log_probabilities(batch), noisy.log_probabilities(batch))
    reference = AutoModelForCausalLM.from_pretrained(with_dropout.model, dtype=torch.float32).eval()
    logits = reference(torch.from_numpy(batch.input_ids), attention_mask=torch.from_numpy(batch.attention_mask)).logits
    logps = logits.flatten(0, 1)[torch.from_numpy(batch.positions)].log_softmax(-1)
    expected = logps.gather(1, torch.from_numpy(batch.labels)[:, None])[:, 0]
    torch.testing.assert_close(first, expected, rtol=1e-5, atol=1e-5)


def test_a_policy_recomputes_its_layers_where_it_is_asked_to(with_dropout, batch):
    """The layers' activations are not kept, and the gradients are the same."""
    held, gradients = [], []
    for checkpointing in (False, True):
        student = with_dropout.model_copy(update={"gradient_checkpointing": checkpointing})
        policy = DDPEngine(student, student.model, DPO(), torch.device("cpu"))
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t.numel()) or t, lambda t: t):
            logps = policy.log_probabilities(batch)
        policy.backward(logps.sum())
        held.append(sum(saved))
        gradients.append({name: p.grad for name, p in policy.named.items()})
    assert held[1] < held[0]
    for name, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], value)


class Tensors(TorchDispatchMode):
    """Records the most elements of any tensor made inside."""

    def __init__(self):
        super().__init__()
        self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for item in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(item, torch.Tensor):
                self.most = max(self.most, item.numel())
        return out


def test_full_logits_are_never_made(student, batch, monkeypatch):
    """Forward and backward: no tensor is larger than a chunk of logits, the weights, or an activation."""
    monkeypatch.setattr(head_module, "fused_head", lambda *args, **kwargs: fused_head(*args, chunk=16, **kwargs))
    engine = _engine(student)
    config = engine.model.config
    with Tensors() as recorded:
        head = engine.score(batch, 4)
        loss, _ = sft_loss(STAGE, head, batch, batch.counts)
        engine.backward(loss + head.topk.sum() * 1e-3)
    activation = batch.input_ids.size * config.intermediate_size
    attention = len(batch.input_ids) * config.num_attention_heads * batch.input_ids.shape[1] ** 2
    weights = config.vocab_size * config.hidden_size
    assert recorded.most <= max(16 * config.vocab_size, weights, activation, attention)
    assert recorded.most < batch.input_ids.size * config.vocab_size


def test_units_of_different_size_weigh_by_their_tokens(tiny, student, batch, tmp_path):
    """Two micro-batches with the global denominators give the gradient of the whole batch."""
    samples, _ = read_samples(Data(path=str(tiny.root / "train.jsonl"), limit=24))
    preparer = Preparer(PrepareSpec(student, (), str(tmp_path / "s2"), 4, "bytes", 200), lambda *_: None)
    whole, parts = _engine(student), _engine(student)
    loss, _ = sft_loss(STAGE, whole.score(batch, 4), batch, batch.counts)
    whole.backward(loss)
    cuts = [preparer(samples[:5]), preparer(samples[5:])]
    totals = Counts.of_array(np.sum([cut.counts.as_array() for cut in cuts], axis=0))
    for index, cut in enumerate(cuts):
        with parts.accumulate(last=index == 1):
            loss, _ = sft_loss(STAGE, parts.score(cut, 4), cut, totals)
            parts.backward(loss)
    for name, value in whole.named.items():
        torch.testing.assert_close(parts.named[name].grad, value.grad, rtol=1e-3, atol=1e-6)
