"""A teacher behind an honest server: the same signals as the same model has here."""

import email.utils
import json
import time

import numpy as np
import pytest

from rayfuse.config import Data, Teacher
from rayfuse.data.rows import read_samples
from rayfuse.data.sample import Sample
from rayfuse.errors import DataError, TeacherError
from rayfuse.teachers.identity import fingerprint
from rayfuse.teachers.openai.backend import OpenAITeacher
from rayfuse.teachers.openai.connection import _seconds
from rayfuse.teachers.transformers import TransformersTeacher
from tests.teachers.stand_in import StandIn

K = 5


def remote(tiny, server, **changes):
    """The tiny world's `code` teacher behind `server`; `changes` go into its endpoint section."""
    endpoint = {"url": server.url, "model": server.name, **changes}
    return Teacher.model_validate(
        {"model": "code", "name": "code", "backend": "openai", "tokenizer": tiny.model("code"), "endpoint": endpoint}
        | {"patience_s": 20}
    )


@pytest.fixture(scope="module")
def server(tiny):
    with StandIn(tiny.model("code")) as server:
        yield server


@pytest.fixture(scope="module")
def samples(tiny):
    return read_samples(Data(path=str(tiny.root / "train.jsonl"), limit=12))[0]


@pytest.fixture(scope="module")
def here(tiny):
    return TransformersTeacher(Teacher(model=tiny.model("code"), name="code", dtype="float32"), K)


@pytest.fixture
def make(tiny, server):
    made = []

    def teacher(**changes):
        made.append(OpenAITeacher(remote(tiny, server, **changes), K))
        return made[-1]

    yield teacher
    for one in made:
        one.close()


def same(mine, theirs):
    """Equal but for the order of additions in two forward passes, and float16."""
    np.testing.assert_array_equal(mine.ids, theirs.ids)
    np.testing.assert_allclose(mine.logps, theirs.logps, atol=5e-3)
    np.testing.assert_allclose(mine.token_logps, theirs.token_logps, atol=1e-5)
    np.testing.assert_array_equal(mine.byte_ends, theirs.byte_ends)
    assert np.isnan(mine.lse).all()


@pytest.mark.parametrize("dialect", ["prompt_logprobs", "echo"])
def test_signals_are_those_of_the_model_itself(server, make, here, samples, dialect, monkeypatch):
    monkeypatch.setattr(server, "dialects", {dialect, "token_ids"})
    teacher = make()
    assert teacher.dialect == dialect
    for mine, theirs in zip(teacher.score(samples), here.score(samples), strict=True):
        same(mine, theirs)


def test_answers_are_those_of_the_model_itself(server, make, here, samples, monkeypatch):
    """Greedy, by token ids; and by the text, where a server gives no ids."""
    ask = {"max_new_tokens": 12, "batch_size": 3}
    expected = here.generate(samples, **ask)
    assert make().generate(samples, **ask) == expected
    monkeypatch.setattr(server, "dialects", {"prompt_logprobs"})
    assert make().generate(samples, **ask) == expected


def test_sampling_is_asked_for_completely(server, make, samples):
    """No setting is left to the server's own generation config; a prompt's seed is its own, and below 2^31."""
    teacher = make()
    server.requests.clear()
    teacher.generate(samples[:3], max_new_tokens=4, batch_size=2, temperature=0.8, seed=5)
    bodies = [body for path, _, body in server.requests if path == "/v1/completions"]
    assert len({body["seed"] for body in bodies}) == 3
    for body in bodies:
        assert 0 <= body["seed"] < 2**31
        settings = {key: body[key] for key in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")}
        assert settings == {"temperature": 0.8, "top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
        assert body["stop_token_ids"] == [teacher.renderer.end_of_turn]


def test_requests_in_flight_are_bounded(server, make, samples, monkeypatch):
    teacher = make(max_concurrency=3)
    monkeypatch.setattr(server.in_flight, "pause_s", 0.02)
    server.in_flight.most = 0
    teacher.score(samples)
    assert server.in_flight.most == 3


def test_a_text_fills_the_context_and_no_more(server, make, here, monkeypatch):
    """The prompt is cut so that one token can be generated; a response that does not fit is refused by name."""
    monkeypatch.setattr(server, "context", 60)
    teacher = make()
    long = Sample((("user", "one two three " * 40),), "four five")
    (signals,) = teacher.score([long])
    assert len(server.requests[-1][2]["prompt"]) == 59
    here_too = TransformersTeacher(here.teacher, K)
    here_too.context = 59
    same(signals, here_too.score([long])[0])
    with pytest.raises(DataError, match="more than max_length 59"):
        teacher.score([Sample((("user", "one"),), "four five " * 60)])


# --- the key ------------------------------


def test_the_key_comes_from_the_environment_or_a_file(tiny, tmp_path, monkeypatch, samples):
    monkeypatch.setenv("RAYFUSE_TEST_KEY", "sk-from-environment")
    file = tmp_path / "key"
    with StandIn(tiny.model("code"), key="sk-from-environment") as server:
        teacher = OpenAITeacher(remote(tiny, server, api_key_env="RAYFUSE_TEST_KEY"), K)
        assert len(teacher.score(samples)) == len(samples)
        teacher.close()
        file.write_text("sk-from-environment\n")
        teacher = OpenAITeacher(remote(tiny, server, api_key_file=str(file)), K)
        server.key = "sk-rotated"
        file.write_text("sk-rotated")  # a mounted secret changes under a running teacher
        assert len(teacher.score(samples)) == len(samples)
        teacher.close()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, r"cannot read the file .*/key \(endpoint.api_key_file\): No such file or directory; mount it"),
        ("\n", "is empty or not set"),
        ("two words", "holds white space or other characters"),
        ("sk-\u00e9", "holds white space or other characters"),
    ],
)
def test_a_key_that_is_none_is_refused_without_showing_it(tiny, server, tmp_path, content, said):
    if content is not None:
        (tmp_path / "key").write_text(content)
    with pytest.raises(TeacherError, match=said) as caught:
        OpenAITeacher(remote(tiny, server, api_key_file=str(tmp_path / "key")), K)
    assert not content or not content.strip() or content.strip() not in str(caught.value)


def test_a_variable_that_is_not_set_is_named(tiny, server, monkeypatch):
    monkeypatch.delenv("RAYFUSE_NO_KEY", raising=False)
    with pytest.raises(TeacherError, match=r"RAYFUSE_NO_KEY .* is empty or not set; set it on every node"):
        OpenAITeacher(remote(tiny, server, api_key_env="RAYFUSE_NO_KEY"), K)


# --- the way ------------------------------


def test_a_certificate_of_the_given_authority_is_trusted(tiny, certificate, samples):
    with StandIn(tiny.model("code"), certificate=certificate) as server:
        teacher = OpenAITeacher(remote(tiny, server, ca_file=certificate[0]), K)
        assert len(teacher.score(samples)) == len(samples)
        teacher.close()


def test_a_proxy_of_the_environment_is_not_asked_for_this_machine(server, make, samples, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    assert len(make().score(samples[:2])) == 2


def test_a_proxy_of_the_environment_is_asked_for_other_hosts(tiny, server, monkeypatch):
    """The request for another host arrives at the proxy: here the stand-in itself, which answers 404 to a whole URL."""
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.delenv("no_proxy", raising=False)
    far = {"url": "http://teacher.invalid/v1", "insecure": "teacher.invalid"}
    with pytest.raises(TeacherError, match=r"teacher.invalid answers 404 to /v1/models"):
        OpenAITeacher(remote(tiny, server, **far), K)
    assert server.requests[-1][0] == "http://teacher.invalid/v1/models"


def test_a_busy_server_is_asked_again(server, make, samples, here, monkeypatch):
    """429, 503, a lost connection and half an answer, then the truth: the signals are whole, every pause was made."""
    teacher = make()
    turns = iter(["429", "503", "lost", "half"])

    def busy(handler, body):
        turn = next(turns, None)
        if turn == "429":
            handler.send_json({"error": {"message": "slow down"}}, 429, Retry_After="1")
        elif turn == "503":
            handler.send_json({"error": {"message": "loading"}}, 503)
        elif turn == "lost":
            handler.close_connection = True
        else:
            content = json.dumps(server.honest(handler.path, body)[1]).encode()
            handler.send_response(200)
            handler.send_header("Content-Type", "application/json")
            handler.send_header("Content-Length", str(len(content)))
            handler.end_headers()
            handler.wfile.write(content[: len(content) // 2] if turn == "half" else content)
            handler.close_connection = turn == "half"

    paused = []
    pause = teacher.connection._pause
    monkeypatch.setattr(teacher.connection, "_pause", lambda *a: paused.append(pause(*a)) or min(paused[-1], 0.01))
    monkeypatch.setitem(server.faults, "/v1/completions", busy)
    (signals,) = teacher.score(samples[:1])
    same(signals, here.score(samples[:1])[0])
    assert len(paused) == 4
    assert paused[0] == 1.0
    assert all(0.25 <= after <= 0.5 * 2**n for n, after in enumerate(paused[1:], 1))


def test_what_retry_after_asks_for_is_bounded(make):
    connection = make(max_wait_s=3.0).connection
    assert connection._pause(1, 2.0) == 2.0
    assert connection._pause(1, 3600.0) == 3.0
    assert connection._pause(40, None) == 3.0
    soon = email.utils.formatdate(time.time() + 100, usegmt=True)
    assert 90 < _seconds(soon) <= 100
    assert _seconds("Wed, 21 Oct 2015 07:28:00 GMT") == 0.0
    assert _seconds("soon") is None
    assert _seconds("-5") is None


# --- fingerprint ------------------------------


def test_fingerprint_is_of_what_answers_depend_on(tiny, server, monkeypatch):
    base = remote(tiny, server)
    same_answers = [
        base,
        base.model_copy(update={"name": "other", "dtype": "float16", "patience_s": 5.0, "cpus": 2.0}),
        remote(tiny, server, timeout_s=5.0, max_concurrency=2, max_wait_s=1.0, context=256),
    ]
    assert len({fingerprint(teacher, K) for teacher in same_answers}) == 1
    monkeypatch.setenv("RAYFUSE_TEST_KEY", "sk-1")
    assert fingerprint(remote(tiny, server, api_key_env="RAYFUSE_TEST_KEY"), K) == fingerprint(base, K)
    others = [
        fingerprint(base, K),
        fingerprint(base, K + 1),
        fingerprint(base.model_copy(update={"revision": "second"}), K),
        fingerprint(base.model_copy(update={"tokenizer": tiny.model("math")}), K),
        fingerprint(remote(tiny, server, context=100), K),
    ]
    monkeypatch.setattr(server, "root", "/weights/code-v2")
    others.append(fingerprint(base, K))
    assert len(set(others)) == 6
