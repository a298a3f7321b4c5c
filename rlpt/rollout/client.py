"""Calls to one engine process. Every call has a timeout, and a failure says which engine, which call and why."""

import http.client
import json
import socket
from collections.abc import Iterable, Sequence
from typing import Any
from urllib.parse import urlsplit

from rlpt.rollout.wire import Cancel, Collect, EngineSpec, Finished, Job, Join, Publish, Submit


class EngineDownError(RuntimeError):
    """The engine is gone or does not answer in time: another one may take its work."""


class RefusedError(RuntimeError):
    """The engine answered, and refused: repeating the call would not help."""


class EngineClient:
    """One trainer rank's view of one engine."""

    def __init__(self, address: str, token: str, client: str, timeout: float) -> None:
        self.address = address
        self.token = token
        self.client = client
        self.timeout = timeout
        self._connection: http.client.HTTPConnection | None = None

    def describe(self) -> tuple[EngineSpec, int]:
        """What the engine runs, and the version of its weights."""
        found = self._call("describe", {})
        try:
            return EngineSpec.model_validate_json(json.dumps(found["spec"])), int(found["version"])
        except (KeyError, ValueError) as error:
            raise RefusedError(
                f"engine {self.address}, call describe: answers in words of its own: {type(error).__name__}: is it an "
                "rlpt engine of this version?"
            ) from error

    def submit(self, jobs: Sequence[Job]) -> None:
        self._call("submit", Submit(client=self.client, jobs=tuple(jobs)).model_dump())

    def collect(self, acknowledged: Iterable[str], wait: float) -> tuple[list[Finished], int]:
        """Results that were not acknowledged yet, after at most ``wait`` seconds; and the steps the engine has made."""
        message = Collect(client=self.client, acknowledged=tuple(acknowledged), wait=wait)
        found = self._call("collect", message.model_dump(), extra=wait)
        try:
            done = [Finished.model_validate_json(json.dumps(one)) for one in found["done"]]
            return done, int(found["steps"])
        except (KeyError, TypeError, ValueError) as error:
            raise RefusedError(
                f"engine {self.address}, call collect: answers with what are no rollouts: {type(error).__name__}: is "
                "it an rlpt engine of this version?"
            ) from error

    def publish(self, message: Publish, extra: float = 0.0) -> dict[str, int]:
        """The checksums of the engine's weights afterwards, by name. It may take ``extra`` seconds more than a call."""
        return self._call("publish", message.model_dump(), extra)["checksums"]

    def join(self, message: Join) -> None:
        """Make the engine a member of a group; it answers when all members are there."""
        self._call("join", message.model_dump(), extra=message.seconds)

    def group(self) -> str:
        """The group that the engine is a member of."""
        return self._call("group", {})["group"]

    def cancel(self, tickets: Sequence[str]) -> None:
        self._call("cancel", Cancel(client=self.client, tickets=tuple(tickets)).model_dump())

    def forget(self) -> None:
        self._call("forget", {"client": self.client})

    def sleep(self) -> None:
        self._call("sleep", {})

    def counters(self) -> dict[str, float]:
        return self._call("counters", {})

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _call(self, name: str, body: dict[str, Any], extra: float = 0.0) -> dict[str, Any]:
        where = f"engine {self.address}, call {name}"
        try:
            status, text = self._post(name, json.dumps(body).encode(), self.timeout + extra)
        except TimeoutError as error:
            self.close()
            raise EngineDownError(
                f"{where}: no answer within {self.timeout + extra:g} s"
            ) from error
        except (OSError, http.client.HTTPException) as error:
            self.close()
            raise EngineDownError(f"{where}: {type(error).__name__}: {error}") from error
        return _answer(where, status, text)

    def _post(self, name: str, body: bytes, timeout: float) -> tuple[int, bytes]:
        if self._connection is None or self._connection.sock is None:
            parts = urlsplit(self.address)
            self._connection = http.client.HTTPConnection(
                str(parts.hostname), parts.port, timeout=timeout
            )
            self._connection.connect()
            self._connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._connection.sock.settimeout(timeout)
        headers = {"Authorization": f"Bearer {self.token}", "Content-Type": "application/json"}
        self._connection.request("POST", f"/{name}", body, headers)
        answer = self._connection.getresponse()
        return answer.status, answer.read()


def _answer(where: str, status: int, text: bytes) -> dict[str, Any]:
    try:
        table = json.loads(text)
    except ValueError:
        table = None
    if not isinstance(table, dict):
        raise RefusedError(
            f"{where}: answers something other than a JSON object: is it an rlpt engine?"
        )
    if status == 200:
        return table
    reason = f"{where}: {table.get('error', f'status {status}')}"
    raise EngineDownError(reason) if status == 500 else RefusedError(reason)
