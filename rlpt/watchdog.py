"""Ends a run that hangs, and says which rank in which phase of which step, with the stacks of all threads.

Each rank has a thread that looks at `rlpt.phases.CLOCK` and tells the others through the store of the process group.
The first to be late makes all of them write their stacks; then they end together. A rank that is stopped cannot speak
for itself: the others name it. Where native code holds the interpreter so that this thread cannot run either,
faulthandler's own one, which needs no interpreter, ends the process.
"""

import contextlib
import faulthandler
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NoReturn

from torch.distributed import Store

from rlpt import dist
from rlpt.exits import FAULT, end_now
from rlpt.phases import CLOCK
from rlpt_data.stderr import tell

_MOST_SECONDS = 1.0
"""Between two looks."""
_LATE = "late"
"""Key of the store that the first late rank sets."""


@dataclass(frozen=True)
class Standing:
    """Where a rank stands, as it last told."""

    rank: int
    phase: str = "start"
    step: int = 0
    entered: int = -1
    idle: float = 0.0
    """Seconds since it went on."""
    answers: bool = False
    """Whether it told so after it was asked, so that its process runs."""
    host: str = ""
    pid: int = 0


@contextmanager
def watched(seconds: float, run_dir: Path, world: dist.World) -> Iterator[None]:
    """End the process where it does not go on for ``seconds`` in here; 0: watch nothing."""
    if not seconds:
        yield
        return
    CLOCK.beat()
    watchdog = Watchdog(seconds, run_dir, world, dist.own_store(world))
    try:
        # Both before the first look: this process may be stopped, or native code hold the interpreter, from then on,
        # and the others can end only a process that has told its number.
        watchdog.arm()
        watchdog.others_are_late()
        watchdog.thread.start()
        yield
    finally:
        watchdog.done.set()
        if watchdog.thread.is_alive():
            watchdog.thread.join()
        faulthandler.cancel_dump_traceback_later()


@dataclass
class Watchdog:
    seconds: float
    run_dir: Path
    world: dist.World
    store: Store | None
    """None for a rank that is alone."""
    done: threading.Event = field(default_factory=threading.Event)
    lost: bool = False
    """Whether the store has been out of reach."""

    def __post_init__(self) -> None:
        self.every = min(_MOST_SECONDS, self.seconds / 4)
        self.thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def arm(self) -> None:
        """Faulthandler's own thread ends the process beyond what a hang takes where ours can speak."""
        faulthandler.dump_traceback_later(self.seconds + 4 * self.every + 3, exit=True, file=2)

    def _watch(self) -> None:
        while not self.done.wait(self.every):
            self.arm()
            late = self.standing().idle >= self.seconds
            if self.others_are_late() or late:
                self._end()

    def others_are_late(self) -> bool:
        """Tell the other ranks where this one stands; whether one of them has found itself late."""
        try:
            self._tell(answers=False)
            return self.store is not None and self.store.check([_LATE])
        except RuntimeError as error:
            if not self.lost:
                tell(f"watchdog: other ranks cannot be asked: {error}")
            self.lost = True
            return False

    def standing(self, answers: bool = False) -> Standing:
        idle = time.monotonic() - CLOCK.since
        return Standing(
            *(self.world.rank, CLOCK.phase, CLOCK.step + 1, CLOCK.entered, idle, answers),
            *(socket.gethostname(), os.getpid()),
        )

    def _tell(self, answers: bool) -> None:
        if self.store is not None:
            self.store.set(str(self.world.rank), json.dumps(asdict(self.standing(answers))))

    def _end(self) -> NoReturn:
        path = self.run_dir / f"stacks_rank{self.world.rank}.txt"
        faulthandler.dump_traceback(2)
        # It may be this very filesystem that hangs.
        writer = threading.Thread(target=_write_stacks, args=(path,), daemon=True)
        writer.start()
        writer.join(_MOST_SECONDS)
        standings = [self.standing(answers=True)]
        if self.store is not None:
            try:
                standings = self._asked(self.store)
            except RuntimeError as error:
                tell(f"watchdog: other ranks cannot be asked: {error}")
        first = min(standing.rank for standing in standings if standing.answers)
        line = f"{self.run_dir}: {verdict(standings, self.seconds)}"
        self._end_silent(standings)
        end_now(line if first == self.world.rank else f"ended with the others: {path}", FAULT)

    def _asked(self, store: Store) -> list[Standing]:
        """How all ranks stand, once they have answered or had the time for it."""
        self._tell(answers=True)
        store.set(_LATE, "")
        deadline = time.monotonic() + 2 * self.every + 1
        while True:
            found = told(store, self.world.size)
            if all(one.answers for one in found) or time.monotonic() > deadline:
                return found
            time.sleep(0.1)

    def _end_silent(self, standings: Sequence[Standing]) -> None:
        """A stopped process takes no SIGTERM, and torchrun would wait for it before it restarts the others."""
        for standing in standings:
            if not standing.answers and standing.host == socket.gethostname():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(standing.pid, signal.SIGKILL)


def told(store: Store, ranks: int) -> list[Standing]:
    """What every rank last told; in one question where all have, as every rank of a large run asks them."""
    keys = [str(rank) for rank in range(ranks)]
    if store.check(keys):
        return [Standing(**json.loads(each)) for each in store.multi_get(keys)]
    return [
        Standing(**json.loads(store.get(key))) if store.check([key]) else Standing(rank)
        for rank, key in enumerate(keys)
    ]


def _write_stacks(path: Path) -> None:
    with contextlib.suppress(OSError), path.open("w") as file:
        faulthandler.dump_traceback(file)


def verdict(standings: Sequence[Standing], seconds: float) -> str:
    """Which rank the others wait for: of those that came least far one that does not answer, or else all of them."""
    least = min(standing.entered for standing in standings)
    behind = [standing for standing in standings if standing.entered == least]
    silent = [standing for standing in behind if not standing.answers]
    others = [standing for standing in standings if standing.answers and standing not in behind]
    named = f"rank {_listed(silent or behind)}"
    if silent:
        said = f"{named}, last heard of in {_place(silent[0])}, is silent for {seconds:.0f} s or longer"
    else:
        idle = max(standing.idle for standing in behind)
        said = f"{named} did not go on for {idle:.0f} s in {_place(behind[0])}"
    waiting = f"; waiting in {_place(others[0])}: rank {_listed(others)}" if others else ""
    return (
        f"{said}{waiting} (supervision.hang_seconds = {seconds:g}); the stacks are in stacks_rank*.txt there, and the "
        "last checkpoint is kept: repeat the command to go on from it"
    )


def _place(standing: Standing) -> str:
    return f"phase {standing.phase} of step {standing.step}"


def _listed(standings: Sequence[Standing]) -> str:
    return ", ".join(str(standing.rank) for standing in standings)
