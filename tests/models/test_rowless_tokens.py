"""Tokenizers with more tokens than their model has rows: usable, and only a sample that needs such a token is not."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from rayfuse.config import Data, Model, Student, Teacher
from rayfuse.data.render import Renderer
from rayfuse.data.rows import read_samples
from rayfuse.data.sample import Sample
from rayfuse.errors import DataError, ModelError
from rayfuse.models.loading import load_tokenizer, token_rows, vocabulary_size
from rayfuse.models.tokenizer_files import valid_vocabulary
from rayfuse.prepare.measure import measure
from rayfuse.prepare.vocabulary import Vocabulary, counterparts
from rayfuse.teachers.openai.backend import OpenAITeacher
from rayfuse.teachers.parity.reference import Reference
from rayfuse.teachers.transformers import TransformersTeacher
from rayfuse.teachers.vllm import backend
from tests.teachers.stand_in import StandIn

K = 5
IMAGE, WORD = "<image_soft_token>", "rowlessword"
PROMPT = Sample((("user", f"What is in {IMAGE}?"),), "A cat.")
RESPONSE = Sample((("user", "Say it."),), f"It is {WORD} now.")
PLAIN = Sample((("user", "Say it."),), "It is a cat.")


def _grown(tiny, name: str, folder: Path) -> str:
    """A model of the tiny world whose tokenizer got three tokens and whose weights did not."""
    shutil.copytree(tiny.model(name), folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE], "pad_token": "[PAD]"})
    tokenizer.add_tokens([WORD])
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def grown(tiny, tmp_path_factory) -> str:
    return _grown(tiny, "code", tmp_path_factory.mktemp("grown") / "code")


@pytest.fixture(scope="module")
def rows(tiny) -> int:
    return AutoModelForCausalLM.from_pretrained(tiny.model("code")).lm_head.weight.shape[0]


def _teacher(folder: str, **keys) -> Teacher:
    return Teacher.model_validate({"model": folder, "name": "grown", "dtype": "float32", **keys})


def _refusals(score) -> None:
    """The samples that need such a token are refused by its name."""
    with pytest.raises(DataError, match=rf"the prompt needs the token '{IMAGE}' \(\d+\).*has no row"):
        score([PROMPT])
    with pytest.raises(DataError, match=rf"the response needs the token '{WORD}' \(\d+\).*has no row"):
        score([RESPONSE])


def test_a_transformers_teacher_answers_as_without_them(tiny, grown, rows):
    assert vocabulary_size(load_tokenizer(Model(model=grown))) == rows + 3
    samples = read_samples(Data(path=str(tiny.root / "train.jsonl"), limit=6))[0]
    more = TransformersTeacher(_teacher(grown), K)
    plain = TransformersTeacher(_teacher(tiny.model("code")), K)
    assert more.vocab_size == rows
    for mine, theirs in zip(more.score(samples), plain.score(samples), strict=True):
        np.testing.assert_array_equal(mine.ids, theirs.ids)
        np.testing.assert_array_equal(mine.logps, theirs.logps)
    assert more.generate(samples, max_new_tokens=5, batch_size=3, temperature=1.0) == plain.generate(
        samples, max_new_tokens=5, batch_size=3, temperature=1.0
    )
    _refusals(more.score)
    with pytest.raises(DataError, match="the prompt needs"):
        more.generate([PROMPT], max_new_tokens=2, batch_size=1)


def test_a_teacher_behind_a_server_answers_as_without_them(tiny, grown, rows):
    with StandIn(tiny.model("code")) as server:
        endpoint = {"url": server.url, "model": server.name}
        keys = {"backend": "openai", "tokenizer": grown, "endpoint": endpoint, "patience_s": 20}
        teacher = OpenAITeacher(_teacher("code", **keys), K)
        try:
            assert teacher.vocab_size == rows
            (signals,) = teacher.score([PLAIN])
            assert signals.ids.max() < rows
            _refusals(teacher.score)
        finally:
            teacher.close()


class _Engine:
    """What a vLLM engine was told."""

    def __init__(self) -> None:
        self.masked: list[int] = []

    def collective_rpc(self, name: str, args: tuple[int, ...]) -> None:
        assert name == "mask_padding"
        self.masked += args


def test_vllm_masks_padded_rows_alone(tiny, grown, rows, tmp_path, monkeypatch):
    """No mask where the tokenizer has more tokens; the mask as before where the model has more rows."""
    engine, told = _Engine(), []
    monkeypatch.setattr(backend, "_start", lambda teacher, arguments: told.append(arguments) or engine)
    for name in ("VLLM_LOGGING_LEVEL", "VLLM_CPU_OMP_THREADS_BIND", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "1")
    teacher = backend.VLLMTeacher(_teacher(grown, backend="vllm"), K)
    assert (teacher.vocab_size, engine.masked) == (rows, [])
    assert "worker_extension_cls" not in told[-1]
    _refusals(lambda samples: [teacher._render(sample) for sample in samples])
    padded = Path(shutil.copytree(tiny.model("code"), tmp_path / "padded"))
    model = AutoModelForCausalLM.from_pretrained(padded)
    model.resize_token_embeddings(rows + 64)
    model.save_pretrained(padded)
    assert backend.VLLMTeacher(_teacher(str(padded), backend="vllm"), K).vocab_size == rows
    assert engine.masked == [rows]
    assert told[-1]["worker_extension_cls"] == backend.MASK


def test_student_and_teacher_are_named_in_the_count_of_samples(tiny, grown):
    """Only the samples that need such a token are left out, whichever model it is."""
    other = _teacher(tiny.model("math"))
    for student, teacher in ((Student(model=grown), other), (Student(model=tiny.model("pivot")), _teacher(grown))):
        sizes = measure(student, [teacher], [PLAIN, PROMPT, RESPONSE])
        assert sizes[0].fault == ""
        assert IMAGE in sizes[1].fault
        assert WORD in sizes[2].fault


def test_a_parity_reference_reads_the_same_rows(grown, rows):
    reference = Reference(_teacher(grown), gpu=False)
    assert reference.vocabulary == rows
    assert reference.logps(PLAIN)[0].shape[1] == rows


def test_no_teacher_token_becomes_one_without_a_row(tiny, grown, rows):
    student = Vocabulary.of(Renderer.of(Model(model=grown)))
    every = Vocabulary.of(Renderer(load_tokenizer(Model(model=grown))))
    assert len(student.pieces) == rows
    assert WORD.encode() in every.ids
    assert WORD.encode() not in student.ids
    assert counterparts(every, student).max() < rows


def test_tokens_of_the_vocabulary_itself_must_have_rows(tiny):
    """The tokenizer of another, larger model: its learned pieces have no rows."""
    tokenizer = load_tokenizer(Model(model=tiny.model("code")))
    size = vocabulary_size(tokenizer)
    assert valid_vocabulary(tokenizer, None) == valid_vocabulary(tokenizer, size) == size
    assert valid_vocabulary(tokenizer, size + 64) == size
    with pytest.raises(ModelError, match=rf"{size} tokens .* only {size - 1}: they do not belong together \(1 tokens"):
        valid_vocabulary(tokenizer, size - 1)


def test_more_added_tokens_than_rows_is_another_model(tiny):
    tokenizer = load_tokenizer(Model(model=tiny.model("code")))
    size = vocabulary_size(tokenizer)
    tokenizer.add_tokens([f"word{i}x" for i in range(size // 2)])
    assert valid_vocabulary(tokenizer, size) == size
    tokenizer.add_tokens([f"other{i}x" for i in range(size)])
    with pytest.raises(ModelError, match="most of its tokens have no row"):
        valid_vocabulary(tokenizer, size)


def test_an_end_of_turn_without_a_row_is_refused(tiny, tmp_path):
    shutil.copytree(tiny.model("code"), tmp_path / "m")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "m")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|stop|>"]})
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>", "<|stop|>")
    tokenizer.save_pretrained(tmp_path / "m")
    with pytest.raises(ModelError, match=r"ends a turn with the token '<\|stop\|>' \(\d+\), for which"):
        Renderer.of(Model(model=str(tmp_path / "m")))


def test_rows_of_a_server_are_those_beside_its_tokenizer(tiny, rows, tmp_path):
    endpoint = {"url": "http://localhost:1", "model": "x"}
    teacher = _teacher("x", backend="openai", tokenizer=tiny.model("code"), endpoint=endpoint)
    assert token_rows(teacher) == rows
    AutoTokenizer.from_pretrained(tiny.model("code")).save_pretrained(tmp_path)
    assert token_rows(teacher.model_copy(update={"tokenizer": str(tmp_path)})) is None
