"""Targets, each a reader with valid inputs, and what becomes of inputs that are none.

A reader accepts, or refuses with a `UserError` of one line. Anything else is a crash, and so is an input that takes
longer than `LONGEST`. Input n of a target is a function of (seed, name, n): a crash is found again by its number.
"""

import random
import resource
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

from mutations import Mutate

from rlpt_data.strict import UserError

LONGEST = 10.0
"""Seconds that one input may take."""


class HangError(Exception):
    """An input took too long."""


@dataclass(frozen=True)
class Target:
    """One reader. ``read`` returns for what it accepts."""

    name: str
    read: Callable[[bytes], object]
    samples: Sequence[bytes]
    """Valid inputs: `read` accepts each."""
    mutate: Mutate
    refusals: tuple[type[Exception], ...] = (UserError,)
    """What a reader refuses with."""


@dataclass
class Found:
    """What became of the inputs of one target."""

    name: str
    inputs: int = 0
    accepted: int = 0
    rejected: int = 0
    seconds: float = 0.0
    slowest: float = 0.0
    """Seconds of one input."""
    grown_mib: float = 0.0
    """By how much the most memory of the process rose."""
    errors: Counter[str] = field(default_factory=Counter)
    """Refusals by where they were raised, and from what."""
    crashes: dict[str, tuple[int, bytes, str]] = field(default_factory=dict)
    """By where they were raised: number and bytes of the first such input, and its traceback."""
    crashed: int = 0
    refused: list[bytes] = field(default_factory=list)
    """Some inputs that were rejected."""

    def row(self) -> dict[str, Any]:
        """For the table and the file of results."""
        return {
            "target": self.name,
            "inputs": self.inputs,
            "rejected": self.rejected,
            "accepted": self.accepted,
            "seconds": round(self.seconds, 1),
            "slowest_ms": round(1000 * self.slowest, 1),
            "memory_grown_mib": round(self.grown_mib, 1),
            "distinct_errors": len(self.errors),
            "crashes": self.crashed,
        }


def input_of(target: Target, seed: int, number: int) -> bytes:
    """The same for the same arguments, on every machine."""
    return target.mutate(random.Random(f"{seed} {target.name} {number}"), target.samples)


def fuzz(target: Target, numbers: Iterable[int], seed: int = 0, kept: int = 0) -> Found:
    """Feed it the inputs of these numbers; ``kept`` rejected ones are remembered."""
    for sample in target.samples:
        target.read(sample)
    found, memory, started = Found(target.name), _peak_mib(), time.perf_counter()
    before = signal.signal(signal.SIGALRM, _too_long)
    try:
        for number in numbers:
            _one(target, input_of(target, seed, number), number, found, kept)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    found.seconds, found.grown_mib = time.perf_counter() - started, _peak_mib() - memory
    return found


def _one(target: Target, data: bytes, number: int, found: Found, kept: int) -> None:
    found.inputs += 1
    signal.setitimer(signal.ITIMER_REAL, LONGEST)
    started = time.perf_counter()
    try:
        target.read(data)
        found.accepted += 1
    except target.refusals as error:
        found.rejected += 1
        found.errors[f"{_place(error)} {type(error.__cause__).__name__}"] += 1
        if len(found.refused) < kept and not number % 7:
            found.refused.append(data)
    except Exception as error:
        found.crashed += 1
        told = traceback.format_exc()
        found.crashes.setdefault(f"{type(error).__name__} {_place(error)}", (number, data, told))
    signal.setitimer(signal.ITIMER_REAL, 0)
    found.slowest = max(found.slowest, time.perf_counter() - started)


def _place(error: BaseException) -> str:
    """File and line of the innermost frame of ours."""
    here, place = error.__traceback__, "?"
    while here is not None:
        name = here.tb_frame.f_code.co_filename
        if "/rlpt" in name and "site-packages" not in name:
            place = f"{name[name.rindex('/rlpt') + 1 :]}:{here.tb_lineno}"
        here = here.tb_next
    return place


def _too_long(_signal: int, _frame: FrameType | None) -> None:
    raise HangError(f"more than {LONGEST} s")


def _peak_mib() -> float:
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / (1 << 20 if sys.platform == "darwin" else 1 << 10)
