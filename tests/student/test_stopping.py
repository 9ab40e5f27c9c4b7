"""A fused model stops where it was taught to, in every file that says where, and what stopped it before still does."""

import json
import logging

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.decoders import ByteLevel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from rayfuse.data.render import Renderer
from rayfuse.student.stopping import stop_at

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|tool_end|>")


def _tokenizer(template=CHATML, eos="<|endoftext|>"):
    """Bytes and four special tokens."""
    vocabulary = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=eos)
    tokenizer.add_special_tokens({"additional_special_tokens": [token for token in SPECIAL if token != eos]})
    tokenizer.chat_template = template
    return tokenizer


def _save(folder, tokenizer, eos, generation_eos):
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=len(tokenizer), num_key_value_heads=1, eos_token_id=eos, **size))
    model.generation_config = GenerationConfig(eos_token_id=generation_eos, max_new_tokens=7)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def _said(folder):
    files = (json.loads((folder / name).read_text()) for name in ("config.json", "generation_config.json"))
    return [tree["eos_token_id"] for tree in files], AutoTokenizer.from_pretrained(folder).eos_token_id


def _id(tokenizer, token):
    return tokenizer.convert_tokens_to_ids(token)


def test_a_base_model_with_a_chat_template_stops_at_its_end_of_turn(tmp_path):
    tokenizer = _tokenizer()
    text, turn = _id(tokenizer, "<|endoftext|>"), _id(tokenizer, "<|im_end|>")
    _save(tmp_path, tokenizer, text, text)
    end = Renderer(tokenizer).end_of_turn
    assert end == turn
    stop_at(tmp_path, tokenizer, end)
    assert _said(tmp_path) == ([[turn, text]] * 2, turn)
    assert GenerationConfig.from_pretrained(tmp_path).max_new_tokens == 7
    assert tokenizer.eos_token_id == text, "the tokenizer that the caller holds is as it was"


def test_generate_ends_there(tmp_path):
    """A model that always says the end of turn."""
    tokenizer = _tokenizer()
    turn = _id(tokenizer, "<|im_end|>")
    model = _save(tmp_path, tokenizer, _id(tokenizer, "<|endoftext|>"), _id(tokenizer, "<|endoftext|>"))
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.model.norm.weight.fill_(1.0)
        model.model.embed_tokens.weight.fill_(1.0)
        model.lm_head.weight[turn] = 1.0
    model.save_pretrained(tmp_path)
    lengths = []
    for _ in range(2):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
        lengths.append(loaded.generate(torch.tensor([[1]]), do_sample=False, max_new_tokens=9).shape[1] - 1)
        stop_at(tmp_path, AutoTokenizer.from_pretrained(tmp_path), turn)
    assert lengths == [9, 1]


def test_other_ends_are_kept_whichever_file_names_them(tmp_path):
    tokenizer = _tokenizer()
    text, turn, tool = (_id(tokenizer, token) for token in ("<|endoftext|>", "<|im_end|>", "<|tool_end|>"))
    _save(tmp_path, tokenizer, text, [tool, turn])
    stop_at(tmp_path, tokenizer, turn)
    assert _said(tmp_path) == ([[turn, tool, text]] * 2, turn)


def test_where_all_agree_nothing_changes(tmp_path):
    tokenizer = _tokenizer(eos="<|im_end|>")
    turn = _id(tokenizer, "<|im_end|>")
    _save(tmp_path, tokenizer, turn, turn)
    before = (tmp_path / "tokenizer_config.json").read_bytes()
    stop_at(tmp_path, tokenizer, turn)
    assert _said(tmp_path) == ([turn, turn], turn)
    assert (tmp_path / "tokenizer_config.json").read_bytes() == before


def test_a_model_that_named_no_end_gets_one(tmp_path):
    tokenizer = _tokenizer(eos="<|im_end|>")
    turn = _id(tokenizer, "<|im_end|>")
    _save(tmp_path, tokenizer, None, None)
    (tmp_path / "generation_config.json").unlink()
    stop_at(tmp_path, tokenizer, turn)
    assert json.loads((tmp_path / "config.json").read_text())["eos_token_id"] == turn
    assert not (tmp_path / "generation_config.json").exists()


def test_the_text_part_of_a_wrapper_says_it_too(tmp_path):
    tokenizer = _tokenizer()
    turn, text = _id(tokenizer, "<|im_end|>"), _id(tokenizer, "<|endoftext|>")
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {"eos_token_id": text}, "vision_config": {}}))
    stop_at(tmp_path, tokenizer, turn)
    tree = json.loads((tmp_path / "config.json").read_text())
    assert tree == {"text_config": {"eos_token_id": [turn, text]}, "vision_config": {}, "eos_token_id": [turn, text]}


def test_plain_text_that_ends_a_turn_does_not_end_every_text(tmp_path, caplog):
    """A template that ends a turn with ###: a model that stopped at each # would never write a heading."""
    tokenizer = _tokenizer("{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '###' }}{% endfor %}")
    text = _id(tokenizer, "<|endoftext|>")
    _save(tmp_path, tokenizer, text, text)
    with caplog.at_level(logging.WARNING):
        stop_at(tmp_path, tokenizer, Renderer(tokenizer).end_of_turn)
    assert _said(tmp_path) == ([text, text], text)
    assert "ends a turn with the plain token '#'" in caplog.text


def test_a_template_that_writes_the_tokenizers_end_elsewhere_keeps_its_prompts(tmp_path, caplog):
    template = "{{ eos_token }}" + CHATML
    tokenizer = _tokenizer(template)
    text, turn = _id(tokenizer, "<|endoftext|>"), _id(tokenizer, "<|im_end|>")
    _save(tmp_path, tokenizer, text, text)
    turns = [{"role": "user", "content": "Hi"}]
    before = tokenizer.apply_chat_template(turns, tokenize=False)
    stop_at(tmp_path, tokenizer, turn)
    assert _said(tmp_path) == ([[turn, text]] * 2, text)
    assert AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(turns, tokenize=False) == before
    assert "keeps its eos_token" in caplog.text


@pytest.mark.parametrize("style", ["math", "code", "instruct", "pivot"])
def test_models_that_agree_already_are_left_as_they_are(tiny, tmp_path, style):
    tokenizer = AutoTokenizer.from_pretrained(tiny.model(style))
    end = Renderer(tokenizer).end_of_turn
    tokenizer.save_pretrained(tmp_path)
    AutoModelForCausalLM.from_pretrained(tiny.model(style)).save_pretrained(tmp_path)
    stop_at(tmp_path, tokenizer, end)
    (config, generation), eos = _said(tmp_path)
    ends = config if isinstance(config, list) else [config]
    assert config == generation
    assert ends[0] == end == eos
