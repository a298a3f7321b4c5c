"""HTTP that engines and the trainer's spare weights listen with: who has not shown the token holds nothing for long."""

import contextlib
import hmac
import socket
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

PATIENCE = 30.0
"""Seconds that a connection may last without the token, however busy it looks."""


class Listener(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 1024
    """All ranks or engines of a run may connect at once; the default of 5 resets the sixth."""


class Caller(BaseHTTPRequestHandler):
    """One connection; a subclass answers its calls."""

    protocol_version = "HTTP/1.1"
    _ends: threading.Timer

    def setup(self) -> None:
        super().setup()
        self._ends = threading.Timer(PATIENCE, _hang_up, [self.connection])
        self._ends.daemon = True
        self._ends.start()

    def finish(self) -> None:
        self._ends.cancel()
        super().finish()

    def knows(self, token: str) -> bool:
        """Whether the call carries the token, in constant time; its connection then lasts."""
        given = self.headers.get("Authorization", "").encode()
        known = hmac.compare_digest(given, f"Bearer {token}".encode())
        if known:
            self._ends.cancel()
        return known

    def do_GET(self) -> None:
        self.get()

    def do_POST(self) -> None:
        self.post()

    def get(self) -> None:
        self.send_error(HTTPStatus.NOT_IMPLEMENTED)

    def post(self) -> None:
        self.send_error(HTTPStatus.NOT_IMPLEMENTED)

    def log_message(self, format: str, *args: Any) -> None:
        """Calls come by the hundred: none is worth a line."""


def _hang_up(held: socket.socket) -> None:
    # It may just have ended by itself.
    with contextlib.suppress(OSError):
        held.shutdown(socket.SHUT_RDWR)
