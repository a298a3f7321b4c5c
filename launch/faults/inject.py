"""`rlpt`, with a signal that it sends itself at one point of its life: the processes that kills.py starts and loses.

    RLPT_FAULT='{"rank": 0, "phase": "save", "nth": 3, "delay": 0.02, "signal": 9}' \\
        python launch/faults/inject.py train CONFIG

The signal comes ``delay`` seconds after the ``nth`` time that the rank enters the phase, from a thread of its own: in
the middle of whatever the rank does then. With RLPT_PHASES=FILE the phases and their seconds are written there.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil

from rlpt.cli import main as command_line
from rlpt.phases import CLOCK, Phase

Entered = Callable[[Phase], None]


class Observed(list[Phase]):
    """The phases a process is in; tells of every one that it enters, and how long each took."""

    def __init__(self, phases: Sequence[Phase], entered: Entered) -> None:
        super().__init__(phases)
        self.tell = entered
        self.since: list[float] = [time.monotonic()]
        self.took: list[tuple[Phase, float]] = []

    def append(self, name: Phase, /) -> None:
        self.since.append(time.monotonic())
        super().append(name)
        self.tell(name)

    def pop(self, *_: Any) -> Phase:
        name = super().pop()
        self.took.append((name, time.monotonic() - self.since.pop()))
        return name


def killer(fault: dict[str, Any]) -> Entered:
    """Counts the phase down, then arms the timer. Of several ranks only the one that is meant."""
    left = [fault["nth"]] if fault["rank"] == int(os.environ.get("RANK", "0")) else [0]

    def entered(name: Phase) -> None:
        left[0] -= name == fault["phase"]
        if left[0] == 0 and name == fault["phase"]:
            arm(fault)

    return entered


def arm(fault: dict[str, Any]) -> None:
    """Start the time that is left."""
    timer = threading.Timer(fault["delay"], strike, (fault,))
    timer.daemon = True
    timer.start()


def strike(fault: dict[str, Any]) -> None:
    """The signal, to this process or to an engine that it started."""
    if fault["victim"] == "trainer":
        os.kill(os.getpid(), fault["signal"])
        return
    for child in psutil.Process().children(recursive=True):
        if "rlpt.rollout.serve" in " ".join(child.cmdline()):
            child.send_signal(fault["signal"])


def rlpt(words: Sequence[str]) -> None:
    """The command with its fault; ends the process as the command does. A fault at time 0 of no phase is armed now."""
    fault = json.loads(os.environ.get("RLPT_FAULT", "null"))
    observed = Observed(CLOCK.phases, killer(fault) if fault else lambda _name: None)
    CLOCK.phases = observed
    if fault and not fault["nth"]:
        arm(fault)
    try:
        command_line(words)
    finally:
        if path := os.environ.get("RLPT_PHASES"):
            Path(path).write_text(json.dumps(observed.took))


if __name__ == "__main__":
    rlpt(sys.argv[1:])
