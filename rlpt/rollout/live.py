"""Weights that go straight from the trainer's memory to the engines that live: broadcast and ipc.

An engine that dies meanwhile, or later, gets the spare copy that rank 0 keeps. Where all engines live, a failure is one
of the way between them: it ends the run on all ranks, with every address and reason.
"""

import secrets
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from rlpt import dist
from rlpt.console import say
from rlpt.exits import FaultError
from rlpt.rollout import cuda_ipc, wire
from rlpt.rollout.broadcasting import WeightGroup, open_store
from rlpt.rollout.buckets import Bucket, TransferError, buckets
from rlpt.rollout.client import EngineDownError, RefusedError
from rlpt.rollout.publishing import Named, raise_together, use_up
from rlpt.rollout.seat import Seat
from rlpt.rollout.spare import Spare

Outcome = dict[str, int] | RuntimeError
"""What an engine answered, or why it did not."""


class LivePublisher:
    """What both ways share. See `rlpt.rollout.publishing.Publisher`."""

    way: str

    def __init__(
        self, seats: Sequence[Seat], dtype: wire.DType, host: str, seconds: float, world: dist.World
    ) -> None:
        """``host``: the address of rank 0 as engines reach it. ``seconds``: the longest of every wait."""
        self.seats = [seat for seat in seats if seat.publishes]
        self.dtype: wire.DType = dtype
        self.host = host
        self.seconds = seconds
        self.world = world
        self.answered: dict[str, dict[str, int]] = {}
        self._spare = Spare(host) if world.is_main else None

    def send(self, named: Named, version: int) -> wire.Publish:
        # Every rank has to be here before the old spare copy goes: until then an engine may come to fetch it.
        self._prepare()
        if self._spare is not None:
            self._spare.begin(version)
        outcomes = self._pass(named, version)
        self._all_well(outcomes, f"publish of version {version} by {self.way}")
        self.answered = {name: one for name, one in outcomes.items() if isinstance(one, dict)}
        mine = (self._spare.place, self._spare.secret, self._spare.tensors) if self._spare else None
        place, secret, tensors = dist.gathered(mine, self.world)[0]
        return wire.Publish(
            version=version, transport="spare", place=place, secret=secret, tensors=tensors,
            seconds=self.seconds,
        )  # fmt: skip

    def _prepare(self) -> None:
        """No rank goes on before all are here. Collective."""
        raise NotImplementedError

    def _pass(self, named: Named, version: int) -> dict[str, Outcome]:
        """To this rank's engines, and to the spare copy. Collective."""
        raise NotImplementedError

    def _all_well(self, outcomes: dict[str, Outcome], call: str) -> bool:
        """False where an engine died: that excuses those that it let down. Raises FaultError where something failed
        and all live. Collective."""
        failures = [one for one in outcomes.values() if isinstance(one, RuntimeError)]
        mine = [(_said(one), isinstance(one, EngineDownError)) for one in failures]
        everyones = [
            (f"rank {rank}: {text}", down)
            for rank, each in enumerate(dist.gathered(mine, self.world))
            for text, down in each
        ]
        # Causes first: that others received nothing follows from them.
        everyones.sort(key=lambda row: TransferError.__name__ in row[0])
        deaths = [text for text, down in everyones if down]
        if everyones and not deaths:
            raise FaultError(f"{call}: {'; '.join(text for text, _ in everyones)}")
        if deaths:
            say(f"{call}: {'; '.join(deaths)}", self.world.is_main)
        return not deaths

    def sent(self, version: int) -> None:
        """The spare copy stays until the next publication."""

    def close(self) -> None:
        if self._spare is not None:
            self._spare.close()


class BroadcastPublisher(LivePublisher):
    """Rank 0 and all engines form a group, and another one when an engine is new or the last one broke."""

    way = "broadcast"

    def __init__(
        self, seats: Sequence[Seat], dtype: wire.DType, host: str, seconds: float, world: dist.World
    ) -> None:
        super().__init__(seats, dtype, host, seconds, world)
        self._store = open_store(host, seconds) if world.is_main else None
        self._group: WeightGroup | None = None
        self._failure: TransferError | None = None
        self._name = ""
        """Of the group that all are in, the same on every rank; empty where there is none."""

    def _prepare(self) -> None:
        held: list[str] = []
        # Dead engines start again here, with the old weights: the group is whole before any data flows.
        dist.together(lambda: held.extend(seat.group() for seat in self.seats), self.world)
        everyones = {name for each in dist.gathered(held, self.world) for name in each}
        if not self._name or everyones != {self._name}:
            self._form()

    def _form(self) -> None:
        self._leave()
        port = self._store.port if self._store is not None else 0
        offers = dist.gathered((secrets.token_hex(4), port, len(self.seats)), self.world)
        name, port, _ = offers[0]
        counts = [count for _, _, count in offers]
        first = 1 + sum(counts[: self.world.rank])
        join = wire.Join(
            name=name, host=self.host, port=port, rank=0, size=1 + sum(counts), seconds=self.seconds
        )
        ranks = {seat.name: first + i for i, seat in enumerate(self.seats)}

        def ask(seat: Seat) -> None:
            seat.client.join(join.model_copy(update={"rank": ranks[seat.name]}))

        with _calling(self.seats, ask) as outcomes:
            self._try(lambda: self._enter(join))
            found = self._with_own_failure(outcomes())
        self._name = name if self._all_well(found, "forming a group for weights") else ""

    def _enter(self, join: wire.Join) -> None:
        if self._store is not None:
            self._group = WeightGroup(join, self.world.device, self._store)

    def _pass(self, named: Named, version: int) -> dict[str, Outcome]:
        message = wire.Publish(
            version=version, transport="broadcast", place=self._name, seconds=self.seconds
        )

        def publish(seat: Seat) -> dict[str, int]:
            return seat.client.publish(message, extra=self.seconds)

        # Without a group everyone gets the spare copy.
        with _calling(self.seats if self._name else [], publish) as outcomes:
            problem = use_up(named, self._stream)
            if problem is not None:
                self._leave()
            found = outcomes()
        raise_together(problem, self.world)
        return self._with_own_failure(found)

    def _stream(self, rest: Iterator[tuple[str, Tensor]]) -> None:
        """Rank 0. The spare copy becomes whole even where the group breaks."""
        if self._spare is None:
            return
        for bucket in buckets(rest, self.dtype):
            self._spare.keep(bucket)
            self._try(lambda bucket=bucket: self._group and self._group.send(bucket))
        self._try(lambda: self._group and self._group.end())

    def _all_well(self, outcomes: dict[str, Outcome], call: str) -> bool:
        """A group that lost a member is over, on every rank."""
        well = super()._all_well(outcomes, call)
        if not well:
            self._leave()
            self._name = ""
        return well

    def _try(self, action: Callable[[], Any]) -> None:
        """Once something failed nothing more is sent, and the engines' calls end."""
        try:
            action()
        except TransferError as error:
            self._failure = error
            self._leave()

    def _with_own_failure(self, outcomes: dict[str, Outcome]) -> dict[str, Outcome]:
        failure, self._failure = self._failure, None
        return outcomes | ({"": failure} if failure is not None else {})

    def _leave(self) -> None:
        group, self._group = self._group, None
        if group is not None:
            group.close()

    def close(self) -> None:
        self._leave()
        super().close()


class IPCPublisher(LivePublisher):
    """Every rank hands its own engine handles of one bucket after the other. Not yet run on a GPU."""

    way = "ipc"

    def _prepare(self) -> None:
        dist.barrier(self.world)

    def _pass(self, named: Named, version: int) -> dict[str, Outcome]:
        outcomes: dict[str, Outcome] = {}

        def share(rest: Iterator[tuple[str, Tensor]]) -> None:
            first = True
            for bucket in buckets(rest, self.dtype):
                if self._spare is not None:
                    self._spare.keep(bucket)
                self._hand(bucket, first, version, outcomes)
                first = False
            self._hand(None, first, version, outcomes)

        raise_together(use_up(named, share), self.world)
        cuda_ipc.released()
        return outcomes

    def _hand(
        self, bucket: Bucket | None, first: bool, version: int, outcomes: dict[str, Outcome]
    ) -> None:
        """A bucket, or the end, to the engines that have everything before it."""
        for seat in self.seats:
            if isinstance(outcomes.get(seat.name), RuntimeError):
                continue
            message = wire.Publish(
                version=version, transport="ipc", seconds=self.seconds, first=first, last=bucket is None,
                bucket=bucket.header if bucket else None,
                handle=cuda_ipc.shared(bucket.payload) if bucket else None,
            )  # fmt: skip
            try:
                outcomes[seat.name] = seat.client.publish(message)
            except (EngineDownError, RefusedError) as error:
                outcomes[seat.name] = error


@contextmanager
def _calling(
    seats: Sequence[Seat], call: Callable[[Seat], dict[str, int] | None]
) -> Iterator[Callable[[], dict[str, Outcome]]]:
    """Call all engines at once, each in a thread of its own, while the caller does its part; then have the outcomes."""
    with ThreadPoolExecutor(max(1, len(seats)), thread_name_prefix="weights") as pool:
        futures = {seat.name: pool.submit(call, seat) for seat in seats}
        yield lambda: {name: _outcome(future) for name, future in futures.items()}


def _said(error: RuntimeError) -> str:
    """Engines' errors say where they are from."""
    own = isinstance(error, TransferError)
    return f"{type(error).__name__}: {error}" if own else str(error)


def _outcome(future: Future) -> Outcome:
    error = future.exception()
    if isinstance(error, EngineDownError | RefusedError):
        return error
    return future.result() or {}
