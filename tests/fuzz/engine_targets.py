"""What engines, judges and policies say: messages, answers, ids."""

import contextlib
import json
import random
import socket
from collections.abc import Callable, Iterator, Sequence
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

from fuzzing import Target
from mutations import either, flipped, of_json
from pydantic import ValidationError

from rlpt.reward.answer import exact_match, numeric_match
from rlpt.reward.endpoint import UnansweredError, _content
from rlpt.reward.judge import verdict_of
from rlpt.reward.match import MATCHES, answer
from rlpt.rollout import wire
from rlpt.rollout.client import EngineDownError, RefusedError, _answer
from rlpt.rollout.server import Server, listen
from rlpt.rollout.wire import EngineSpec

TOKEN = "secret"
SPEC = EngineSpec(
    model="m", architecture="a", vocabulary=61, tokenizer="t", opener=59, closer=60, longest=64,
    dtype="float32", kv_cache_gib=0.1, max_sequences=4,
)  # fmt: skip
_JOB = {"ticket": "t", "ids": [1, 2, 59], "count": 2, "seed": 3, "budget": 4}
_CALLS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("submit", {"client": "a", "jobs": [_JOB]}),
    ("collect", {"client": "a", "acknowledged": ["t"], "wait": 0.0}),
    ("cancel", {"client": "a", "tickets": ["t"]}),
    ("forget", {"client": "a"}),
    ("describe", {}),
    ("group", {}),
    ("counters", {}),
)
_SAMPLED = {
    "thought": [3, 4, 60], "thought_logp": [-0.5, -1.0, -0.1], "prediction": [7],
    "prediction_logp": [-2.0], "spans": [{"version": 0, "start": 0, "stop": 2},
                                         {"version": 1, "start": 2, "stop": 4}],
}  # fmt: skip


class _Backend:
    """An engine that takes every job and never has any to do."""

    spec, version, busy = SPEC, 0, False

    def submit(self, job: wire.Job) -> None: ...
    def cancel(self, tickets: object) -> None: ...
    def load(self, named: object, version: int) -> None: ...
    def sleep(self) -> None: ...
    def wake(self, tag: str) -> None: ...
    def close(self) -> None: ...

    def step(self) -> list[wire.Finished]:
        return []

    def checksums(self, shapes: object) -> dict[str, int]:
        return {}

    def counters(self) -> dict[str, float]:
        return {}


def targets(scratch: Path) -> Iterator[Target]:
    yield Target("match: bytes", _matched, [b"\x05ab cd ef", b"\x02a\xc3\xa9\xff"], flipped)
    yield Target(
        "reward: answers",
        _answered,
        [b"so 1,200 = $1200.00\n", b"1/2 or .5"],
        either(flipped, _digits),
    )
    yield Target("judge: replies", _judged, _REPLIES, either(flipped, of_json), (UnansweredError,))
    bodies = [bytes([n]) + json.dumps(body).encode() for n, (_, body) in enumerate(_CALLS)]
    yield Target(
        "engine: calls", _call(), bodies, _tail(either(flipped, of_json)), (ValueError, KeyError)
    )
    finished = json.dumps({"done": [{"ticket": "t", "rollouts": [_SAMPLED]}], "steps": 3}).encode()
    refusals = (ValidationError, RefusedError, EngineDownError)
    yield Target("engine: answers", _collected, [finished], either(flipped, of_json), refusals)
    yield Target("engine: http", _Http(), _requests(), flipped, (RefusedError,))


# ---- rewards -------------------------------------------------------------------------------------


def _matched(data: bytes) -> None:
    """The first byte says how long tokens are; the rest is prediction and gold, in equal parts but for the odd one."""
    size, rest = sum(data[:1]) % 5 + 1, data[1:]
    half = len(rest) // 2
    gold = rest[half:]
    tokens = [gold[at : at + size] for at in range(0, len(gold), size)]
    for prediction in (rest[:half], gold[:half], gold[: half - half % size]):
        assert MATCHES["prefix"](prediction, tokens) == _prefix(prediction, tokens)
        assert MATCHES["first_token"](prediction, tokens) == _first(prediction, tokens)
        assert MATCHES["span"](prediction, tokens) == _span(prediction, tokens)
    assert answer(rest, b"a", b"b") == _between(rest)


def _prefix(prediction: bytes, tokens: Sequence[bytes]) -> float:
    """Token by token: some number of whole gold tokens is the prediction."""
    said = b""
    for token in tokens:
        said += token
        if said == prediction and said:
            return 1.0
    return 0.0


def _first(prediction: bytes, tokens: Sequence[bytes]) -> float:
    wanted = list(tokens[0]) if tokens else []
    return float(bool(wanted) and list(prediction)[: len(wanted)] == wanted)


def _span(prediction: bytes, tokens: Sequence[bytes]) -> float:
    spaces = set(b" \t\n\r\x0b\x0c")

    def bare(text: bytes) -> list[int]:
        letters = list(text)
        while letters and letters[0] in spaces:
            letters.pop(0)
        while letters and letters[-1] in spaces:
            letters.pop()
        return letters

    gold = bare(b"".join(tokens))
    return float(bool(gold) and bare(prediction) == gold)


def _between(text: bytes) -> bytes:
    """What stands in the last whole pair of a and b, letter by letter."""
    for end in range(len(text) - 1, -1, -1):
        if text[end : end + 1] == b"b":
            for start in range(end - 1, -1, -1):
                if text[start : start + 1] == b"a":
                    inside = text[start + 1 : end]
                    stop = [n for n, byte in enumerate(inside) if byte == ord("b")]
                    return inside[: stop[0]] if stop else inside
            return b""
    return b""


def _answered(data: bytes) -> None:
    text = data.decode(errors="replace")
    for how in (numeric_match, exact_match):
        assert how(text, "12") in (0.0, 1.0)
        assert how("12", text) in (0.0, 1.0)
        assert how(text, text) in (0.0, 1.0)


def _digits(rng: random.Random, samples: Sequence[bytes]) -> bytes:
    return bytes(rng.choice(b"0123456789.,/$%- ") for _ in range(rng.choice((3, 9, 40))))


_REPLIES = [
    json.dumps({"choices": [{"message": {"content": text}}]}).encode()
    for text in ("Yes.\n**Score: 1**", "Score: 0", "", None)
]


def _judged(data: bytes) -> None:
    verdict = verdict_of(_content(data))
    assert verdict.score in (0.0, 1.0) or verdict.lost == "rubbish"


# ---- engines -------------------------------------------------------------------------------------


def _tail(mutate):
    """The first byte names the call and stays."""
    return lambda rng, samples: (one := rng.choice(samples))[:1] + mutate(rng, [one[1:]])


def _call() -> Callable[[bytes], None]:
    server = Server(_Backend(), TOKEN)  # pyright: ignore[reportArgumentType]
    # No thread here: a command runs at once, as it would between two steps.
    server._between_steps = lambda command: command()

    def call(data: bytes) -> None:
        body = json.loads(data[1:])
        if not isinstance(body, dict):
            raise ValueError("no object")
        json.dumps(
            server.call(_CALLS[data[0]][0], body | ({"wait": 0.0} if "wait" in body else {}))
        )

    return call


def _collected(data: bytes) -> None:
    for status in (200, 400, 500):
        table = _answer("engine", status, data)
        for one in table["done"] if isinstance(table.get("done"), list) else []:
            found = wire.Finished.model_validate_json(json.dumps(one))
            for sampled in found.rollouts:
                rollout = wire.rollout(sampled, 60)
                assert len(rollout.ids) == len(rollout.logp) == len(rollout.version)
        if status == 200:
            return


def _requests() -> list[bytes]:
    found = []
    for name, body in _CALLS[3:]:
        text = json.dumps(body).encode()
        head = f"POST /{name} HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {TOKEN}\r\n"
        head += f"Content-Length: {len(text)}\r\n\r\n"
        found.append(head.encode() + text)
    return [*found, b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n"]


class _Http:
    """Bytes on a connection to a real server, answered in this thread: what a handler does not catch is seen."""

    def __init__(self) -> None:
        self._http: ThreadingHTTPServer | None = None

    def __call__(self, data: bytes) -> None:
        if self._http is None:
            server = Server(_Backend(), TOKEN)  # pyright: ignore[reportArgumentType]
            server._between_steps = lambda command: command()
            self._http = listen(server, "127.0.0.1", 0)
        here, there = socket.socketpair()
        with here, there:
            here.settimeout(5)
            here.sendall(data)
            here.shutdown(socket.SHUT_WR)
            self._http.finish_request(there, ("127.0.0.1", 1))
            there.close()
            answer = _heard(here)
        status = answer.split(None, 2)[1:2]
        if status != [b"200"]:
            assert status != [b"500"], answer
            raise RefusedError(answer[:80].decode(errors="replace"))


def _heard(connection: socket.socket) -> bytes:
    """All that comes. Who is refused before the end of what was sent is cut off."""
    parts = []
    with contextlib.suppress(ConnectionResetError):
        while part := connection.recv(1 << 16):
            parts.append(part)
    return b"".join(parts)
