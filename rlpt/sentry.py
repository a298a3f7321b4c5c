"""Every step's numbers, held against the limits of [mismatch] and [guards] on their way into metrics.jsonl.

All ranks hold the same numbers against the same limits and so end alike. What is remembered of earlier steps is read
back from the journals: they are a part of every checkpoint, so a run that was cut off decides as one that was not.
"""

import math
from collections import deque
from dataclasses import dataclass, field

from rlpt import alarms, guards
from rlpt.config import RunConfig
from rlpt.console import say
from rlpt.dist import World
from rlpt.exits import FaultError
from rlpt.runlog import RunLog, read_journal
from rlpt.update import Stepped, reduced


@dataclass
class Sentry:
    """Of one run, on every rank."""

    cfg: RunConfig
    world: World
    log: RunLog
    dtype: str
    """The coarser one of policy and engine."""
    recent: deque[alarms.Row] = field(default_factory=lambda: deque(maxlen=alarms.MEMORY))
    """The last lines of metrics.jsonl."""
    evaluation: dict[str, float] = field(default_factory=dict)
    """`watch/*` of the newest evaluation, which stand in every line until the next one."""
    warned: set[str] = field(default_factory=set)
    """Metrics that a warning was said of."""

    def recall(self) -> None:
        """Take up where the journals of the run end."""
        self.recent.extend(read_journal(self.cfg.run_dir / "metrics.jsonl")[-alarms.MEMORY :])
        for row in read_journal(self.cfg.run_dir / "evaluations.jsonl")[-1:]:
            self.evaluation = alarms.of_evaluation(row["summary"])

    def evaluated(self, stage: str, step: int, summary: alarms.Row) -> None:
        """Note what an evaluation says of the controls, and warn of it."""
        self.evaluation = alarms.of_evaluation(summary)
        warnings, _ = alarms.verdict([self.evaluation], self.cfg.guards)
        self._warn(stage, step, warnings)

    def step(
        self, stage: str, step: int, stepped: Stepped, values: dict[str, float]
    ) -> dict[str, float]:
        """Sums and extremes over ranks, one line of metrics.jsonl. Raises FaultError where a limit that ends a run is
        exceeded. The line of a step that was skipped has the numbers that are finite; the engine is not judged by it.
        """
        means = reduced(stepped.sums, stepped.extremes, self.world) | values
        means["update/skipped"] = float(bool(stepped.skipped))
        if stepped.skipped:
            means = {name: value for name, value in means.items() if math.isfinite(value)}
            what = "; ".join(stepped.skipped)
            self._say(stage, step, f"skipped, nothing was trained on: {what}")
        means |= self.evaluation | alarms.watched(self.recent, {"stage": stage, **means})
        warnings, halts = self._judged(stage, stepped, means)
        self.log.metrics(step, stage, means)
        self.recent.append({"step": step, "stage": stage, **means})
        self._warn(stage, step, warnings)
        if halts:
            why = "; ".join(halts.values())
            raise FaultError(f"{self._where(stage, step)}: {why}; the last checkpoint is kept")
        return means

    def _warn(self, stage: str, step: int, warnings: dict[str, str]) -> None:
        """Once a run of every metric."""
        for name, line in warnings.items():
            if name not in self.warned:
                self._say(stage, step, line)
        self.warned |= warnings.keys()

    def _say(self, stage: str, step: int, line: str) -> None:
        say(f"{self._where(stage, step)}: {line}", self.world.is_main)

    def _where(self, stage: str, step: int) -> str:
        return f"{self.cfg.run_dir}, stage {stage}, step {step}"

    def _judged(
        self, stage: str, stepped: Stepped, means: dict[str, float]
    ) -> tuple[dict[str, str], dict[str, str]]:
        """Warnings and what ends the run, by metric; how many warnings there are is noted among the means."""
        warnings, halts = alarms.verdict([*self.recent, {"stage": stage, **means}], self.cfg.guards)
        means["watch/warnings"] = float(len(warnings))
        if stepped.extremes and not stepped.skipped:
            of_engine, ending = guards.verdict(means, self.cfg.mismatch, self.dtype)
            means["mismatch/warnings"] = float(len(of_engine))
            warnings, halts = of_engine | warnings, ending | halts
        return warnings, halts
