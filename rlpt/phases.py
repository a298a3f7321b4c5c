"""What this process is doing, for whoever must say so from outside: the watchdog, a message about a signal.

Every rank walks through the same phases and joins the same collectives in the same order, so of several ranks the one
that has entered the fewest is the one the others wait for.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

Phase = Literal["start", "generate", "score", "update", "publish", "save", "evaluate"]


@dataclass
class Clock:
    """Where this process stands."""

    phases: list[Phase] = field(default_factory=lambda: ["start"])
    """Those it is in, the innermost last."""
    entered: int = 0
    """Phases begun or left and collectives of `rlpt.dist` joined since the process started."""
    step: int = 0
    """Optimiser steps done."""
    since: float = field(default_factory=time.monotonic)
    """When it last went on: seconds that no change of the wall clock moves."""

    @property
    def phase(self) -> Phase:
        return self.phases[-1]

    def beat(self) -> None:
        """It is alive and has gone on, by work that other ranks may have more or less of."""
        self.since = time.monotonic()

    def enter(self) -> None:
        """It has come to where every rank comes."""
        self.entered += 1
        self.beat()


CLOCK = Clock()


@contextmanager
def phase(name: Phase) -> Iterator[None]:
    """Be in a phase; back in the one before afterwards, also where an error ends it."""
    CLOCK.phases.append(name)
    CLOCK.enter()
    try:
        yield
    finally:
        CLOCK.phases.pop()
        CLOCK.enter()
