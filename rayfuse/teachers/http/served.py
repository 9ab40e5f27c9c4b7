"""The HTTP server, in a thread of the process that started it, and the command that does nothing else."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from rich.console import Console

from rayfuse import cluster
from rayfuse.config import Config, Http
from rayfuse.config.endpoint import is_loopback
from rayfuse.errors import ConfigError
from rayfuse.signals.store import SignalStore
from rayfuse.teachers.http.routes import Front, build_app
from rayfuse.teachers.identity import IdentifiedTeacher, identify, live
from rayfuse.teachers.parity.check import check_parity
from rayfuse.teachers.serving import applications
from rayfuse.teachers.serving.client import TeacherClient
from rayfuse.web.gate import Gate, read_token
from rayfuse.web.server import HttpServer


@contextmanager
def served(
    teachers: Sequence[IdentifiedTeacher], k: int, http: Http | None, console: Console
) -> Iterator[HttpServer | None]:
    """People may ask the live teachers over HTTP while the block runs; nothing happens where `http` is None.

    Raises:
        ConfigError: there is no token, or the certificate cannot be used.
        RayfuseError: the port is taken.
    """
    if http is None or not teachers:
        yield None
        return
    token = read_token(http)
    with applications.borrowed(teachers, k, "http"):
        app = build_app(Front(teachers, http, TeacherClient))
        server = HttpServer(http, Gate(app, token, http.max_body_bytes))
        console.print(f"teachers answer at {server.url} (description: {server.url}/docs)", highlight=False)
        if not is_loopback(http.host) and http.certificate is None:
            console.print("[yellow]remark[/] serving.http has no certificate: token and texts travel unencrypted")
        try:
            yield server
        finally:
            server.stop()


@cluster.session()
def serve_teachers(config: Config, console: Console) -> None:
    """`rayfuse serve-teachers`: test the teachers, then serve them until this process is told to end."""
    config = config.absolute()
    http = config.serving.http or Http()
    read_token(http)  # before anything is loaded
    if not config.teachers:
        raise ConfigError("teachers is empty; there is nothing to serve")
    cluster.connect(config)
    k = config.signals.k
    teachers = identify(config.teachers, k)
    asked = live(teachers)
    ended = threading.Event()
    with ExitStack() as stack:
        for number in (signal.SIGINT, signal.SIGTERM):
            before = signal.signal(number, lambda *_: ended.set())
            stack.callback(signal.signal, number, before)
        check_parity(asked, k, SignalStore(config.store_url), console, [config.student, *config.teachers])
        with served(asked, k, http, console):
            ended.wait()
