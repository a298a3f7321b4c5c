"""An engine process, seen from outside: token-level HTTP on one address, for one trainer or many.

The engine itself runs in the main thread and is stepped as long as it has work; calls are commands that run between
two of its steps, so weights change in flight. Everything but `/health` needs the token of the run.
"""

import json
import queue
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from rlpt.rollout.buckets import TransferError
from rlpt.rollout.listening import Caller, Listener
from rlpt.rollout.transport import Receiver
from rlpt.rollout.wire import Cancel, Collect, EngineSpec, Finished, Job, Join, Publish, Submit

LONGEST_WAIT = 30.0
"""Seconds that one call may wait for results: a client asks again."""
_IDLE = 0.5
_LARGEST_BODY = 1 << 30
_LENGTH = re.compile("[0-9]{1,18}")


@runtime_checkable
class Backend(Protocol):
    """What can be served. Not for several threads."""

    spec: EngineSpec
    version: int

    @property
    def busy(self) -> bool: ...
    def submit(self, job: Job) -> None: ...
    def cancel(self, tickets: Iterable[str]) -> None: ...
    def step(self) -> list[Finished]: ...
    def load(self, named: Iterable[tuple[str, Tensor]], version: int) -> None: ...
    def checksums(self, shapes: dict[str, tuple[int, ...]]) -> dict[str, int]: ...
    def sleep(self) -> None: ...
    def wake(self, tag: str) -> None: ...
    def counters(self) -> dict[str, float]: ...
    def close(self) -> None: ...


class Server:
    """Steps a backend and answers calls until it is told to stop."""

    def __init__(self, backend: Backend, token: str) -> None:
        self.backend = backend
        self.token = token
        self.failure: str | None = None
        self.seconds = {"busy": 0.0, "idle": 0.0}
        self.tokens = self.steps = 0
        self._commands: queue.Queue[tuple[Callable[[], Any], Future]] = queue.Queue()
        self._arrived = threading.Condition()
        self._owner: dict[str, str] = {}
        self._done: dict[str, dict[str, Finished]] = {}
        self._stopped = threading.Event()
        self._receiver = Receiver(backend.spec.device)
        self._received: dict[str, tuple[int, ...]] = {}
        self._whole = True
        """Whether its weights are of one version: not so within a publication, nor after one that failed."""

    # ---- main thread ---------------------------------------------------------------------------

    def run(self) -> None:
        """Until `stop`. An error of the engine ends it: every call is then refused with its text."""
        try:
            while not self._stopped.is_set():
                self._turn()
        except Exception as error:
            self.failure = f"{type(error).__name__}: {error}"
            with self._arrived:
                self._arrived.notify_all()
            raise
        finally:
            self._refuse_rest()

    @property
    def over(self) -> bool:
        """Whether the engine failed or was stopped: another one may do its work."""
        return self.failure is not None or self._stopped.is_set()

    def stop(self) -> None:
        self._stopped.set()

    def _turn(self) -> None:
        busy, started = self._busy, time.perf_counter()
        self._run_commands(wait=0.0 if busy else _IDLE)
        if self._busy:
            self._keep(self.backend.step())
            self.steps += 1
        self.seconds["busy" if busy else "idle"] += time.perf_counter() - started

    @property
    def _busy(self) -> bool:
        return self._whole and self.backend.busy

    def _run_commands(self, wait: float) -> None:
        while True:
            try:
                command, answer = self._commands.get(timeout=wait or None, block=wait > 0)
            except queue.Empty:
                return
            try:
                answer.set_result(command())
            except Exception as error:
                answer.set_exception(error)
            wait = 0.0

    def _keep(self, finished: Sequence[Finished]) -> None:
        # Waking a waiting call for nothing would cost every step a change of threads.
        if not finished:
            return
        with self._arrived:
            for one in finished:
                client = self._owner.pop(one.ticket, None)
                if client is not None:
                    self._done.setdefault(client, {})[one.ticket] = one
                    self.tokens += sum(len(r.thought) + len(r.prediction) for r in one.rollouts)
            self._arrived.notify_all()

    def _refuse_rest(self) -> None:
        while not self._commands.empty():
            self._commands.get_nowait()[1].set_exception(
                RuntimeError(self.failure or "the engine was stopped")
            )

    # ---- calls, in threads of their own --------------------------------------------------------

    def call(self, name: str, body: dict[str, Any]) -> Any:
        """Raises KeyError for a call that does not exist, ValueError for a body that is wrong."""
        if self.failure:
            raise RuntimeError(self.failure)
        handler = getattr(self, f"call_{name}", None)
        if handler is None:
            raise KeyError(name)
        return handler(body)

    def _between_steps(self, command: Callable[[], Any]) -> Any:
        answer: Future = Future()
        self._commands.put((command, answer))
        while not answer.done() and self.failure is None and not self._stopped.is_set():
            try:
                return answer.result(timeout=_IDLE)
            except TimeoutError:
                continue
        if answer.done():
            return answer.result()
        raise RuntimeError(self.failure or "the engine was stopped")

    def call_describe(self, _body: dict[str, Any]) -> dict[str, Any]:
        version = self.backend.version if self._whole else -1
        return {"spec": self.backend.spec.model_dump(), "version": version}

    def call_submit(self, body: dict[str, Any]) -> dict[str, Any]:
        """Jobs of one client; a ticket that is known is left alone, so that a call may be repeated."""
        message = Submit.model_validate_json(json.dumps(body))
        return {"accepted": self._between_steps(lambda: self._submit(message))}

    def _submit(self, message: Submit) -> int:
        new = [job for job in message.jobs if not self._known(message.client, job.ticket)]
        for job in new:
            self.backend.submit(job)
            self._owner[job.ticket] = message.client
        return len(new)

    def _known(self, client: str, ticket: str) -> bool:
        return ticket in self._owner or ticket in self._done.get(client, {})

    def call_collect(self, body: dict[str, Any]) -> dict[str, Any]:
        """Finished groups that were not acknowledged yet; waits for the first."""
        message = Collect.model_validate_json(json.dumps(body))
        with self._arrived:
            mine = self._done.setdefault(message.client, {})
            for ticket in message.acknowledged:
                mine.pop(ticket, None)
            self._arrived.wait_for(
                lambda: bool(mine) or self.failure is not None, min(message.wait, LONGEST_WAIT)
            )
            if self.failure:
                raise RuntimeError(self.failure)
            return {"done": [one.model_dump() for one in mine.values()], "steps": self.steps}

    def call_cancel(self, body: dict[str, Any]) -> dict[str, Any]:
        """Drop jobs and results of a client by ticket."""
        message = Cancel.model_validate_json(json.dumps(body))
        return {
            "cancelled": self._between_steps(
                lambda: self._drop(message.client, set(message.tickets))
            )
        }

    def call_forget(self, body: dict[str, Any]) -> dict[str, Any]:
        """Drop all jobs and results of a client: it starts anew."""
        client = str(body["client"])
        return {"forgotten": self._between_steps(lambda: self._drop(client, None))}

    def _drop(self, client: str, tickets: set[str] | None) -> int:
        with self._arrived:
            owned = [ticket for ticket, owner in self._owner.items() if owner == client]
            results = self._done.setdefault(client, {})
            mine = [ticket for ticket in owned if tickets is None or ticket in tickets]
            self.backend.cancel(mine)
            for ticket in mine:
                del self._owner[ticket]
            for ticket in [t for t in results if tickets is None or t in tickets]:
                del results[ticket]
        return len(mine)

    def call_join(self, body: dict[str, Any]) -> dict[str, Any]:
        """Become a member of a group that weights are sent through."""
        message = Join.model_validate_json(json.dumps(body))
        self._between_steps(lambda: self._receiver.join(message))
        return {"group": message.name}

    def call_group(self, _body: dict[str, Any]) -> dict[str, Any]:
        return {"group": self._receiver.group_name}

    def call_publish(self, body: dict[str, Any]) -> dict[str, Any]:
        """New weights between two steps; the answer holds checksums read back from the engine's own memory."""
        message = Publish.model_validate_json(json.dumps(body))
        return {"checksums": self._between_steps(lambda: self._publish(message))}

    def _publish(self, message: Publish) -> dict[str, int]:
        if message.first:
            self._received = {tensor.name: tensor.shape for tensor in message.tensors}
            # Asleep, the weights have no memory to be loaded into; the cache gets its own when they are there.
            self.backend.wake("weights")
        try:
            self.backend.load(self._noted(message), message.version if message.last else -1)
        except Exception:
            # The others of a group would wait for this engine.
            self._receiver.leave()
            raise
        if not message.last:
            return {}
        found = self.backend.checksums(self._received)
        self.backend.wake("kv_cache")
        self._whole = True
        return found

    def _noted(self, message: Publish) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self._receiver.read(message):
            self._received[name] = tuple(tensor.shape)
            self._whole = False
            yield name, tensor

    def call_sleep(self, _body: dict[str, Any]) -> dict[str, Any]:
        return {"slept": self._between_steps(self.backend.sleep)}

    def call_counters(self, _body: dict[str, Any]) -> dict[str, float]:
        return (
            self._between_steps(self.backend.counters)
            | self.seconds
            | {"tokens": float(self.tokens)}
        )


def listen(server: Server, host: str, port: int) -> Listener:
    """Serve calls in daemon threads; port 0 takes a free one. Raises OSError where the port is taken."""

    class Handler(Caller):
        def get(self) -> None:
            # Why is nobody's business who does not have the token: an error can hold paths and text.
            alive = server.failure is None
            self._answer(200 if alive else 503, {"alive": alive})

        def post(self) -> None:
            length = self.headers.get("Content-Length", "0")
            if (
                not self.knows(server.token)
                or not _LENGTH.fullmatch(length)
                or int(length) > _LARGEST_BODY
            ):
                # The body is left where it is, so nothing can follow it on this connection.
                self.close_connection = True
                return self._answer(401, {"error": "wrong token, or too large a message"})
            try:
                body = json.loads(self.rfile.read(int(length)) or b"{}")
                if not isinstance(body, dict):
                    raise ValueError("the body is no JSON object")
                self._answer(200, server.call(self.path.strip("/"), body))
            except (KeyError, ValueError, FileNotFoundError, TransferError) as error:
                self._answer(400, {"error": f"{type(error).__name__}: {error}"})
            except Exception as error:
                # A call that failed while the engine goes on would fail again after a restart.
                status = 500 if server.over else 400
                self._answer(status, {"error": f"{type(error).__name__}: {error}"})

        def _answer(self, status: int, table: Any) -> None:
            body = json.dumps(table).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            if self.close_connection:
                self.send_header("Connection", "close")
            self.end_headers()
            self.wfile.write(body)

    http = Listener((host, port), Handler)
    threading.Thread(target=http.serve_forever, name="calls", daemon=True).start()
    return http
