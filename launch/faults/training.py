"""Training runs that are killed: on one rank, on several, on other ones each time, with engines of their own."""

import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from evidence import Evidence, differences, doubled_or_lost, evidence, far
from lives import Life, forked, launched
from trial import HANG_SECONDS, Fault, Trial

CONFIG = Path(__file__).with_name("tiny.toml")
STEPS = 20
TOLERANCE = 1e-5
"""Of losses where the number of ranks changes: sums are added in another order."""


class TrainingTrial(Trial):
    """``ranks``: one of them is drawn for every life; the undisturbed run has the first."""

    def __init__(
        self,
        name: str,
        folder: Path,
        seed: int,
        shards: Path,
        ranks: tuple[int, ...] = (1,),
        settings: Sequence[str] = (),
    ) -> None:
        super().__init__(name, folder, seed)
        self.shards = shards
        self.ranks = ranks
        self.settings = settings
        self.phases: dict[str, list[float]] = {}
        self.told: Counter[str] = Counter()
        self.whole: Evidence | None = None

    def undisturbed(self) -> None:
        path = self.folder / "phases.json"
        life = self._run("whole", self.ranks[0], {"RLPT_PHASES": str(path)})
        if life.code:
            raise SystemExit(
                f"{self.folder}/whole: ended with {life.code}; read {self.log('whole')}"
            )
        for name, seconds in json.loads(path.read_text()):
            self.phases.setdefault(name, []).append(seconds)
        self.whole = evidence(self.folder / "whole", STEPS)

    def fault(self) -> Fault:
        """A phase, one of the first times that it is entered, and a moment up to twice as late as that one lasts: what
        it started may go on behind it."""
        phase = self.draw.choice(sorted(self.phases))
        first = self.phases[phase][: math.ceil(len(self.phases[phase]) / 4)]
        nth = self.draw.randint(1, len(first))
        return Fault(
            phase,
            nth=nth,
            delay=self.draw.uniform(0.0, 2 * first[nth - 1]),
            signal=self.drawn_signal(),
            rank=self.draw.randrange(max(self.ranks)),
        )

    def life(self, name: str, fault: Fault | None) -> Life:
        ranks = self.draw.choice(self.ranks)
        if fault is not None:
            # Of four ranks that were drawn there may be fewer in this life.
            fault = Fault(**{**vars(fault), "rank": fault.rank % ranks})
        return self._run(name, ranks, self.environment(fault))

    def _run(self, name: str, ranks: int, environment: dict[str, str]) -> Life:
        settings = (
            f"run_dir={self.folder / name}",
            f"data.shards={self.shards}",
            f"supervision.hang_seconds={HANG_SECONDS}",
            *self.settings,
        )
        words = ["train", str(CONFIG), *(word for each in settings for word in ("--set", each))]
        limit = 2 * HANG_SECONDS
        if ranks == 1:
            return forked(words, self.log(name), limit, environment=environment)
        return launched(words, self.log(name), limit, ranks, environment)

    def struck(self, life: Life, fault: Fault, name: str) -> bool:
        # torchrun says 1 whatever its ranks said.
        several = life.code == 1 and self.ranks != (1,)
        return several or super().struck(life, fault, name)

    def differences(self, name: str) -> Sequence[str]:
        assert self.whole is not None
        found = evidence(self.folder / name, STEPS)
        doubled, lost = doubled_or_lost(found.positions)
        before = doubled_or_lost(self.whole.positions)
        self.tally.doubled += doubled - before[0]
        self.tally.lost += lost - before[1]
        return self.compared(found, self.whole)

    def compared(self, found: Evidence, whole: Evidence) -> Sequence[str]:
        """Bit for bit, on one number of ranks."""
        if len(self.ranks) > 1:
            return far(found, whole, TOLERANCE)
        return differences(found, whole)


class EngineTrial(TrainingTrial):
    """With asynchronous vLLM engines: trainer and engine are killed in turn. Thoughts depend on when they were sampled,
    so what is compared is the account: every document of the stream trained once, in order."""

    def fault(self) -> Fault:
        fault = super().fault()
        if self.draw.random() < 0.5:
            return fault
        return Fault(**{**vars(fault), "victim": "engine", "signal": 9})

    def struck(self, life: Life, fault: Fault, name: str) -> bool:
        """An engine's death does not end the run: it is told in the log."""
        if fault.victim == "trainer":
            return super().struck(life, fault, name)
        before = self.told[name]
        self.told[name] = self.log(name).read_text(errors="replace").count("starting it again")
        return self.told[name] > before

    def compared(self, found: Evidence, whole: Evidence) -> Sequence[str]:
        return [] if found.positions == whole.positions else ["positions"]
