"""One question to a chat endpoint that speaks OpenAI's protocol, one answer back. Standard library alone: no proxy and
no redirect is followed, so a token goes to the host that the configuration names and to no other.
"""

import contextlib
import ipaddress
import json
import os
import socket
import threading
import time
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from typing import Any
from urllib.parse import urlsplit

from rlpt_data.strict import UserError

_MOST_BYTES = 1 << 20
_PATIENCE = 10
"""An answer as a whole may take this many timeouts: one that comes in drops is none."""
_FIRST_WAIT, _LONGEST_WAIT = 0.5, 8.0
"""Seconds between two attempts: doubled each time, up to the second."""


class UnansweredError(Exception):
    """No answer came, however often it was asked: why, in a few words."""


def check_address(address: str) -> str:
    """The address without a slash at its end. Raises ValueError where it is none, or holds a secret."""
    # First, and without looking into it: the line below repeats the address.
    if any(mark in address for mark in "@?#"):
        raise ValueError(
            "address: a name, a password or a query would be written to config.json; put the token in the "
            "environment"
        )
    try:
        parts = urlsplit(address)
        # A port that is no number raises here; so does a host that no name server can be asked for.
        known = parts.port != 0 and parts.hostname and parts.hostname.encode("idna")
    except ValueError:
        known = False
    if not known or not address.lower().startswith(("http://", "https://")):
        raise ValueError(f"address = {address!r}: give one such as http://127.0.0.1:8000/v1")
    return address.rstrip("/")


def token_of(variable: str, address: str, over_http: bool) -> str | None:
    """The token in an environment variable; None where it is not set. Raises UserError where it may not be sent."""
    token = os.environ.get(variable)
    if not token:
        return None
    if not token.isascii() or not token.isprintable() or " " in token:
        raise UserError(
            f"environment variable {variable}: holds spaces or line breaks; set it to the token alone"
        )
    if in_the_clear(address) and not over_http:
        raise UserError(
            f"address = {address}: the token in {variable} would cross the network in the clear; use https, unset "
            "the variable, or set token_over_http = true"
        )
    return token


def in_the_clear(address: str) -> bool:
    """Whether questions and answers cross a network where whoever carries them can read and change them."""
    parts = urlsplit(address)
    return parts.scheme == "http" and not _is_loopback(parts.hostname or "")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@dataclass(frozen=True)
class Endpoint:
    """Where questions go, and how long an answer may take."""

    address: str
    model: str
    token: str | None = field(repr=False)
    timeout: float
    """Seconds without a byte."""
    attempts: int
    max_tokens: int
    """Of an answer."""

    def answer(self, question: str) -> str:
        """The text of the answer, "" where it has none. Raises UnansweredError after the last attempt."""
        body = json.dumps(
            {
                "model": self.model,
                "messages": [{"role": "user", "content": question}],
                "temperature": 0,
                "max_tokens": self.max_tokens,
            }
        )
        wait, cause = _FIRST_WAIT, ""
        for attempt in range(self.attempts):
            if attempt:
                time.sleep(wait)
                wait = min(2 * wait, _LONGEST_WAIT)
            try:
                status, data = self._post(body.encode())
            except (OSError, HTTPException) as error:
                cause = f"{type(error).__name__}: {error}"
                continue
            if status == 200:
                return _content(data)
            cause = f"HTTP status {status}"
            # A request that is wrong stays wrong.
            if status < 500 and status not in (408, 429):
                break
        raise UnansweredError(cause)

    def _post(self, body: bytes) -> tuple[int, bytes]:
        parts = urlsplit(self.address)
        kind = HTTPSConnection if parts.scheme == "https" else HTTPConnection
        headers = {"Content-Type": "application/json"}
        if self.token is not None:
            headers["Authorization"] = f"Bearer {self.token}"
        connection = kind(parts.hostname or "", parts.port, timeout=self.timeout)
        hangs_up: threading.Timer | None = None
        try:
            connection.connect()
            hangs_up = threading.Timer(_PATIENCE * self.timeout, _hang_up, [connection.sock])
            hangs_up.start()
            connection.request("POST", f"{parts.path}/chat/completions", body, headers)
            response = connection.getresponse()
            return response.status, response.read(_MOST_BYTES)
        finally:
            if hangs_up is not None:
                hangs_up.cancel()
            connection.close()


def _hang_up(held: socket.socket) -> None:
    # It may just have ended by itself.
    with contextlib.suppress(OSError):
        held.shutdown(socket.SHUT_RDWR)


def _content(data: bytes) -> str:
    try:
        reply: Any = json.loads(data)
        content = reply["choices"][0]["message"]["content"] or ""
        if not isinstance(content, str):
            raise TypeError("no text")
        return content
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise UnansweredError("its reply is no chat completion") from error
