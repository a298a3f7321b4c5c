"""A judge that is slow, sends elsewhere, answers without end or is a network away: no verdict, and the token stays."""

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from rlpt.reward import endpoint
from rlpt.reward.endpoint import Endpoint, UnansweredError, in_the_clear

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
TOKEN = "marker-of-the-token"


def request(held: socket.socket) -> bytes:
    """Read whole: what is left unread would reset the connection."""
    data = b""
    while b"\r\n\r\n" not in data:
        data += held.recv(1 << 16)
    head, _, body = data.partition(b"\r\n\r\n")
    length = int(head.lower().partition(b"content-length:")[2].split()[0])
    while len(body) < length:
        body += held.recv(1 << 16)
    return head + body


@contextmanager
def speaking(say: Callable[[socket.socket], None]) -> Iterator[tuple[str, list[bytes]]]:
    """A server that reads a request, then does as told; its address and what it was sent."""
    listening, heard = socket.create_server(("127.0.0.1", 0)), []

    def serve() -> None:
        while True:
            try:
                held, _ = listening.accept()
            except OSError:
                return
            with held:
                heard.append(request(held))
                try:
                    say(held)
                except OSError:
                    continue

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/v1", heard
    finally:
        listening.shutdown(socket.SHUT_RDWR)
        listening.close()
        thread.join(5.0)


def asking(address: str, timeout: float = 1.0) -> Endpoint:
    return Endpoint(address, "m", TOKEN, timeout, attempts=1, max_tokens=8)


@pytest.mark.parametrize(
    "part",
    ["body", *(pytest.param(part, marks=pytest.mark.slow) for part in ("headers", "chunks"))],
)
def test_an_answer_in_drops_ends_at_its_time(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every drop comes within the timeout, so silence never does."""
    monkeypatch.setattr(endpoint, "_PATIENCE", 3)
    before = {"headers": b"HTTP/1.1 200 OK\r\nX: ", "body": HEAD + b"Content-Length: 9999\r\n\r\n"}
    before["chunks"] = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"

    def drip(held: socket.socket) -> None:
        held.sendall(before[part])
        for _ in range(100):
            time.sleep(0.05)
            held.sendall(b"1\r\nx\r\n" if part == "chunks" else b"x")

    with speaking(drip) as (address, _):
        started = time.monotonic()
        with pytest.raises(UnansweredError):
            asking(address, timeout=0.2).answer("?")
        assert 0.5 < time.monotonic() - started < 3.0


def test_a_redirect_is_no_answer_and_takes_no_token_along() -> None:
    with speaking(lambda held: None) as (elsewhere, heard):
        reply = f"HTTP/1.1 307 Elsewhere\r\nLocation: {elsewhere}\r\nContent-Length: 0\r\n\r\n"
        with (
            speaking(lambda held: held.sendall(reply.encode())) as (address, asked),
            pytest.raises(UnansweredError, match="HTTP status 307"),
        ):
            asking(address).answer("?")
    assert TOKEN.encode() in asked[0]
    assert heard == []


@pytest.mark.parametrize(
    "body",
    [b"[" * 200_000, b'{"choices": [' * 50_000, b"9" * 10_000, b"\xff", b"null"],
    ids=["nested", "choices", "digits", "bytes", "null"],
)
def test_a_reply_that_is_no_answer_is_none(body: bytes) -> None:
    reply = HEAD + f"Content-Length: {len(body)}\r\n\r\n".encode() + body
    with (
        speaking(lambda held: held.sendall(reply)) as (address, _),
        pytest.raises(UnansweredError, match="its reply is no chat completion"),
    ):
        asking(address).answer("?")


def test_a_reply_without_end_is_read_to_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "_MOST_BYTES", 1 << 16)
    sent = 0

    def pour(held: socket.socket) -> None:
        nonlocal sent
        held.sendall(HEAD + b"\r\n")
        for _ in range(1000):
            sent += held.send(b" " * (1 << 16))

    with speaking(pour) as (address, _), pytest.raises(UnansweredError):
        asking(address).answer("?")
    assert sent < 20 << 20, "the sender was cut off, within what sockets buffer"


@pytest.mark.parametrize(
    ("address", "clear"),
    [
        ("http://127.0.0.1:8000/v1", False),
        ("http://localhost/v1", False),
        ("https://judge.example/v1", False),
        ("http://judge.example/v1", True),
        ("http://127.0.0.1.example/v1", True),
        ("http://0.0.0.0/v1", True),
    ],
)
def test_a_judge_across_the_network_is_one_that_others_can_hear(address: str, clear: bool) -> None:
    assert in_the_clear(address) is clear


def test_a_token_is_in_no_error_and_no_text_of_an_endpoint() -> None:
    with speaking(lambda held: held.sendall(b"garbage " + TOKEN.encode()[:4] + b"\r\n")) as (
        where,
        _,
    ):
        with pytest.raises(UnansweredError) as refused:
            asking(where).answer("?")
        assert TOKEN not in f"{refused.value!r} {asking(where)!r} {json.dumps(str(asking(where)))}"
