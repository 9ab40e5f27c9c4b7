"""Judges against plain transformers, and programs of all kinds."""

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

from rayfuse.config import RewardModel, UnitTests
from rayfuse.data.prompts import Prompt
from rayfuse.data.sample import Sample
from rayfuse.errors import ModelError
from rayfuse.evaluation.judges import JUDGES
from rayfuse.evaluation.judges.unit_tests import program_of

PROMPTS = [Prompt(Sample((("user", text),), ""), answer) for text, answer in (("2 + 2?", "4"), ("say 1,000", "1,000"))]
PAIRS = [(PROMPTS[0], "4"), (PROMPTS[0], "It is 4"), (PROMPTS[1], "thus 1000."), (PROMPTS[1], " 1,000\n")]


def test_verifiers_are_the_scores_of_evaluation():
    assert JUDGES["exact"](type("C", (), {"method": "exact"}))(PAIRS) == [1.0, 0.0, 0.0, 1.0]
    assert JUDGES["number"](type("C", (), {"method": "number"}))(PAIRS) == [1.0, 1.0, 1.0, 1.0]


def _save(tiny, folder, labels=1, pad=True, name="code"):
    torch.manual_seed(labels)
    tokenizer = AutoTokenizer.from_pretrained(tiny.model(name))
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_labels=labels,
        pad_token_id=tokenizer.convert_tokens_to_ids(tokenizer.all_special_tokens[-1]) if pad else None,
    )
    model = LlamaForSequenceClassification(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("pad", [True, False])
def test_reward_model_gives_what_transformers_gives_one_by_one(tiny, tmp_path, pad):
    path = _save(tiny, tmp_path / "reward", pad=pad)
    judge = JUDGES["reward_model"](RewardModel(model=path, dtype="float32", batch_size=3))
    model = AutoModelForSequenceClassification.from_pretrained(path).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    expected = []
    for prompt, response in PAIRS:
        turns = [*prompt.sample.turns, {"role": "assistant", "content": response}]
        text = tokenizer.apply_chat_template(turns, tokenize=False)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        with torch.no_grad():
            expected.append(model(ids).logits.item())
    assert judge(PAIRS) == pytest.approx(expected, abs=1e-5)
    assert len(set(expected)) == 4
    assert judge(PAIRS) == judge(PAIRS)


def test_a_model_with_several_outputs_needs_a_label(tiny, tmp_path):
    path = _save(tiny, tmp_path / "reward", labels=3)
    with pytest.raises(ModelError, match=r"has 3 outputs; say which is the score with judge.label"):
        JUDGES["reward_model"](RewardModel(model=path))
    with pytest.raises(ModelError, match=r"judge.label is 3, but .* has 3 outputs"):
        JUDGES["reward_model"](RewardModel(model=path, label=3))
    of_label = [JUDGES["reward_model"](RewardModel(model=path, label=i, dtype="float32"))(PAIRS) for i in range(3)]
    assert of_label[0] != of_label[1] != of_label[2]


def test_a_language_model_is_no_reward_model(tiny):
    """transformers would give it a random head and say so in a warning."""
    with pytest.raises(ModelError, match=r"is no reward model: its files lack \['score.weight'\]"):
        JUDGES["reward_model"](RewardModel(model=tiny.model("code")))


def test_pickled_reward_models_are_refused(tiny, tmp_path):
    path = tmp_path / "reward"
    _save(tiny, path)
    (path / "model.safetensors").rename(path / "pytorch_model.bin")
    with pytest.raises(ModelError, match="pickled weights are refused"):
        JUDGES["reward_model"](RewardModel(model=str(path)))


def test_the_program_in_a_response():
    block = "```python\ndef f():\n    return 1\n```"
    assert program_of(f"Here:\n{block}\nUse it so:\n```\nf()\n```\n```bash\n{'pip install ' * 20}\n```") == (
        "def f():\n    return 1\n"
    )
    assert program_of("def f(): return 1") == "def f(): return 1"
    assert program_of("```\nx = 1\n```") == "x = 1\n"


def test_unit_tests_score_programs():
    prompt = Prompt(Sample((("user", "add"),), ""), tests=("assert add(1, 2) == 3", "assert add(0, 0) == 0"))
    judge = JUDGES["unit_tests"](UnitTests(seconds=60.0, cpus=2, isolation="limits"))
    good, bad = "```python\ndef add(a, b):\n    return a + b\n```", "def add(a, b):\n    return 3"
    assert judge([(prompt, good), (prompt, bad), (prompt, "I cannot.")]) == [1.0, 0.0, 0.0]
