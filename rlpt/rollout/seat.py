"""One engine as a trainer rank sees it: its process or address, what it was asked, and what to do when it dies."""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from rlpt.console import say
from rlpt.exits import FaultError
from rlpt.phases import CLOCK
from rlpt.rollout.client import EngineClient, EngineDownError
from rlpt.rollout.process import EngineProcess
from rlpt.rollout.wire import EngineSpec, Finished, Job, Publish
from rlpt_data.strict import UserError

MOST_IN_VAIN = 5
"""Restarts without a token or a publication between them: the next would be no better."""


@dataclass
class Seat:
    """An engine with its work. `process` is absent for engines that were started by someone else."""

    name: str
    spec: EngineSpec
    client: EngineClient
    process: EngineProcess | None
    start_seconds: float
    max_restarts: int
    publishes: bool = True
    """Whether this rank sends the weights; of several ranks at one engine, one does."""
    outstanding: dict[str, Job] = field(default_factory=dict)
    weights: Publish | None = None
    """The publication that a restarted engine gets."""
    restarts: int = 0
    _vain: int = 0
    """Restarts since it last did anything."""
    _arrived: list[str] = field(default_factory=list)
    _latest: dict[str, float] = field(default_factory=dict)
    _bygone: dict[str, float] = field(default_factory=dict)
    _steps: int = -1
    _progress: float = field(default_factory=time.monotonic)

    # ---- start ---------------------------------------------------------------------------------

    def open(self) -> None:
        """Wait until the engine is there, and make sure that it runs this policy. Raises UserError."""
        try:
            if self.process is not None:
                self.process.wait()
                self.client.address = self.process.address
            self._check()
            self.client.forget()
        except RuntimeError as error:
            # Before the run has begun: what has to change stands in the configuration.
            raise UserError(str(error)) from error

    def _check(self) -> None:
        try:
            spec, _ = self.client.describe()
        except EngineDownError as error:
            raise UserError(
                f"{error}; start it (`rlpt engine CONFIG`), or correct engine.vllm.addresses"
            ) from error
        if (difference := self.spec.differs(spec)) is not None:
            raise UserError(
                f"engine {self.client.address}: runs another policy: {difference}; start it with this run's config"
            )

    # ---- work ----------------------------------------------------------------------------------

    @property
    def load(self) -> int:
        """Tokens that it was asked to write and has not."""
        return sum(job.count * (job.budget + job.prediction) for job in self.outstanding.values())

    def submit(self, jobs: Sequence[Job]) -> None:
        if not self.outstanding:
            self._progress = time.monotonic()
        self.outstanding |= {job.ticket: job for job in jobs}
        self._or_revive(lambda: self.client.submit(jobs))

    def poll(self, wait: float) -> list[Finished]:
        """Groups that have arrived; each once, whatever happened to the engine meanwhile."""
        done, steps = [], self._steps
        try:
            done, steps = self.client.collect(self._arrived, wait)
        except EngineDownError as error:
            self.revive(str(error))
        self._arrived = [one.ticket for one in done]
        new = [one for one in done if self.outstanding.pop(one.ticket, None) is not None]
        self._watch(steps, bool(new))
        return new

    def _watch(self, steps: int, arrived: bool) -> None:
        """An engine whose threads answer while its model stands still is dead, too."""
        now = time.monotonic()
        if steps != self._steps or arrived:
            self._vain = 0
            CLOCK.beat()
        if steps != self._steps or arrived or not self.outstanding:
            self._steps, self._progress = steps, now
        elif now - self._progress > self.client.timeout:
            self.revive(f"engine {self.client.address}: no new token for {self.client.timeout:g} s")

    def counters(self) -> dict[str, float]:
        """Cumulative over all lives of the engine."""
        try:
            self._latest = self.client.counters()
        except EngineDownError as error:
            self.revive(str(error))
        return _added(self._bygone, self._latest)

    # ---- weights -------------------------------------------------------------------------------

    def group(self) -> str:
        """The group that its engine gets weights through; a dead one is started again, and is in none."""
        try:
            return self.client.group()
        except EngineDownError as error:
            self.revive(str(error))
            return ""

    def publish(self, message: Publish, found: dict[str, int] | None = None) -> None:
        """Send new weights and compare checksums, or compare those that the engine ``found``, if it has the weights.

        Raises RuntimeError naming the tensor that differs.
        """
        self.weights = message
        # While weights were on their way the engine made no step, and was not asked to.
        self._progress = time.monotonic()
        if found is not None:
            return self._compare(message, found)
        self._or_revive(lambda: self._deliver(message))
        self._vain = 0

    def _deliver(self, message: Publish) -> None:
        self._compare(message, self.client.publish(message))

    def _compare(self, message: Publish, found: dict[str, int]) -> None:
        wrong = [t for t in message.tensors if found.get(t.name) != t.checksum]
        if wrong:
            first = wrong[0]
            raise FaultError(
                f"engine {self.client.address}, call publish, version {message.version}: tensor {first.name} has "
                f"checksum {found.get(first.name)}, the trainer's has {first.checksum} ({len(wrong)} of "
                f"{len(message.tensors)} tensors differ)"
            )

    def rest(self) -> None:
        """Give its memory back until the next publication, even where it has to be started again for that."""
        try:
            self.client.sleep()
        except EngineDownError as error:
            self.revive(str(error))
            self.client.sleep()

    # ---- death ---------------------------------------------------------------------------------

    def _or_revive(self, call: Callable[[], None]) -> None:
        """A call whose effect `revive` has, too."""
        try:
            call()
        except EngineDownError as error:
            self.revive(str(error))

    def revive(self, reason: str) -> None:
        """Start the engine again, with the current weights and everything it still owes."""
        while True:
            self.restarts, self._vain = self.restarts + 1, self._vain + 1
            if self._vain > MOST_IN_VAIN:
                raise FaultError(
                    f"{reason}; it was started again {MOST_IN_VAIN} times without doing anything: see its "
                    f"log; where it is only slow, raise engine.vllm.timeout_seconds = {self.client.timeout:g}"
                )
            if self.restarts > self.max_restarts:
                raise FaultError(
                    f"{reason}; it was restarted {self.max_restarts} times (engine.vllm.max_restarts)"
                )
            say(f"{self.name}: {reason}; starting it again")
            try:
                return self._again()
            except EngineDownError as error:
                reason = str(error)

    def _again(self) -> None:
        self.client.close()
        self._bygone, self._latest = _added(self._bygone, self._latest), {}
        if self.process is not None:
            self.process.kill()
            self.process.start()
            self.process.wait()
            self.client.address = self.process.address
        else:
            self._until_back()
        self._arrived, self._steps, self._progress = [], -1, time.monotonic()
        self.client.forget()
        if self.weights is not None and (
            self.publishes or self.client.describe()[1] != self.weights.version
        ):
            self._deliver(self.weights)
        if self.outstanding:
            self.client.submit(list(self.outstanding.values()))

    def _until_back(self) -> None:
        """Somebody else restarts it: wait, within bounds."""
        deadline = time.monotonic() + self.start_seconds
        while True:
            try:
                self.client.describe()
                return
            except EngineDownError as error:
                if time.monotonic() > deadline:
                    raise FaultError(
                        f"{error}; it did not come back within {self.start_seconds:g} s (engine.vllm.start_seconds)"
                    ) from error
                time.sleep(1.0)

    def cancel(self, tickets: Iterable[str]) -> None:
        """Nobody waits for these any more."""
        mine = [ticket for ticket in tickets if self.outstanding.pop(ticket, None) is not None]
        if mine:
            self._or_revive(lambda: self.client.cancel(mine))

    def close(self) -> None:
        if self.process is None:
            self._leave()
        else:
            self.process.stop()
        self.client.close()

    def _leave(self) -> None:
        """An engine that stays is told that nobody waits for its work."""
        try:
            self.client.forget()
        except RuntimeError:
            say(f"{self.name}: gone before the run ended")


def _added(one: dict[str, float], other: dict[str, float]) -> dict[str, float]:
    return {name: one.get(name, 0.0) + other.get(name, 0.0) for name in one.keys() | other.keys()}
