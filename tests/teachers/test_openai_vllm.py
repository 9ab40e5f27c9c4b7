"""A teacher behind a real vLLM server: the signals of the same weights in transformers, to a stated tolerance."""

import numpy as np
import pytest

from rayfuse.config import Teacher
from rayfuse.data.sample import Sample
from rayfuse.errors import TeacherError
from rayfuse.teachers.identity import fingerprint
from rayfuse.teachers.openai.backend import OpenAITeacher
from rayfuse.teachers.openai.probe import served
from rayfuse.teachers.transformers import TransformersTeacher

K = 10
TOLERANCE = 2e-3
"""Nats, of float32 weights: two implementations, other orders of additions. Besides it, the rounding to float16."""
SAMPLES = [
    Sample((("user", "What is 12345 + 67?"),), "12345 + 67 = 12412."),
    Sample((("user", "Say hello in Chinese."),), "你好，世界！ 🙂"),
    Sample((("system", "You write code."), ("user", "A function that adds.")), "def add(a, b):\n    return a + b\n"),
    Sample((("user", "Tell me about the sea. " * 12),), "The sea is salty, and it is deep. Naïve sailors drown."),
]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]


def described(server, tokenizer, **changes):
    endpoint = {"url": server.url, "model": server.model, "api_key_env": "RAYFUSE_VLLM_KEY", **changes}
    return Teacher.model_validate(
        {"model": "smollm2", "name": "remote", "backend": "openai", "tokenizer": str(tokenizer), "endpoint": endpoint}
        | {"patience_s": 300}
    )


@pytest.fixture
def description(vllm_server, smollm2_folder, monkeypatch):
    monkeypatch.setenv("RAYFUSE_VLLM_KEY", vllm_server.api_key)
    return described(vllm_server, smollm2_folder)


@pytest.fixture
def here(smollm2_folder):
    return TransformersTeacher(Teacher(model=str(smollm2_folder), name="here", dtype="float32", cpus=1), K)


def test_signals_and_answers_are_those_of_transformers(description, here, vllm_server):
    teacher = OpenAITeacher(description, K)
    assert teacher.dialect == "prompt_logprobs"
    assert teacher.context == vllm_server.max_model_len - 1
    ties = 0
    for mine, theirs in zip(teacher.score(SAMPLES), here.score(SAMPLES), strict=True):
        np.testing.assert_allclose(mine.token_logps, theirs.token_logps, atol=TOLERANCE)
        half = np.spacing(np.abs(theirs.logps)).astype(np.float32)
        assert (np.abs(mine.logps.astype(np.float32) - theirs.logps) <= TOLERANCE + half).all()
        np.testing.assert_array_equal(mine.byte_ends, theirs.byte_ends)
        first, second = theirs.logps[:, 0].astype(np.float32), theirs.logps[:, 1].astype(np.float32)
        tie = first - second <= 2 * TOLERANCE + half[:, 0]
        ties += int(tie.sum())
        np.testing.assert_array_equal(mine.ids[~tie, 0], theirs.ids[~tie, 0])
    assert ties <= 3
    ask = {"max_new_tokens": 16, "batch_size": 4}
    assert teacher.generate(SAMPLES[:3], **ask) == here.generate(SAMPLES[:3], **ask)
    sampled = teacher.generate(SAMPLES[:2], **ask, temperature=0.8, seed=3)
    assert sampled != teacher.generate(SAMPLES[:2], **ask, temperature=0.8, seed=4)
    teacher.close()


def test_the_whole_context_can_be_scored(description, here, vllm_server):
    """A prompt cut to the server's context: one token more and the server would refuse it."""
    teacher = OpenAITeacher(description, K)
    long = Sample((("user", "one two three four " * 600),), "five six")
    item = teacher.renderer.render(long, teacher.context)
    assert item.cut
    assert item.length == vllm_server.max_model_len - 1
    (signals,) = teacher.score([long])
    assert len(signals) == len(item.response_ids)
    teacher.close()


def test_echo_gives_the_same_as_prompt_logprobs(description):
    """vLLM speaks both dialects."""
    teacher = OpenAITeacher(description, K)
    first = teacher.score(SAMPLES[:2])
    teacher.dialect = "echo"
    for mine, theirs in zip(teacher.score(SAMPLES[:2]), first, strict=True):
        np.testing.assert_allclose(mine.token_logps, theirs.token_logps, atol=TOLERANCE)
        np.testing.assert_allclose(mine.logps, theirs.logps, atol=TOLERANCE + 8e-3)
    teacher.close()


def test_what_the_probe_says_of_it(description, vllm_server, smollm2_folder, tiny, monkeypatch):
    limit = vllm_server.max_logprobs
    with pytest.raises(TeacherError, match=f"greater than max allowed: {limit}.*--max-logprobs {limit + 1}"):
        OpenAITeacher(description, limit + 1)
    with pytest.raises(TeacherError, match=r"does not serve 'other' \(it serves: smollm2\)"):
        OpenAITeacher(described(vllm_server, smollm2_folder, model="other"), K)
    with pytest.raises(TeacherError, match="has another tokenizer than"):
        OpenAITeacher(described(vllm_server, tiny.model("code")), K)
    monkeypatch.setenv("RAYFUSE_VLLM_KEY", "wrong")
    with pytest.raises(TeacherError, match=r"refuses the API key \(401"):
        OpenAITeacher(description, K)


def test_fingerprint_is_the_same_at_another_time(description, smollm2_folder):
    assert served(description).root == str(smollm2_folder)
    assert fingerprint(description, K) == fingerprint(description, K) != fingerprint(description, K + 1)
