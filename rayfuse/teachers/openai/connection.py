"""One HTTP server and everything that can go wrong on the way to it.

A request is sent again, with growing pauses, where trying later can help (429, 5xx, a lost or stalled connection),
until the teacher's patience ends. Everything else is an error at once, which says what to do. An answer is read up to a
limit that follows from what was asked; redirects are refused, because the key would go along; certificates are
verified.

The key is read when a request is sent, lives in that request's header only, and is cut out of whatever is quoted from
the server. Proxies come from the environment (HTTPS_PROXY, NO_PROXY).
"""

from __future__ import annotations

import asyncio
import email.utils
import json
import logging
import os
import random
import re
import ssl
import threading
import time
import urllib.request
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, NoReturn, TypeVar
from urllib.parse import urlsplit

import aiohttp

from rayfuse.config import Endpoint
from rayfuse.config.endpoint import is_loopback
from rayfuse.errors import TeacherError

log = logging.getLogger(__name__)
T = TypeVar("T")
AGAIN = frozenset({408, 425, 429, 500, 502, 503, 504, 529})
"""Statuses after which the same request may succeed later."""
FIRST_PAUSE_S = 0.5
CONNECT_S = 20.0
QUOTED = 300
"""Characters that are quoted of what a server sent."""


class HttpError(TeacherError):
    """The server answered with a status that is no success.

    Attributes:
        status: the status.
        said: what the server said, without the key.
    """

    def __init__(self, message: str, status: int = 0, said: str = "") -> None:
        super().__init__(message)
        self.status, self.said = status, said

    def __reduce__(self) -> tuple[type[TeacherError], tuple[str]]:
        """Elsewhere it is a plain TeacherError."""
        return TeacherError, (str(self),)


class Connection:
    """Requests to one server, at most `max_concurrency` at once, from any number of threads.

    An event loop in a thread of its own does the work; `close` ends it.
    """

    def __init__(self, endpoint: Endpoint, name: str, patience_s: float) -> None:
        """Args: the server, the teacher's name for messages, and for how long a request is tried again."""
        self.endpoint = endpoint
        self.name = name
        self.patience_s = patience_s
        self.ssl = _trust(endpoint, name)
        self.session: aiohttp.ClientSession | None = None
        self.slots = asyncio.Semaphore(endpoint.max_concurrency)
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, name=f"endpoint-{name}", daemon=True).start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Wait for a coroutine that runs in the connection's loop."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result()

    def close(self) -> None:
        """Close the connections and end the loop."""

        async def end() -> None:
            if self.session is not None:
                await self.session.close()

        self.run(end())
        self.loop.call_soon_threadsafe(self.loop.stop)

    async def ask(self, method: str, url: str, body: dict[str, Any] | None = None, *, limit: int) -> bytes:
        """The body of the server's answer, which is JSON by its content type.

        Args:
            method: GET or POST.
            url: where.
            body: what is sent, as JSON.
            limit: bytes that the answer may have.

        Raises:
            HttpError: a status that is no success, and that trying later does not change.
            TeacherError: no usable answer, or none within the patience.
        """
        begun = time.monotonic()
        attempt = 0
        while True:
            attempt += 1
            try:
                async with self.slots:
                    return await self._once(method, url, body, limit)
            except _LaterError as error:
                spent = time.monotonic() - begun
                pause = self._pause(attempt, error.retry_after)
                if spent + pause > self.patience_s:
                    self._fail(
                        f"{error}. Tried {attempt} time{'s' * (attempt > 1)} in {spent:.0f} s (patience_s: "
                        f"{self.patience_s:g}). Is the server up, and is endpoint.url right?"
                    )
                log.warning("teacher %s: %s: %s; again in %.1f s", self.name, self.endpoint.host, error, pause)
            await asyncio.sleep(pause)

    def _pause(self, attempt: int, retry_after: float | None) -> float:
        """Exponential with jitter; what the server asks for counts, up to `max_wait_s`."""
        pause = FIRST_PAUSE_S * 2 ** min(attempt - 1, 10) * random.uniform(0.5, 1.0)
        return min(max(pause, retry_after or 0.0), self.endpoint.max_wait_s)

    async def _once(self, method: str, url: str, body: dict[str, Any] | None, limit: int) -> bytes:
        if self.session is None:
            self.session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(ssl=self.ssl, limit=self.endpoint.max_concurrency),
                cookie_jar=aiohttp.DummyCookieJar(),
                timeout=aiohttp.ClientTimeout(total=self.endpoint.timeout_s, sock_connect=CONNECT_S),
            )
        key = read_key(self.endpoint, self.name)
        headers = {"Accept": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
        try:
            async with self.session.request(
                method, url, json=body, headers=headers, allow_redirects=False, proxy=_proxy(url)
            ) as response:
                content = await self._read(response, limit)
        except aiohttp.ConnectionTimeoutError:
            raise _LaterError(f"no connection within {CONNECT_S:g} s") from None
        except TimeoutError:
            raise _LaterError(f"no whole answer within {self.endpoint.timeout_s:g} s (endpoint.timeout_s)") from None
        except (aiohttp.ClientConnectorCertificateError, aiohttp.ClientConnectorSSLError) as error:
            self._fail(
                f"no trusted connection: {error}. The certificate must be valid for the host in endpoint.url; where a "
                "private authority signed it, set endpoint.ca_file to that authority's PEM file"
            )
        except aiohttp.ClientConnectorError as error:
            raise _LaterError(f"cannot connect: {error.strerror or error}") from None
        except aiohttp.InvalidURL:
            self._fail("endpoint.url is not a URL")
        except aiohttp.ClientHttpProxyError as error:
            self._fail(f"cannot be reached: the proxy of the environment answers {error.status}")
        except aiohttp.ClientResponseError as error:  # not HTTP, or headers out of bounds
            self._fail(f"does not speak HTTP: {self._clean(error.message, key)}. Is endpoint.url the API's address?")
        except (aiohttp.ClientError, ConnectionError) as error:
            raise _LaterError(f"the connection was lost ({type(error).__name__})") from None
        return self._judge(response, content, key, url)

    async def _read(self, response: aiohttp.ClientResponse, limit: int) -> bytes:
        """The body, which is never held beyond `limit` bytes; of an error, the beginning."""
        content = bytearray()
        async for chunk in response.content.iter_chunked(64 * 1024):
            content += chunk
            if response.status != 200 and len(content) > 64 * 1024:
                break
            if len(content) > limit:
                self._fail(
                    f"sends more than {limit:,} bytes, the most that an answer to this request can have; not read any "
                    "further. Is endpoint.url the address of the completion API?"
                )
        return bytes(content)

    def _judge(self, response: aiohttp.ClientResponse, content: bytes, key: str | None, url: str) -> bytes:
        """The content of a good answer; the right error for any other."""
        status, kind = response.status, response.content_type
        said = self._clean(_message(content, kind), key)
        if status in AGAIN:
            raise _LaterError(f"answers {status}{said and f' ({said})'}", _seconds(response.headers.get("Retry-After")))
        if 300 <= status < 400:
            target = urlsplit(response.headers.get("Location", "")).hostname or "another path"
            self._fail(
                f"answers with a redirect ({status}, to {target}), which is refused because the API key would go there "
                "too; set endpoint.url to the final address"
            )
        if status in (401, 403):
            source = self.endpoint.api_key_env or self.endpoint.api_key_file
            what = "refuses the API key" if source else "asks for an API key"
            where = f"does {source} hold the right one?" if source else "set endpoint.api_key_env or api_key_file"
            raise HttpError(self.say(f"{what} ({status}{said and f': {said}'}); {where}"), status, said)
        if status != 200:
            hint = ". Does endpoint.url end with the API's version (/v1)?" if status in (404, 405) else ""
            path = urlsplit(url).path
            raise HttpError(self.say(f"answers {status} to {path}{said and f': {said}'}{hint}"), status, said)
        if kind != "application/json":
            self._fail(
                f"answers with {kind}, not application/json: {said!r}. Does something else (a proxy, a log-in page) "
                "stand at endpoint.url?"
            )
        return content

    def say(self, text: str) -> str:
        """An error's text: which teacher, which server, what about it."""
        return f"teacher {self.name}: {self.endpoint.host} {text}"

    def _fail(self, text: str) -> NoReturn:
        raise TeacherError(self.say(text)) from None

    def _clean(self, text: str, key: str | None) -> str:
        """A quotation: without the key, on one line, of bounded length."""
        if key:
            text = text.replace(key, "[API key]")
        return re.sub(r"[\s\x00-\x1f\x7f]+", " ", text).strip()[:QUOTED]


class _LaterError(Exception):
    """The same request may succeed later, after `retry_after` seconds where the server said so."""

    def __init__(self, reason: str, retry_after: float | None = None) -> None:
        super().__init__(reason)
        self.retry_after = retry_after


def read_key(endpoint: Endpoint, name: str) -> str | None:
    """The API key, from where the configuration says; None where it names no place.

    Raises:
        TeacherError: there is none, or it cannot be a key. The message never holds it.
    """
    if endpoint.api_key_env is not None:
        source = f"the environment variable {endpoint.api_key_env} (endpoint.api_key_env)"
        key = os.environ.get(endpoint.api_key_env, "").strip()
        advice = "set it on every node that may ask this teacher, before Ray starts there"
    elif endpoint.api_key_file is not None:
        source = f"the file {endpoint.api_key_file} (endpoint.api_key_file)"
        advice = "mount it on every node that may ask this teacher"
        try:
            key = Path(endpoint.api_key_file).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not text"
            raise TeacherError(f"teacher {name}: cannot read {source}: {reason}; {advice}") from None
    else:
        return None
    if not key:
        raise TeacherError(f"teacher {name}: {source} is empty or not set; {advice}")
    if not re.fullmatch(r"[\x21-\x7e]+", key):
        raise TeacherError(f"teacher {name}: {source} holds white space or other characters that no API key has")
    return key


def _trust(endpoint: Endpoint, name: str) -> ssl.SSLContext | bool:
    """The certificates that count: the system's, or those of `ca_file`. They are always verified."""
    if endpoint.ca_file is None:
        return True
    try:
        return ssl.create_default_context(cafile=endpoint.ca_file)
    except (OSError, ssl.SSLError) as error:
        raise TeacherError(
            f"teacher {name}: {endpoint.ca_file} (endpoint.ca_file) is no readable PEM file: {error.strerror or error}"
        ) from None


def _proxy(url: str) -> str | None:
    """The environment's proxy for this URL; what stays on this machine never goes through one."""
    parts = urlsplit(url)
    if is_loopback(parts.hostname or "") or urllib.request.proxy_bypass(parts.netloc):
        return None
    return urllib.request.getproxies().get(parts.scheme)


def _seconds(retry_after: str | None) -> float | None:
    """Retry-After, which is seconds or a date."""
    if retry_after is None:
        return None
    if re.fullmatch(r"\d{1,9}", retry_after.strip()):
        return float(retry_after)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None


def _message(content: bytes, kind: str) -> str:
    """What an error's body says: the message of OpenAI's format, of FastAPI's, or the text."""
    text = content[: 16 * QUOTED].decode("utf-8", errors="replace")
    if kind != "application/json":
        return re.sub(r"<[^>]*>", " ", text)
    try:
        tree = json.loads(content)
    except (ValueError, RecursionError):
        return text
    error = tree.get("error", tree) if isinstance(tree, dict) else tree
    if isinstance(error, dict):
        error = error.get("message", error.get("detail", error))
    return error if isinstance(error, str) else json.dumps(error) if error else ""
