"""The HTTP server, in a thread of the process that started it, and the command that does nothing else."""

from __future__ import annotations

import ipaddress
import signal
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import uvicorn
from rich.console import Console

from rayfuse import resources
from rayfuse.config import Config, Http, Teacher
from rayfuse.errors import ConfigError, RayfuseError
from rayfuse.http.app import Front, build_app
from rayfuse.http.gate import Gate, read_token
from rayfuse.models import fingerprint
from rayfuse.store import SignalStore
from rayfuse.teachers import deployment
from rayfuse.teachers.parity import check_parity

MOST_CONNECTIONS = 256
"""More at a time are answered 503 at once."""
STOP_S = 10.0
"""Seconds that requests have to end when the server stops."""


class HttpServer:
    """Serves an application until `stop`.

    Attributes:
        url: where.
    """

    def __init__(self, http: Http, app: Any) -> None:
        family = socket.AF_INET6 if ":" in http.host else socket.AF_INET
        self.socket = socket.socket(family, socket.SOCK_STREAM)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            self.socket.bind((http.host, http.port))
        except OSError as error:
            self.socket.close()
            raise RayfuseError(
                f"cannot listen on {http.host}:{http.port}: {error}; set another serving.http.port (0: any)"
            ) from error
        scheme = "https" if http.certificate else "http"
        host = f"[{http.host}]" if family == socket.AF_INET6 else http.host
        self.url = f"{scheme}://{host}:{self.socket.getsockname()[1]}"
        settings = uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            server_header=False,
            limit_concurrency=MOST_CONNECTIONS,
            timeout_graceful_shutdown=int(STOP_S),
            ssl_certfile=http.certificate,
            ssl_keyfile=http.certificate_key,
        )
        try:
            settings.load()
        except OSError as error:  # the certificate
            self.socket.close()
            raise ConfigError(f"serving.http: cannot use the certificate {http.certificate}: {error}") from error
        self.server = uvicorn.Server(settings)
        self.thread = threading.Thread(target=self.server.run, args=([self.socket],), daemon=True, name="http")
        self.thread.start()
        while not self.server.started and self.thread.is_alive():
            time.sleep(0.01)

    def stop(self) -> None:
        """Stop listening, give running requests a few seconds, and end."""
        self.server.should_exit = True
        self.thread.join(STOP_S + 5)
        self.socket.close()


@contextmanager
def served(
    teachers: Sequence[tuple[Teacher, str]], k: int, http: Http | None, console: Console
) -> Iterator[HttpServer | None]:
    """People may ask the teachers over HTTP while the block runs; nothing happens where `http` is None.

    Raises:
        ConfigError: there is no token, or the certificate cannot be used.
        RayfuseError: the port is taken.
    """
    teachers = deployment.live(teachers)
    if http is None or not teachers:
        yield None
        return
    token = read_token(http)
    with deployment.borrowed(teachers, k, "http"):
        app = build_app(Front(teachers, http, deployment.TeacherClient))
        server = HttpServer(http, Gate(app, token, http.max_body_bytes))
        console.print(f"teachers answer at {server.url} (description: {server.url}/docs)", highlight=False)
        if not _is_loopback(http.host) and http.certificate is None:
            console.print("[yellow]remark[/] serving.http has no certificate: token and texts travel unencrypted")
        try:
            yield server
        finally:
            server.stop()


def serve_teachers(config: Config, console: Console) -> None:
    """`rayfuse serve-teachers`: test the teachers, then serve them until this process is told to end."""
    config = config.absolute()
    http = config.serving.http or Http()
    read_token(http)  # before anything is loaded
    if not config.teachers:
        raise ConfigError("teachers is empty; there is nothing to serve")
    resources.connect(config)
    k = config.signals.k
    teachers = [(teacher, fingerprint(teacher, k)) for teacher in config.teachers]
    ended = threading.Event()
    with ExitStack() as stack:
        for number in (signal.SIGINT, signal.SIGTERM):
            before = signal.signal(number, lambda *_: ended.set())
            stack.callback(signal.signal, number, before)
        check_parity(teachers, k, SignalStore(config.store_url), console, [config.student])
        with served(teachers, k, http, console):
            ended.wait()


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
