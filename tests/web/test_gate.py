"""The gate: who may ask, how much, and that a flood does not get between a run and its teachers."""

import asyncio
import json

import pytest

from rayfuse.config import Http
from rayfuse.errors import ConfigError
from rayfuse.web.gate import BusyError, Gate, Queue, read_token

TOKEN = "0123456789abcdef"


def test_the_token_comes_from_the_environment_or_a_file_and_is_never_shown(tmp_path):
    assert read_token(Http(), {"RAYFUSE_HTTP_TOKEN": f" {TOKEN}\n"}) == TOKEN.encode()
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    assert read_token(Http(token_file=str(tmp_path / "token")), {}) == TOKEN.encode()
    with pytest.raises(ConfigError, match=r"RAYFUSE_HTTP_TOKEN, which holds none.*openssl rand"):
        read_token(Http(), {})
    with pytest.raises(ConfigError, match="at least 16") as short:
        read_token(Http(token_env="OTHER"), {"OTHER": "secret"})
    assert "secret" not in str(short.value)
    with pytest.raises(ConfigError, match="cannot read serving"):
        read_token(Http(token_file=str(tmp_path / "none")), {})


async def _echo(scope, receive, send):
    message = await receive()
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": message["body"]})


def _through(pieces, headers, path="/score", most=100):
    """Status and body of a request whose body arrives in pieces."""
    sent, waiting = [], list(pieces)

    async def receive():
        piece = waiting.pop(0)
        return {"type": "http.request", "body": piece, "more_body": bool(waiting)}

    async def send(message):
        sent.append(message)

    gate = Gate(_echo, TOKEN.encode(), most)
    encoded = [(name.encode(), value.encode()) for name, value in headers.items()]
    asyncio.run(gate({"type": "http", "path": path, "headers": encoded}, receive, send))
    return sent[0]["status"], sent[1]["body"]


GOOD = {"authorization": f"Bearer {TOKEN}"}


def test_a_request_in_pieces_arrives_whole():
    assert _through([b"one ", b"two"], GOOD) == (200, b"one two")
    assert _through([b""], {}, path="/health") == (200, b"")


@pytest.mark.parametrize(
    ("pieces", "headers", "status"),
    [
        ([b"x"], {}, 401),
        ([b"x"], {"authorization": "Bearer 0123456789abcdeX"}, 401),
        ([b"x"], {"authorization": TOKEN}, 401),
        ([b"x"], {**GOOD, "content-length": "101"}, 413),
        ([b"x"], {**GOOD, "content-length": "many"}, 413),
        ([b"x" * 60, b"x" * 60], GOOD, 413),
    ],
)
def test_what_is_refused(pieces, headers, status):
    got, body = _through(pieces, headers)
    assert got == status
    assert json.loads(body)["error"]["message"]
    assert TOKEN not in body.decode()


def test_a_body_that_never_comes_is_given_up(monkeypatch):
    monkeypatch.setattr("rayfuse.web.gate.BODY_TIMEOUT_S", 0.05)
    sent = []

    async def never():
        await asyncio.sleep(60)

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "path": "/score", "headers": [(b"authorization", f"Bearer {TOKEN}".encode())]}
    asyncio.run(Gate(_echo, TOKEN.encode(), 100)(scope, never, send))
    assert sent[0]["status"] == 408


def test_a_full_queue_says_when_to_return():
    async def flood():
        queue, release = Queue(2, 3), asyncio.Event()

        async def one():
            async with queue.turn():
                await release.wait()

        tasks = [asyncio.create_task(one()) for _ in range(5)]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert (queue.inside, queue.waiting) == (2, 3)
        with pytest.raises(BusyError) as busy:
            await one()
        assert busy.value.retry_after_s == 2  # four at one second each, two at a time
        release.set()
        await asyncio.gather(*tasks)
        assert (queue.inside, queue.waiting) == (0, 0)
        await one()

    asyncio.run(flood())


def test_a_flood_delays_a_unit_of_the_run_by_no_more_than_what_may_be_in_flight():
    """A teacher that works first come first served, as a replica does: the run's units go to it directly."""

    async def world():
        queue, teacher, done = Queue(in_flight=2, length=8), asyncio.Lock(), []
        refused = 0

        async def work(name):
            async with teacher:  # asyncio's lock is fair: first come, first served
                for _ in range(3):
                    await asyncio.sleep(0)
                done.append(name)

        async def public():
            nonlocal refused
            while True:
                try:
                    async with queue.turn():
                        await work("public")
                except BusyError:
                    refused += 1
                await asyncio.sleep(0)

        flood = [asyncio.create_task(public()) for _ in range(50)]
        for _ in range(20):
            await asyncio.sleep(0)
        between = []
        for number in range(30):
            before = len(done)
            await work(f"unit {number}")
            between.append(len(done) - before - 1)
        for task in flood:
            task.cancel()
        return between, refused

    between, refused = asyncio.run(world())
    assert max(between) <= 2
    assert max(between) > 0, "the flood must have been there"
    assert refused > 100
