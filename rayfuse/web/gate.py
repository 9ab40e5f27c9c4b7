"""The gate before the teachers: who may ask, how much at once, and how many at a time.

A run's units go straight to the teachers; public requests come through here. At most `in_flight` of them are inside a
teacher, so a unit of the run never waits for more than these; `queue` more may wait; the rest are told when to return.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import math
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, MutableMapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from rayfuse.config import Http
from rayfuse.errors import ConfigError

TOKEN_LENGTH = 16
"""Shortest token that is accepted, in characters."""
BODY_TIMEOUT_S = 30.0
"""How long a client may take to send the next piece of its request."""
OPEN = ("/health", "/docs", "/openapi.json")
"""Paths that need no token: they tell nothing about a run."""
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class BusyError(Exception):
    """The public queue of a teacher is full.

    Attributes:
        retry_after_s: whole seconds after which it is worth asking again.
    """

    def __init__(self, retry_after_s: int) -> None:
        super().__init__(f"the queue is full; ask again in {retry_after_s} s")
        self.retry_after_s = retry_after_s


class Queue:
    """The public queue of one teacher, in one event loop.

    Attributes:
        waiting, inside: requests that wait, and that the teacher has.
        seconds: how long a request takes, on a moving average.
    """

    def __init__(self, in_flight: int, length: int) -> None:
        self.in_flight = in_flight
        self.length = length
        self.waiting = 0
        self.inside = 0
        self.seconds = 1.0
        self._slots = asyncio.Semaphore(in_flight)

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Wait for a turn, first come first served.

        Raises:
            BusyError: too many wait already.
        """
        if self.inside >= self.in_flight and self.waiting >= self.length:
            raise BusyError(max(1, math.ceil(self.seconds * (self.waiting + 1) / self.in_flight)))
        self.waiting += 1
        try:
            await self._slots.acquire()
        finally:
            self.waiting -= 1
        self.inside += 1
        begun = time.monotonic()
        try:
            yield
        finally:
            self.seconds += 0.2 * (time.monotonic() - begun - self.seconds)
            self.inside -= 1
            self._slots.release()


def read_token(http: Http, environment: Mapping[str, str] = os.environ) -> bytes:
    """The token that clients must send.

    Raises:
        ConfigError: there is none, or it is too short; its value is never shown.
    """
    if http.token_file is not None:
        try:
            token = Path(http.token_file).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read serving.http.token_file {http.token_file}: {error}") from error
        place = f"the file {http.token_file}"
    else:
        token = environment.get(http.token_env, "").strip()
        place = f"the environment variable {http.token_env}"
    if len(token) < TOKEN_LENGTH or not token.isascii():
        raise ConfigError(
            f"serving over HTTP needs a token of at least {TOKEN_LENGTH} ASCII characters in {place}, which "
            f"{'holds none' if not token else 'is no such token'}; make one with: openssl rand -hex 32"
        )
    return token.encode()


class Gate:
    """ASGI middleware: no token, no answer; and no request larger or slower than is sensible."""

    def __init__(self, app: Callable[..., Awaitable[None]], token: bytes, max_body_bytes: int) -> None:
        self.app = app
        self.expected = b"Bearer " + token
        self.max_body_bytes = max_body_bytes

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it here."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":  # no websockets here
            return
        headers = dict(scope["headers"])
        if scope["path"] not in OPEN and not hmac.compare_digest(headers.get(b"authorization", b""), self.expected):
            advice = "a valid token is needed: send the header Authorization: Bearer TOKEN"
            await refuse(send, 401, advice, {"www-authenticate": "Bearer"})
            return
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > self.max_body_bytes:
            await self._too_large(send)
            return
        body = b""
        more = True
        while more:
            try:
                message = await asyncio.wait_for(receive(), BODY_TIMEOUT_S)
            except TimeoutError:
                await refuse(send, 408, f"the request's body did not arrive within {BODY_TIMEOUT_S:.0f} s")
                return
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > self.max_body_bytes:
                await self._too_large(send)
                return
        await self.app(scope, _replay(body, receive), send)

    async def _too_large(self, send: Send) -> None:
        await refuse(send, 413, f"the request is larger than {self.max_body_bytes} bytes", {"connection": "close"})


def _replay(body: bytes, receive: Receive) -> Receive:
    """A receive function that gives the body that was read already, and then what still comes."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if not given:
            given = True
            return {"type": "http.request", "body": body, "more_body": False}
        return await receive()

    return replay


def fault(message: str, kind: str) -> dict[str, Any]:
    """The body of every error, in the shape that OpenAI's clients read."""
    return {"error": {"message": message, "type": kind}}


async def refuse(send: Send, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
    """Answer with an error, without the application."""
    body = json.dumps(fault(message, "request_refused")).encode()
    lines = {"content-type": "application/json", "content-length": str(len(body)), **(headers or {})}
    encoded = [(name.encode(), value.encode()) for name, value in lines.items()]
    await send({"type": "http.response.start", "status": status, "headers": encoded})
    await send({"type": "http.response.body", "body": body})
