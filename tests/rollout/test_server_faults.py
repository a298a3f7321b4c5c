"""Mistakes of callers and faults of an engine, over real HTTP: each is the answer of a call, and every call is
answered."""

import http.client
import json
import socket
import threading
import time

import pytest

from rlpt.rollout import listening
from rlpt.rollout.client import EngineDownError, RefusedError
from rlpt.rollout.wire import Job


def test_a_wrong_token_is_refused_whatever_the_call(served, connect, fake) -> None:
    with pytest.raises(RefusedError, match=r"call describe: wrong token"):
        connect(token="guess").describe()
    assert fake.posted(served, "/describe", b"{}")[0] == 401
    assert served.backend.calls == []


def test_a_refused_connection_can_be_used_again(served, connect, fake) -> None:
    client = connect(token="guess")
    with pytest.raises(RefusedError):
        client.describe()
    client.token = fake.TOKEN
    assert client.describe() == (served.backend.spec, -1)


def test_anybody_may_ask_whether_it_lives(served) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=5)
    connection.request("GET", "/health")
    answer = connection.getresponse()
    assert (answer.status, json.loads(answer.read())) == (200, {"alive": True})
    connection.close()


@pytest.mark.parametrize(
    ("path", "body", "error"),
    [
        ("/dance", b"{}", "dance"),
        ("/_submit", b"{}", "_submit"),
        ("/submit", b"{", "JSONDecodeError"),
        ("/submit", b"[]", "no JSON object"),
        ("/forget", b'"a"', "no JSON object"),
        ("/forget", b"{}", "client"),
        ("/submit", b'{"client": "a"}', "jobs"),
        ("/submit", b'{"client": "a", "jobs": [], "more": 1}', "more"),
        ("/collect", b'{"client": "a", "wait": "long"}', "wait"),
        ("/publish", b'{"version": 1, "transport": "pigeon"}', "transport"),
        ("/submit", b'"\xff"', "UnicodeDecodeError"),
    ],
)
def test_a_wrong_message_is_an_error_of_the_call_and_not_of_the_engine(
    served, connect, fake, path, body, error
) -> None:
    status, told = fake.posted(served, path, body, Authorization=f"Bearer {fake.TOKEN}")
    assert status == 400
    assert error in told["error"]
    connect().submit([fake.job("t")])
    assert len(fake.gathered(connect(), 1)) == 1


@pytest.mark.parametrize("length", [str(2**30 + 1), "-1", "many"])
def test_a_message_of_impossible_length_is_not_even_read(served, fake, length) -> None:
    allowed = {"Authorization": f"Bearer {fake.TOKEN}", "Content_Length": length}
    status, told = fake.posted(served, "/submit", b"", **{"Content-Length": length} | allowed)
    assert status == 401
    assert "too large" in told["error"]


def test_a_job_that_the_backend_refuses_says_so(connect) -> None:
    wrong = Job(ticket="t", ids=(1, 500), count=1, seed=0, budget=3)
    with pytest.raises(RefusedError, match=r"call submit: ValueError: job t: an id that nobody"):
        connect().submit([wrong])


def test_an_error_of_the_engine_answers_every_call_with_its_text(served, connect, fake) -> None:
    client, waiting = connect(), connect("b")
    told: list[str] = []

    def wait() -> None:
        with pytest.raises(EngineDownError) as error:
            waiting.collect([], 10.0)
        told.append(str(error.value))

    thread = threading.Thread(target=wait)
    thread.start()
    time.sleep(0.1)
    served.backend.fault = ZeroDivisionError("out of luck")
    client.submit([fake.job("t")])
    thread.join(5)
    calls = {
        "describe": client.describe,
        "submit": lambda: client.submit([fake.job("u")]),
        "collect": lambda: client.collect([], 5.0),
        "counters": client.counters,
        "forget": client.forget,
    }
    for name, call in calls.items():
        with pytest.raises(EngineDownError, match=f"{name}: .*ZeroDivisionError: out of luck"):
            call()
    assert len(told) == 1
    assert "ZeroDivisionError: out of luck" in told[0]
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=5)
    connection.request("GET", "/health")
    answer = connection.getresponse()
    # The text of an error is for those who have the token.
    assert (answer.status, json.loads(answer.read())) == (503, {"alive": False})
    connection.close()


@pytest.mark.parametrize(
    "said", [b"", b"GET /health HTTP/1.1\r\nX: ", b"POST /submit HTTP/1.1\r\n"]
)
def test_a_connection_without_the_token_ends_however_busy_it_looks(
    served, connect, fake, said, monkeypatch
) -> None:
    monkeypatch.setattr(listening, "PATIENCE", 0.5)
    client = connect()
    assert client.describe()[1] == -1
    with socket.create_connection(("127.0.0.1", served.port), timeout=0.1) as held:
        held.sendall(said)
        started = time.monotonic()
        while not _ended(held):
            assert time.monotonic() - started < 5
    # One that has shown it lasts, in silence too.
    before = client._connection.sock
    assert client.describe()[1] == -1
    assert client._connection.sock is before


def _ended(held: socket.socket) -> bool:
    try:
        held.sendall(b"x")
        return held.recv(1) == b""
    except TimeoutError:
        return False
    except ConnectionError:
        return True


def test_a_stopped_engine_takes_no_more_work(served, connect, fake) -> None:
    client = connect()
    client.describe()
    served.server.stop()
    served.thread.join(5)
    assert not served.thread.is_alive()
    with pytest.raises(EngineDownError, match="the engine was stopped"):
        client.submit([fake.job("t")])


def test_a_dead_engine_is_down(served, connect) -> None:
    client = connect()
    client.describe()
    served.die()
    for _ in range(2):
        with pytest.raises(EngineDownError, match=f"engine {served.address}, call describe: "):
            client.describe()


def test_an_engine_that_does_not_answer_is_down_after_the_timeout(served, connect) -> None:
    client = connect(timeout=0.3)
    free = threading.Event()
    served.backend.counters = lambda: {"woken": float(free.wait(5))}
    started = time.monotonic()
    with pytest.raises(EngineDownError, match=r"call counters: no answer within 0.3 s"):
        client.counters()
    assert 0.3 <= time.monotonic() - started < 2.0
    free.set()
    assert client.describe()[1] == -1
