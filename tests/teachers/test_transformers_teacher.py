"""The transformers teacher against plain transformers."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rayfuse.config import Model, Teacher
from rayfuse.data.rows import read_samples
from rayfuse.data.sample import Sample
from rayfuse.errors import ModelError, TeacherError
from rayfuse.models.loading import vocabulary_size
from rayfuse.models.output_layer import check_output_layer, output_layer
from rayfuse.teachers.identity import fingerprint
from rayfuse.teachers.sampling import SeededSampling
from rayfuse.teachers.transformers import TransformersTeacher, length_batches
from tests.doubles import LargestTensor

K = 7


def _samples(tiny, n=12):
    from rayfuse.config import Data

    samples, _ = read_samples(Data(path=str(tiny.root / "train.jsonl"), limit=n))
    return samples


@pytest.fixture(scope="module")
def teacher(tiny):
    return TransformersTeacher(Teacher(model=tiny.model("code"), name="code", dtype="float32"), K)


def test_signals_equal_the_full_logits_of_transformers(tiny, teacher):
    model = AutoModelForCausalLM.from_pretrained(tiny.model("code"), dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny.model("code"))
    for sample, signals in zip(_samples(tiny), teacher.score(_samples(tiny)), strict=True):
        messages = sample.turns
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        prompt_ids = tokenizer.encode(prompt, add_special_tokens=False)
        response_ids = tokenizer.encode(sample.response, add_special_tokens=False)
        targets = torch.tensor([*response_ids, tokenizer.convert_tokens_to_ids("<|im_end|>")])
        with torch.no_grad():
            logits_TV = model(torch.tensor([prompt_ids + response_ids])).logits[0]
        logits_LV = logits_TV[len(prompt_ids) - 1 :]
        logps_LV = logits_LV.log_softmax(-1)
        top = logps_LV.topk(K)
        assert len(signals) == len(response_ids) + 1
        np.testing.assert_allclose(signals.logps, top.values.numpy(), atol=5e-3)
        picked = logps_LV.gather(1, torch.from_numpy(signals.ids.astype(np.int64)))
        np.testing.assert_allclose(picked.numpy(), top.values.numpy(), atol=1e-4)
        np.testing.assert_allclose(signals.lse, logits_LV.logsumexp(-1).numpy(), atol=1e-4)
        np.testing.assert_allclose(signals.token_logps, logps_LV[range(len(targets)), targets].numpy(), atol=1e-4)
        assert signals.byte_ends[-1] == len(sample.response.encode())


def test_the_same_unit_gives_the_same_bits(tiny, teacher):
    samples = _samples(tiny)
    for first, second in zip(teacher.score(samples), teacher.score(samples), strict=True):
        for field in dataclasses.fields(first):
            assert getattr(first, field.name).tobytes() == getattr(second, field.name).tobytes()


def test_padded_vocabulary_rows_take_no_part(tiny, tmp_path, teacher):
    """A copy of the model with 64 more rows, made likely, answers as the original does."""
    model = AutoModelForCausalLM.from_pretrained(tiny.model("code"), dtype=torch.float32)
    rows = model.lm_head.weight.shape[0]
    model.config.tie_word_embeddings = False
    padded = torch.nn.Linear(model.config.hidden_size, rows + 64, bias=False)
    with torch.no_grad():
        padded.weight[:rows] = model.get_input_embeddings().weight
        padded.weight[rows:] = 50.0
    model.set_output_embeddings(padded)
    embedding = torch.nn.Embedding(rows + 64, model.config.hidden_size)
    with torch.no_grad():
        embedding.weight[:rows] = model.get_input_embeddings().weight
    model.set_input_embeddings(embedding)
    model.config.vocab_size = rows + 64
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny.model("code")).save_pretrained(tmp_path)
    other = TransformersTeacher(Teacher(model=str(tmp_path), name="padded", dtype="float32"), K)
    for mine, theirs in zip(other.score(_samples(tiny)), teacher.score(_samples(tiny)), strict=True):
        assert mine.ids.max() < rows
        np.testing.assert_allclose(mine.lse, theirs.lse, atol=1e-5)
        np.testing.assert_allclose(mine.token_logps, theirs.token_logps, atol=1e-5)


def test_full_logits_are_never_made(tiny, teacher, monkeypatch):
    """With chunks of 16 positions no tensor has as many elements as positions times vocabulary."""
    import rayfuse.teachers.transformers as module

    real = module.teacher_topk
    monkeypatch.setattr(module, "teacher_topk", lambda *args, **kwargs: real(*args, chunk=16, **kwargs))
    samples = _samples(tiny, 60)
    rendered = [teacher.renderer.render(sample) for sample in samples]
    positions = sum(len(item.response_ids) for item in rendered)
    vocabulary = teacher.layer.weight.shape[0]
    with LargestTensor((teacher.layer.weight,)) as recorded:
        teacher.score(samples)
    padded = len(samples) * max(item.length for item in rendered)
    largest_activation = padded * teacher.model.config.intermediate_size
    assert max(recorded.sizes) <= max(16 * vocabulary, largest_activation, teacher.layer.weight.numel())
    assert max(recorded.sizes) < positions * vocabulary


def test_length_batches_waste_little_and_keep_their_limit():
    lengths = [5, 100, 7, 98, 99, 6, 300, 8]
    batches = length_batches(lengths, 250)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert batches[0] == [6]
    for batch in batches[1:]:
        assert len(batch) * max(lengths[i] for i in batch) <= 250


def test_more_ranks_than_tokens_is_refused(tiny):
    with pytest.raises(TeacherError, match="only"):
        TransformersTeacher(Teacher(model=tiny.model("code"), name="code"), 10_000)


def test_a_tokenizer_larger_than_the_model_is_refused(tiny):
    model = AutoModelForCausalLM.from_pretrained(tiny.model("code"))
    tokenizer = AutoTokenizer.from_pretrained(tiny.model("code"))
    tokenizer.add_tokens(["another word"])
    with pytest.raises(ModelError, match="do not belong together"):
        output_layer(model, vocabulary_size(tokenizer))


def test_fingerprint_names_all_that_answers_depend_on(tiny, tmp_path):

    base = Teacher(model=tiny.model("code"), name="code", dtype="float32")
    same = fingerprint(base, K)
    moved = tmp_path / "elsewhere"
    shutil.copytree(tiny.model("code"), moved)
    assert fingerprint(base.model_copy(update={"model": str(moved), "name": "other", "weight": 2.0}), K) == same
    others = {
        fingerprint(base, K + 1),
        fingerprint(base.model_copy(update={"dtype": "bfloat16"}), K),
        fingerprint(base.model_copy(update={"model": tiny.model("math")}), K),
    }
    template = moved / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    others.add(fingerprint(base.model_copy(update={"model": str(moved)}), K))
    others |= {fingerprint(base.model_copy(update={"template": {"enable_thinking": on}}), K) for on in (True, False)}
    assert len(others) == 6
    assert same not in others
    assert fingerprint(base.model_copy(update={"template": {}}), K) == same


def test_pickled_weights_are_refused(tiny, tmp_path):
    from rayfuse.models.loading import load_causal_lm

    AutoTokenizer.from_pretrained(tiny.model("code")).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tiny.model("code"))
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match="pickled weights are refused"):
        load_causal_lm(Model(model=str(tmp_path)))


def test_signals_of_an_empty_looking_response(teacher):
    """A response of spaces and one of a single character have rows, and the last predicts end-of-turn."""
    for response in (" ", "x", "\n\n"):
        (signals,) = teacher.score([Sample((("user", "hello"),), response)])
        assert len(signals) == len(signals.byte_ends) + 1
        assert signals.byte_ends[-1] == len(response.encode())


def test_greedy_answers_equal_transformers_one_by_one(tiny, teacher):
    """Batches of prompts padded on the left give what each prompt gives alone."""
    model = AutoModelForCausalLM.from_pretrained(tiny.model("code"), dtype=torch.float32).eval()
    samples = _samples(tiny, 9)
    answers = teacher.generate(samples, max_new_tokens=12, batch_size=4)
    tokenizer, end = teacher.renderer.tokenizer, teacher.renderer.end_of_turn
    for sample, answer in zip(samples, answers, strict=True):
        prompt = torch.from_numpy(teacher.renderer.prompt_ids(sample))[None]
        out = model.generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=end, pad_token_id=end)
        assert answer == tokenizer.decode([i for i in out[0, prompt.shape[1] :].tolist() if i != end])


def test_the_models_generation_settings_change_nothing(tiny, tmp_path, teacher):
    """They are no part of the fingerprint, so they must not be part of an answer."""
    shutil.copytree(tiny.model("code"), tmp_path / "copy")
    ask = {"max_new_tokens": 6, "batch_size": 3}
    samples = _samples(tiny, 6)
    plain = teacher.generate(samples, **ask)
    written = {token for text in plain for token in teacher.renderer.tokenizer.encode(text, add_special_tokens=False)}
    settings = {"suppress_tokens": sorted(written), "repetition_penalty": 5.0, "min_new_tokens": 6, "top_k": 2}
    (tmp_path / "copy" / "generation_config.json").write_text(json.dumps(settings))
    changed = teacher.teacher.model_copy(update={"model": str(tmp_path / "copy")})
    assert fingerprint(changed, K) == fingerprint(teacher.teacher, K)
    assert TransformersTeacher(changed, K).generate(samples, **ask) == plain


def test_sampled_answers_depend_on_the_seed_alone(tiny, teacher):
    ask = {"max_new_tokens": 8, "batch_size": 4, "temperature": 1.0}
    first = teacher.generate(_samples(tiny, 6), **ask, seed=1)
    assert first == teacher.generate(_samples(tiny, 6), **ask, seed=1)
    assert first != teacher.generate(_samples(tiny, 6), **ask, seed=2)


def test_an_answer_does_not_depend_on_the_prompts_beside_it(teacher, tiny):
    """Whatever shares the batch, in whatever order and number, a prompt's answer stays (float32 leaves room enough)."""
    samples = _samples(tiny, 8)
    ask = {"max_new_tokens": 8, "temperature": 1.0, "seed": 5}
    together = teacher.generate(samples, **ask, batch_size=8)
    assert teacher.generate(samples[::-1], **ask, batch_size=3)[::-1] == together
    assert [teacher.generate([sample], **ask, batch_size=1)[0] for sample in samples] == together


def test_sampled_tokens_follow_the_tempered_distribution(teacher, tiny):
    """First tokens of many seeds against the softmax of the model's own logits: a chi-squared test."""
    from scipy.stats import chisquare

    (sample,) = _samples(tiny, 1)
    prompt = torch.from_numpy(teacher.renderer.prompt_ids(sample))[None]
    with torch.no_grad():
        probabilities = (teacher.model(prompt).logits[0, -1].double() / 0.2).softmax(-1).numpy()
    draws, counts = 4000, np.zeros(len(probabilities))
    scores = torch.from_numpy(np.log(probabilities) * 0.2)[None]
    for seed in range(draws):
        options = {"seed": seed, "temperature": 0.2, "max_new_tokens": 1, "vocab_size": teacher.vocab_size}
        counts[int(SeededSampling([sample], **options)(None, scores).argmax())] += 1
    likely = probabilities * draws >= 10
    assert likely.sum() > 3
    observed = np.append(counts[likely], counts[~likely].sum())
    expected = np.append(probabilities[likely], probabilities[~likely].sum()) * draws
    assert chisquare(observed, expected).pvalue > 1e-3


def test_padded_vocabulary_is_never_sampled(tiny):
    (sample,) = _samples(tiny, 1)
    scores = torch.tensor([[0.0, 0.0, 50.0]])
    for seed in range(20):
        left = SeededSampling([sample], seed=seed, temperature=1.0, max_new_tokens=1, vocab_size=2)(None, scores)
        assert left[0, 2] == -torch.inf
        assert (left == 0).sum() == 1


def test_an_output_layer_that_does_more_than_it_says_is_refused(tiny):
    """A model that scales its logits in an unknown way would give wrong signals: it is refused."""
    model = AutoModelForCausalLM.from_pretrained(tiny.model("code"), dtype=torch.float32)
    layer = output_layer(model, model.config.vocab_size)
    check_output_layer(model, layer)
    with pytest.raises(ModelError, match="not supported"):
        check_output_layer(model, dataclasses.replace(layer, scale=0.5))
