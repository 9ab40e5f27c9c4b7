"""The teachers over HTTP, for real: a teacher on Ray Serve, a server on loopback, clients that people use."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest
from ray import serve
from rich.console import Console
from safetensors.numpy import load

from rayfuse import cluster
from rayfuse.config import Data, Http, parse_config
from rayfuse.data.rows import read_samples, samples_of_row
from rayfuse.data.sample import Sample
from rayfuse.errors import ConfigError, RayfuseError
from rayfuse.signals.codec import unpack
from rayfuse.teachers.http.served import served
from rayfuse.teachers.identity import IdentifiedTeacher, fingerprint
from rayfuse.teachers.serving.client import TeacherClient
from rayfuse.teachers.transformers import TransformersTeacher

pytestmark = pytest.mark.ray

K = 5
TOKEN = "only-for-this-test-0123456789"
ROW = {"prompt": "What is 2 + 2?", "response": "It is 4 🙂"}
JOBS = Path(__file__).resolve().parents[2] / "jobs"


@pytest.fixture(scope="module")
def world(tiny, tmp_path_factory):
    """(teacher, fingerprint) of `math`, and the address of a server in front of it."""
    config = parse_config(tiny.tree(tmp_path_factory.mktemp("http")))
    cluster.connect(config)
    teacher = config.teachers[0]
    teachers = [IdentifiedTeacher(teacher, fingerprint(teacher, K))]
    http = Http(port=0, queue=2, max_samples=2, max_new_tokens=8, max_body_bytes=4096)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAYFUSE_HTTP_TOKEN", TOKEN)
        with served(teachers, K, http, Console(quiet=True)) as server:
            yield teachers[0], server.url
    serve.shutdown()
    cluster.end_embedded()


@pytest.fixture
def client(world):
    with httpx.Client(base_url=world[1], headers={"Authorization": f"Bearer {TOKEN}"}, timeout=300) as client:
        yield client


def test_scores_are_the_teachers_own_in_both_forms(world, client):
    teacher, _ = world
    expected = TransformersTeacher(teacher.teacher, K).score(samples_of_row(ROW))[0]
    body = {"teacher": "math", "samples": [ROW]}
    answer = client.post("/score", json=body)
    assert answer.status_code == 200, answer.text
    said = answer.json()
    assert (said["teacher"], said["fingerprint"], said["k"]) == ("math", teacher.fingerprint, K)
    (signals,) = said["signals"]
    np.testing.assert_array_equal(np.array(signals["logps"], np.float16), expected.logps)
    np.testing.assert_array_equal(signals["ids"], expected.ids)
    np.testing.assert_array_equal(np.array(signals["lse"], np.float32), expected.lse)
    assert signals["byte_ends"] == expected.byte_ends.tolist()

    raw = client.post("/score", json=body, headers={"Accept": "application/x-safetensors"})
    assert raw.headers["content-type"] == "application/x-safetensors"
    (packed,) = unpack(load(raw.content))
    for name in ("logps", "ids", "lse", "token_logps", "byte_ends"):
        assert getattr(packed, name).tobytes() == getattr(expected, name).tobytes()
    assert len(raw.content) < len(answer.content)


def test_openais_client_gets_the_teachers_answers(world):
    teacher, url = world
    asked = Sample((("user", "What is 2 + 2?"),), "")
    (expected,) = TransformersTeacher(teacher.teacher, K).generate([asked], max_new_tokens=6, batch_size=1)
    client = openai.OpenAI(base_url=f"{url}/v1", api_key=TOKEN, timeout=300)
    done = client.completions.create(model="math", prompt="What is 2 + 2?", max_tokens=6, temperature=0)
    assert done.choices[0].text == expected
    assert done.usage.total_tokens == done.usage.prompt_tokens + done.usage.completion_tokens
    chat = client.chat.completions.create(
        model="math", messages=[{"role": "user", "content": "What is 2 + 2?"}], max_tokens=6, temperature=0
    )
    assert chat.choices[0].message.content == expected
    assert [model.id for model in client.models.list()] == ["math"]


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("/score", {"teacher": "code", "samples": [ROW]}, 404, "no teacher 'code'; there are: math"),
        ("/score", {"teacher": "math", "samples": []}, 422, "samples: "),
        ("/score", {"teacher": "math", "samples": [{"prompt": "x"}]}, 422, r"samples[0]: a row needs"),
        ("/score", {"teacher": "math", "samples": [ROW] * 3}, 422, "has 3 samples (assistant turns), at most 2"),
        ("/score", {"teacher": "math", "samples": [ROW], "k": 3}, 422, "k: Extra inputs"),
        ("/score", {"teacher": "math", "samples": [{**ROW, "response": "7" * 900}]}, 422, "tokens under"),
        ("/score", {"teacher": "math", "samples": [{**ROW, "response": "7" * 5000}]}, 413, "larger than 4096 bytes"),
        ("/v1/completions", {"model": "math", "prompt": "x", "max_tokens": 9}, 422, "at most 8 are allowed"),
        ("/v1/completions", {"model": "math", "prompt": ["x"] * 3}, 422, "has 3 prompts, at most 2"),
        ("/v1/completions", {"model": "math", "prompt": "x", "stream": True}, 422, "stream: "),
        ("/v1/chat/completions", {"model": "math", "messages": []}, 422, "messages: "),
    ],
)
def test_a_wrong_request_is_told_what_is_wrong(client, path, body, status, message):
    answer = client.post(path, json=body)
    assert answer.status_code == status, answer.text
    assert message in answer.json()["error"]["message"]


def test_without_the_token_nothing_but_the_description_is_told(world):
    url = world[1]
    assert httpx.post(f"{url}/score", json={"teacher": "math", "samples": [ROW]}).status_code == 401
    assert httpx.get(f"{url}/v1/models", headers={"Authorization": "Bearer wrong"}).status_code == 401
    description = httpx.get(f"{url}/openapi.json").json()
    assert {"/score", "/v1/completions", "/v1/chat/completions"} <= set(description["paths"])
    page = httpx.get(f"{url}/docs").text
    assert "POST /score" in page
    assert "http" not in page.replace("http-equiv", ""), "the page must load nothing from elsewhere"


def test_a_flood_does_not_starve_a_run(tiny, world):
    """While many clients ask without pause, the run's units come back with the same bits; clients are told to wait."""
    teacher, url = world
    samples = read_samples(Data(path=str(tiny.root / "train.jsonl"), limit=4))[0]
    run = TeacherClient(teacher)
    alone = run.score(samples)()
    over = threading.Event()
    answers: list[tuple[int, str]] = []

    def ask():
        with httpx.Client(headers={"Authorization": f"Bearer {TOKEN}"}, timeout=300) as client:
            while not over.is_set():
                answer = client.post(f"{url}/score", json={"teacher": "math", "samples": [ROW]})
                answers.append((answer.status_code, answer.headers.get("retry-after", "")))

    flood = [threading.Thread(target=ask) for _ in range(8)]
    for thread in flood:
        thread.start()
    try:
        for _ in range(10):
            for mine, theirs in zip(run.score(samples)(), alone, strict=True):
                assert mine.logps.tobytes() == theirs.logps.tobytes()
    finally:
        over.set()
        for thread in flood:
            thread.join()
    assert {status for status, _ in answers} == {200, 429}
    assert all(int(after) >= 1 for status, after in answers if status == 429)


def test_the_example_client_runs(world):
    environment = {**os.environ, "RAYFUSE_HTTP_TOKEN": TOKEN}
    command = [sys.executable, str(JOBS / "score.py"), world[1], "math", ROW["prompt"], ROW["response"]]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    signals = httpx.post(
        f"{world[1]}/score",
        json={"teacher": "math", "samples": [ROW]},
        headers={"Authorization": f"Bearer {TOKEN}"},
        timeout=300,
    ).json()["signals"][0]
    assert [int(line.split()[0]) for line in done.stdout.splitlines()] == [ids[0] for ids in signals["ids"]]


def test_no_token_no_server_and_a_taken_port_says_so(world, monkeypatch):
    teacher, url = world
    monkeypatch.delenv("RAYFUSE_HTTP_TOKEN", raising=False)
    with pytest.raises(ConfigError, match="needs a token"), served([teacher], K, Http(), Console(quiet=True)):
        pass
    monkeypatch.setenv("RAYFUSE_HTTP_TOKEN", TOKEN)
    taken = Http(port=int(url.rpartition(":")[2]))
    with pytest.raises(RayfuseError, match="cannot listen on"), served([teacher], K, taken, Console(quiet=True)):
        pass
