"""An HTTP server in a thread of its own."""

from __future__ import annotations

import socket
import threading
import time
from typing import Any

import uvicorn

from rayfuse.config import Http
from rayfuse.errors import ConfigError, RayfuseError

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
