"""Tokenizers in the files of other makers, against the makers' own encoders; and files that do not say enough."""

from __future__ import annotations

import base64
import importlib.util
import json
import shutil
from pathlib import Path

import pytest
from mistral_common.protocol.instruct.messages import AssistantMessage, UserMessage
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from sentencepiece import SentencePieceProcessor
from transformers import AutoTokenizer, MistralConfig

from jobs.smollm2_world import package_file
from rayfuse.config import Model
from rayfuse.data.render import Renderer
from rayfuse.data.sample import Message, Sample
from rayfuse.errors import ModelError
from rayfuse.models.loading import load_tokenizer
from tests.real_tokenizers import SENTENCEPIECE, TEKKEN

TEXTS = [
    "Hello, world!",
    "  two  spaces\n\n\ttab",
    "Fähre 世界 🙂👍🏽",
    "def f(x):\n    return x ** 2  # 12345\n",
]
RANKS = b"".join(base64.b64encode(bytes([byte])) + b" %d\n" % byte for byte in range(256))


def _folder(path: Path, files: dict[str, Path | bytes], model_type: str = "mistral") -> Path:
    path.mkdir(parents=True)
    for name, content in files.items():
        if isinstance(content, bytes):
            (path / name).write_bytes(content)
        else:
            shutil.copy(content, path / name)
    config = MistralConfig(vocab_size=131072).to_dict() | {"model_type": model_type}
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.fixture(scope="module")
def tekken() -> Path:
    return package_file("mistral_common", TEKKEN)


@pytest.fixture(scope="module")
def tekken_folder(tekken, tmp_path_factory) -> Path:
    return _folder(tmp_path_factory.mktemp("tekken") / "only", {"tekken.json": tekken})


def test_tekken_alone_gives_the_makers_tokens(tekken, tekken_folder):
    tokenizer = load_tokenizer(Model(model=str(tekken_folder)))
    assert tokenizer.is_fast
    makers = MistralTokenizer.from_file(str(tekken)).instruct_tokenizer.tokenizer
    for text in TEXTS:
        assert tokenizer.encode(text, add_special_tokens=False) == makers.encode(text, bos=False, eos=False)


def test_tekken_alone_gives_the_makers_prompt_and_end_of_turn(tekken, tekken_folder):
    renderer = Renderer.of(Model(model=str(tekken_folder)))
    makers = MistralTokenizer.from_file(str(tekken))
    turns = [UserMessage(content="Hi there."), AssistantMessage(content="Hello!"), UserMessage(content="Add 2 and 3.")]
    expected = makers.encode_chat_completion(ChatCompletionRequest(messages=turns)).tokens
    roles = ("user", "assistant", "user")
    sample = Sample(tuple(Message(role, turn.content) for role, turn in zip(roles, turns, strict=True)), "5")
    assert renderer.prompt_ids(sample).tolist() == expected
    assert renderer.end_of_turn == makers.instruct_tokenizer.tokenizer.eos_id


def test_tekken_beside_a_fast_tokenizer_is_not_used(tekken, tekken_folder, tmp_path):
    """Where mistral-common is installed transformers would take its class for such a folder, which is not fast."""
    folder = _folder(tmp_path / "both", {"tekken.json": tekken})
    load_tokenizer(Model(model=str(tekken_folder))).save_pretrained(folder)
    assert not getattr(AutoTokenizer.from_pretrained(folder), "is_fast", False)
    assert load_tokenizer(Model(model=str(folder))).is_fast


def test_tekken_alone_needs_the_template_that_mistral_common_has(tekken_folder, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "mistral_common" else found(name, *a)
    )
    with pytest.raises(ModelError, match=r"tekken\.json alone.*pip install mistral-common, or add tokenizer\.json"):
        load_tokenizer(Model(model=str(tekken_folder)))


def test_sentencepiece_alone_gives_its_own_tokens(tmp_path):
    source = package_file("mistral_common", SENTENCEPIECE)
    folder = _folder(tmp_path / "spm", {"tokenizer.model": source}, "llama")
    tokenizer = load_tokenizer(Model(model=str(folder)))
    own = SentencePieceProcessor(model_file=str(source))
    for text in TEXTS:
        assert tokenizer.encode(text, add_special_tokens=False) == own.encode(text)


@pytest.mark.parametrize(
    ("files", "model_type", "message"),
    [
        ({"qwen.tiktoken": RANKS}, "qwen2", r"qwen\.tiktoken alone.*Add tokenizer\.json.*TikTokenConverter"),
        ({"tiktoken.model": RANKS}, "deepseek_v3", r"tiktoken\.model alone.*TikTokenConverter"),
        ({"tokenizer.model": RANKS}, "llama", r"tokenizer\.model alone, a tiktoken file"),
        ({"tokenizer.model.v3": b"\n\x0bpiece"}, "mistral", r"tokenizer\.model\.v3.*copy it to tokenizer\.model"),
        ({}, "qwen2", r"has no vocabulary: its files lack\. Add tokenizer\.json, or set `tokenizer`"),
        ({}, "llama", r"cannot load the tokenizer of .*"),
    ],
)
def test_files_that_do_not_make_a_tokenizer_are_refused(tmp_path, files, model_type, message):
    folder = _folder(tmp_path / "model", files, model_type)
    with pytest.raises(ModelError, match=message):
        load_tokenizer(Model(model=str(folder)))
    with pytest.raises(ModelError, match=message.replace("cannot load the tokenizer of .*", "cannot load")):
        load_tokenizer(Model(model="elsewhere", tokenizer=str(folder)))


def test_the_command_that_converts_makes_the_same_tokens(tmp_path):
    import tiktoken
    from transformers.convert_slow_tokenizer import TikTokenConverter

    ranks = {bytes([byte]): byte for byte in range(256)} | {b"he": 256, b"hel": 257}
    lines = [base64.b64encode(token) + b" %d" % rank for token, rank in ranks.items()]
    folder = _folder(tmp_path / "converted", {"own.tiktoken": b"\n".join(lines)}, "qwen2")
    pattern = r"\S+|\s+"
    converter = TikTokenConverter(str(folder / "own.tiktoken"), pattern=pattern, extra_special_tokens=["<|end|>"])
    converter.converted().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "TokenizersBackend", "eos_token": "<|end|>"}')
    tokenizer = load_tokenizer(Model(model=str(folder)))
    encoding = tiktoken.Encoding("own", pat_str=pattern, mergeable_ranks=ranks, special_tokens={"<|end|>": 258})
    for text in ("hello there", "he said: hello"):
        assert tokenizer.encode(text, add_special_tokens=False) == encoding.encode(text)
