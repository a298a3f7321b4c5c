"""A backend without a model, the server around it in threads of the test, and an engine process that is none.

What it samples is a pure function of (seed, ids so far, version); its weights are real tensors.
"""

import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from rlpt import rng
from rlpt.rollout import wire
from rlpt.rollout.checksum import checksum
from rlpt.rollout.client import EngineClient, EngineDownError
from rlpt.rollout.process import EngineProcess
from rlpt.rollout.seat import Seat
from rlpt.rollout.server import Server, listen
from rlpt.rollout.wire import EngineSpec, Finished, Job, Publish, Sampled, Span

VOCABULARY, OPENER, CLOSER = 97, 95, 96
TOKEN = "a token"


def specification(**changes: Any) -> EngineSpec:
    known: dict[str, Any] = {
        "model": "nowhere", "architecture": "LlamaForCausalLM", "vocabulary": VOCABULARY,
        "tokenizer": "f00d", "opener": OPENER, "closer": CLOSER, "longest": 64,
        "dtype": "float32", "kv_cache_gib": 0.5, "max_sequences": 8,
    }  # fmt: skip
    return EngineSpec(**known | changes)


def drawn(seed: int, ids: Sequence[int], version: int) -> tuple[int, float]:
    """The next token and its log-probability; never the opener, and one in seven is the closer."""
    draw = rng.key(seed, "fake", version, *ids)
    return (CLOSER if draw % 7 == 0 else draw % OPENER), -float(draw % 64) / 8


def sampled(job: Job, g: int, versions: Sequence[int]) -> Sampled | None:
    """Rollout g of a job whose step t ran on versions[t]; None while it is open."""
    ids, logp, closed = [], [], None
    for version in versions:
        # A forced closer takes no step.
        so_far = [*job.ids, *ids[:closed], *([CLOSER] if closed is not None else [])]
        so_far += ids[closed:] if closed is not None else []
        one, its = drawn(job.seed + g, so_far, version)
        ids, logp = [*ids, one], [*logp, its]
        if closed is None and (one == CLOSER or len(ids) == job.budget):
            closed = len(ids)
            if not job.prediction:
                break
        elif closed is not None and (one == CLOSER or len(ids) - closed == job.prediction):
            break
    else:
        return None
    assert closed is not None
    return Sampled(
        thought=tuple(ids[:closed]), thought_logp=tuple(logp[:closed]),
        prediction=tuple(ids[closed:]), prediction_logp=tuple(logp[closed:]),
        spans=tuple(_spans(versions[: len(ids)])),
    )  # fmt: skip


def _spans(versions: Sequence[int]) -> Iterable[Span]:
    starts = [t for t, v in enumerate(versions) if t == 0 or versions[t - 1] != v]
    for start, stop in zip(starts, [*starts[1:], len(versions)], strict=True):
        yield Span(version=versions[start], start=start, stop=stop)


def finished(job: Job, versions: Sequence[int]) -> Finished | None:
    """The whole group; None while one of it is open."""
    rollouts = [sampled(job, g, versions) for g in range(job.count)]
    done = tuple(one for one in rollouts if one is not None)
    return Finished(ticket=job.ticket, rollouts=done) if len(done) == job.count else None


class FakeBackend:
    """See `rlpt.rollout.server.Backend`."""

    def __init__(self, spec: EngineSpec) -> None:
        self.spec = spec
        self.version = -1
        self.weights: dict[str, Tensor] = {}
        self.calls: list[str] = []
        self.steps_left: int | None = None
        """Steps that it still takes, as a hung engine does: 0; absent: all."""
        self.fault: Exception | None = None
        """Raised by the next step."""
        self.damaged = ""
        """Tensor whose memory is not what was sent."""
        self._jobs: dict[str, tuple[Job, list[int]]] = {}

    @property
    def busy(self) -> bool:
        return bool(self._jobs) and self.steps_left != 0

    def submit(self, job: Job) -> None:
        if not all(0 <= index < self.spec.vocabulary for index in job.ids):
            raise ValueError(f"job {job.ticket}: an id that nobody knows")
        self.calls.append(f"submit {job.ticket}")
        self._jobs[job.ticket] = (job, [])

    def cancel(self, tickets: Iterable[str]) -> None:
        for ticket in tickets:
            self.calls.append(f"cancel {ticket}")
            del self._jobs[ticket]

    def step(self) -> list[Finished]:
        if self.fault is not None:
            raise self.fault
        if self.steps_left is not None:
            self.steps_left -= 1
        for _, versions in self._jobs.values():
            versions.append(self.version)
        found = [finished(job, versions) for job, versions in self._jobs.values()]
        done = [one for one in found if one is not None]
        for one in done:
            del self._jobs[one.ticket]
        return done

    def load(self, named: Iterable[tuple[str, Tensor]], version: int) -> None:
        self.calls.append(f"load {version}")
        self.weights = {name: tensor.clone() for name, tensor in named}
        if self.damaged:
            self.weights[self.damaged].view(-1)[0] += 1
        self.version = version

    def checksums(self, shapes: dict[str, tuple[int, ...]]) -> dict[str, int]:
        return {name: checksum(self.weights[name].view(shape)) for name, shape in shapes.items()}

    def sleep(self) -> None:
        self.calls.append("sleep")

    def wake(self, tag: str) -> None:
        self.calls.append(f"wake {tag}")

    def counters(self) -> dict[str, float]:
        return {"prefix_queries": 100.0, "prefix_hits": 75.0, "preemptions": 1.0}

    def close(self) -> None:
        self.calls.append("close")


class Served:
    """A server around a backend, in threads; it can die as a process does, with its connections."""

    def __init__(self, backend: FakeBackend, token: str = TOKEN) -> None:
        self.backend = backend
        self.server = Server(backend, token)
        self.http = listen(self.server, "127.0.0.1", 0)
        self.port = int(self.http.server_address[1])
        self.address = f"http://127.0.0.1:{self.port}"
        self.alive = True
        self._sockets: list[socket.socket] = []
        accept = self.http.process_request

        def remembered(request: Any, client: Any) -> None:
            self._sockets.append(request)
            accept(request, client)

        self.http.process_request = remembered
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        with contextlib.suppress(Exception):
            self.server.run()

    def die(self) -> None:
        if not self.alive:
            return
        self.alive = False
        self.server.stop()
        ending = threading.Thread(target=self.http.shutdown)
        ending.start()
        while ending.is_alive():
            # A connection wakes the loop, which otherwise looks twice a second.
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", self.port), timeout=0.1).close()
            ending.join(0.02)
        self.http.server_close()
        for one in self._sockets:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)


class FakeProcess(EngineProcess):
    """Every start is another server in this process. ``prepare`` gets each new backend and the count of starts."""

    def __init__(
        self,
        spec: EngineSpec,
        prepare: Callable[[FakeBackend, int], None] | None = None,
    ) -> None:
        super().__init__(spec, Path("engine.log"), TOKEN)
        self.prepare = prepare
        self.stillborn: set[int] = set()
        """Starts that come to nothing."""
        self.lives: list[Served] = []

    @property
    def now(self) -> Served:
        return self.lives[-1]

    def start(self) -> None:
        self.starts += 1
        backend = FakeBackend(self.spec)
        if self.prepare is not None:
            self.prepare(backend, self.starts)
        self.lives.append(Served(backend, self.token))

    def wait(self) -> None:
        if self.starts in self.stillborn:
            raise EngineDownError(f"engine did not start: attempt {self.starts}")
        self.address = self.now.address

    def stop(self, seconds: float = 10.0) -> None:
        self.kill()

    def kill(self) -> None:
        if self.lives:
            self.now.die()


# ---- what tests ask and hear -------------------------------------------------------------------


def job(ticket: str, count: int = 3, budget: int = 9, prediction: int = 0, seed: int = 5) -> Job:
    ids = (1, 2, 3, len(ticket))
    return Job(ticket=ticket, ids=ids, count=count, seed=seed, budget=budget, prediction=prediction)


def gathered(client: EngineClient, count: int) -> list[Finished]:
    """``count`` groups, each acknowledged with the call after it."""
    found: list[Finished] = []
    arrived: list[str] = []
    deadline = time.monotonic() + 10
    while len(found) < count:
        assert time.monotonic() < deadline
        done, _ = client.collect(arrived, 1.0)
        arrived = [one.ticket for one in done]
        found += done
    client.collect(arrived, 0.0)
    return found


def written(folder: Path, version: int, **tensors: Tensor) -> Publish:
    """Weights in a folder; where none are given, two tensors full of their version."""
    tensors = tensors or {name: torch.full((2, 3), float(version)) for name in ("down", "up")}
    place = folder / str(version)
    place.mkdir()
    save_file(tensors, place / "weights.safetensors")
    told = tuple(
        wire.Tensor(name=n, shape=tuple(t.shape), checksum=checksum(t)) for n, t in tensors.items()
    )
    return Publish(version=version, transport="directory", place=str(place), tensors=told)


def posted(served: Served, path: str, body: bytes, **headers: str) -> tuple[int, dict]:
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=5)
    connection.putrequest("POST", path)
    for name, value in ({"Content-Length": str(len(body))} | headers).items():
        connection.putheader(name.replace("_", "-"), value)
    connection.endheaders(body)
    answer = connection.getresponse()
    found = json.loads(answer.read())
    connection.close()
    return answer.status, found


def polled(seat: Seat, count: int, seconds: float = 20.0) -> list[Finished]:
    found: list[Finished] = []
    deadline = time.monotonic() + seconds
    while len(found) < count:
        assert time.monotonic() < deadline
        found += seat.poll(0.1)
    return found


def nothing_more(seat: Seat) -> bool:
    return not seat.outstanding and seat.load == 0 and seat.poll(0.0) == seat.poll(0.0) == []
