"""A run that is killed and started again until it ends, as often as kills are wanted, and what became of it."""

import json
import random
import signal
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lives import Life

from rlpt.console import Report

CODES = {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}
"""How a process ends that was told to."""
SIGNALS = {signal.SIGKILL: 3, signal.SIGTERM: 1, signal.SIGINT: 1}
"""And how often each is drawn."""
HANG_SECONDS = 60.0
"""Of the watchdog in every run here; a life that lasts twice as long was not ended by it."""


@dataclass(frozen=True)
class Fault:
    """A signal that one rank gets ``delay`` seconds after the ``nth`` time that it enters the phase."""

    phase: str
    nth: int
    delay: float
    signal: int
    rank: int = 0
    victim: str = "trainer"

    @property
    def label(self) -> str:
        return f"{self.phase} {signal.Signals(self.signal).name}"


@dataclass
class Tally:
    """What became of the kills of an arm."""

    arm: str
    kills: Counter[str] = field(default_factory=Counter)
    """By phase and signal."""
    runs: int = 0
    resumed_equal: int = 0
    resumed_otherwise: int = 0
    hangs: int = 0
    orphans: int = 0
    doubled: int = 0
    lost: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def count(self) -> int:
        return sum(self.kills.values())

    def row(self) -> dict[str, Any]:
        """For a table."""
        by_phase = dict(sorted(self.kills.items()))
        return asdict(self) | {"kills": self.count, "by_phase": by_phase}


class Trial(ABC):
    """One arm, in a folder of its own."""

    def __init__(self, name: str, folder: Path, seed: int) -> None:
        self.folder = folder / "".join(c if c.isalnum() else "_" for c in name)
        self.folder.mkdir(parents=True)
        self.draw = random.Random(f"{seed} {name}")
        self.tally = Tally(name)

    def run(self, kills: int, report: Report) -> Tally:
        """As many kills, in as many runs as they take."""
        self.undisturbed()
        while self.tally.count < kills:
            self.tally.runs += 1
            name, before = f"run{self.tally.runs}", self.tally.count
            while self._lived(name, self.fault() if self.tally.count < kills else None):
                report(self.tally.count, f"{self.tally.arm}, {name}")
            wrong = self.differences(name)
            if wrong:
                self.tally.resumed_otherwise += self.tally.count - before
            else:
                self.tally.resumed_equal += self.tally.count - before
            self.tally.problems += [f"{name}: {each}" for each in wrong]
        return self.tally

    def _lived(self, name: str, fault: Fault | None) -> bool:
        """Whether a life was cut short: there must be another."""
        life = self.life(name, fault)
        self.tally.hangs += life.hung
        self.tally.orphans += life.orphans
        if fault is not None and self.struck(life, fault, name):
            self.tally.kills[fault.label] += 1
        elif life.code != 0:
            raise SystemExit(f"{self.folder / name}: ended with {life.code}; read {self.log(name)}")
        return life.code != 0

    def struck(self, life: Life, fault: Fault, name: str) -> bool:
        """Whether the life ended as that signal ends one."""
        return life.code == CODES[signal.Signals(fault.signal)]

    def drawn_signal(self) -> int:
        return int(self.draw.choices([*SIGNALS], [*SIGNALS.values()])[0])

    def log(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    @staticmethod
    def environment(fault: Fault | None) -> dict[str, str]:
        return {} if fault is None else {"RLPT_FAULT": json.dumps(asdict(fault))}

    @abstractmethod
    def undisturbed(self) -> None:
        """Run once, and keep what it left behind."""

    @abstractmethod
    def fault(self) -> Fault: ...

    @abstractmethod
    def life(self, name: str, fault: Fault | None) -> Life: ...

    @abstractmethod
    def differences(self, name: str) -> Sequence[str]:
        """What a run that ended has other than the undisturbed one."""
