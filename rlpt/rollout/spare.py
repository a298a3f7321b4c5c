"""The published weights once more, in the main memory of the trainer's first rank, for an engine that starts anew.

An engine that dies comes back in the middle of a step. A process group cannot be formed then, because the other ranks
and engines are at work, and the policy is sharded and may be newer than what the engine has to have. So rank 0 keeps
what it sent, in the dtype of the engine, and engines fetch it over HTTP, wherever they run: no folder that all machines
see. It costs the host 2 bytes a parameter (4 in float32), and one copy out of the GPU with each publication.
"""

import contextlib
import http.client
import itertools
import secrets
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import torch

from rlpt.rollout import wire
from rlpt.rollout.buckets import DTYPES, Bucket, TransferError
from rlpt.rollout.listening import Caller, Listener

_LENGTH = 8
"""Bytes of the header's length, before the header, before the numbers."""


@dataclass(frozen=True)
class _Held:
    version: int
    buckets: list[Bucket] = field(default_factory=list)


class Spare:
    """One version of the weights, served from a thread of its own."""

    def __init__(self, host: str) -> None:
        self.secret = secrets.token_hex(16)
        self._held = _Held(-1)
        self._http = Listener((host, 0), _handler(self))
        threading.Thread(target=self._http.serve_forever, name="spare", daemon=True).start()

    @property
    def place(self) -> str:
        host, port = self._http.server_address[:2]
        return f"http://{host!s}:{port}/{self._held.version}"

    def begin(self, version: int) -> None:
        """Let go of the last version: nobody may need it any more."""
        self._held = _Held(version)

    def keep(self, bucket: Bucket) -> None:
        self._held.buckets.append(Bucket(bucket.header, bucket.payload.cpu()))

    @property
    def tensors(self) -> tuple[wire.Tensor, ...]:
        return tuple(tensor for one in self._held.buckets for tensor in one.header.tensors)

    def answer(self, path: str) -> tuple[int, list[bytes | memoryview]]:
        """Status and body of a call: a bucket, none after the last, or a version that is gone."""
        held = self._held
        version, _, number = path.strip("/").partition("/")
        if version != str(held.version) or not number.isdigit():
            return 410, [f"the trainer holds version {held.version} now".encode()]
        if int(number) >= len(held.buckets):
            return 204, []
        bucket = held.buckets[int(number)]
        header = bucket.header.model_dump_json().encode()
        numbers = bucket.payload.view(torch.uint8).numpy().data
        return 200, [len(header).to_bytes(_LENGTH, "big"), header, numbers]

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._held = _Held(-1)


def _handler(spare: Spare) -> type[Caller]:
    class Handler(Caller):
        def get(self) -> None:
            allowed = self.knows(spare.secret)
            status, parts = spare.answer(self.path) if allowed else (401, [b"wrong secret"])
            self.send_response(status)
            self.send_header("Content-Length", str(sum(len(part) for part in parts)))
            self.end_headers()
            for part in parts:
                self.wfile.write(part)

    return Handler


def fetch(place: str, secret: str, seconds: float) -> Iterator[Bucket]:
    """All buckets of one version. Raises TransferError saying where and why it ended early."""
    parts = urlsplit(place)
    connection = http.client.HTTPConnection(str(parts.hostname), parts.port, timeout=seconds)
    with contextlib.closing(connection):
        for number in itertools.count():
            status, body = _get(connection, f"{parts.path}/{number}", secret, place)
            if status == 204:
                return
            if status != 200:
                raise TransferError(f"{place}, bucket {number}: {bytes(body).decode()}")
            yield _bucket(body)


def _get(
    connection: http.client.HTTPConnection, path: str, secret: str, place: str
) -> tuple[int, bytearray]:
    try:
        connection.request("GET", path, headers={"Authorization": f"Bearer {secret}"})
        answer = connection.getresponse()
        body = bytearray(answer.length or 0)
        at = 0
        while at < len(body) and (count := answer.readinto(memoryview(body)[at:])):
            at += count
        answer.read()
    except (OSError, http.client.HTTPException) as error:
        raise TransferError(f"{place}: {type(error).__name__}: {error}") from error
    if at < len(body):
        raise TransferError(f"{place}: ended after {at} of {len(body)} bytes")
    return answer.status, body


def _bucket(body: bytearray) -> Bucket:
    end = _LENGTH + int.from_bytes(body[:_LENGTH], "big")
    header = wire.Header.model_validate_json(bytes(body[_LENGTH:end]))
    # Through bytes: the numbers need not stand at a multiple of their size.
    payload = torch.frombuffer(body[end:], dtype=torch.uint8).view(DTYPES[header.dtype])
    return Bucket(header, payload)
