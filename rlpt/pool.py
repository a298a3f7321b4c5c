"""What of the stream is passed over: running ratings of documents and prompts, the same on every rank.

Groups are rated where they were sampled, ratings merged between two steps: whatever the number of ranks, the same
documents are asked for.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

from rlpt import dist
from rlpt.curriculum import DifficultyWindow, DynamicSampling
from rlpt.reward.base import Rewarded
from rlpt.types import Group, Sums, Trunk

Row = dict[str, Any]
PLACE = "rated"
"""What rows of a checkpoint that hold ratings say of their place."""


class Rating(NamedTuple):
    mean: float
    epoch: int
    """Of the newest group."""


class Mark(NamedTuple):
    """The mean reward of one group. In the order of the fields marks are merged."""

    epoch: int
    document: str
    cut: int
    mean: float


@dataclass
class Ratings:
    """Running means by name: rating <- decay x rating + (1 - decay) x mean of the newest group."""

    decay: float

    def __post_init__(self) -> None:
        self.known: dict[str, Rating] = {}

    def add(self, name: str, mean: float, epoch: int) -> None:
        before = self.known.get(name)
        if before is not None:
            mean = self.decay * before.mean + (1 - self.decay) * mean
        self.known[name] = Rating(mean, epoch)


class Pool:
    """Ratings of a stage, and what they say of a document that is due."""

    def __init__(
        self, sampling: DynamicSampling | None, window: DifficultyWindow | None, world: dist.World
    ) -> None:
        self.window = window
        self.retired_at = None if sampling is None else sampling.no_positive_resampling
        self.world = world
        decay = 0.5 if window is None else window.decay
        self.documents, self.prompts = Ratings(decay), Ratings(decay)
        self.marks: list[Mark] = []
        """Of this rank's groups since the last merge."""
        self.sorted_means: list[float] = []
        self.counts: Counter[str] = Counter()

    @property
    def looks(self) -> bool:
        """Whether anything is ever passed over."""
        return self.window is not None or self.retired_at is not None

    @property
    def longest_wait(self) -> int:
        """Epochs without a document after which none will come."""
        return 1 + (0 if self.window is None else self.window.review_every)

    def is_due(self, trunk: Trunk) -> bool:
        """Whether it may be asked for. What is passed over is counted."""
        left = len(self.left(trunk).cuts)
        self.counts["retired_cuts"] += len(trunk.cuts) - left
        reason = self._outside(trunk) if left else "retired"
        if reason is not None:
            self.counts[reason] += 1
        return reason is None

    def left(self, trunk: Trunk) -> Trunk:
        """The trunk with the cuts that are not retired."""
        cuts = tuple(cut for cut in trunk.cuts if not self._is_retired(trunk, cut))
        return trunk if cuts == trunk.cuts else replace(trunk, cuts=cuts)

    def _outside(self, trunk: Trunk) -> Literal["easy", "hard"] | None:
        known = self.documents.known.get(trunk.document)
        if self.window is None or known is None:
            return None
        value = self._signal(known.mean)
        if self.window.low <= value <= self.window.high:
            return None
        if trunk.epoch - known.epoch >= self.window.review_every:
            self.counts["reviewed"] += 1
            return None
        return "hard" if value < self.window.low else "easy"

    def _signal(self, mean: float) -> float:
        assert self.window is not None
        if self.window.signal == "pass_rate":
            return mean
        return bisect_left(self.sorted_means, mean) / max(1, len(self.sorted_means) - 1)

    def _is_retired(self, trunk: Trunk, cut: int) -> bool:
        known = self.prompts.known.get(_prompt(trunk.document, trunk.start + cut))
        return self.retired_at is not None and known is not None and known.mean >= self.retired_at

    def rate(
        self, groups: Sequence[Group], rewarded: Rewarded, first: Sequence[bool] | None = None
    ) -> None:
        """Note what groups were worth: those that are trained for the first time, and have a rollout that counts."""
        for p, group in enumerate(groups):
            if first is not None and not first[p]:
                continue
            values_G = rewarded.reward_PG[p]
            if rewarded.kept_PG is not None:
                values_G = values_G[rewarded.kept_PG[p]]
            if len(values_G):
                self.marks.append(Mark(*group.prompt.key, mean=float(values_G.mean())))

    def merge(self) -> None:
        """All ranks' marks into the ratings of each. Collective."""
        marks = [Mark(*mark) for part in dist.gathered(self.marks, self.world) for mark in part]
        for mark in sorted(marks):
            if self.window is not None:
                self.documents.add(mark.document, mark.mean, mark.epoch)
            if self.retired_at is not None:
                self.prompts.add(_prompt(mark.document, mark.cut), mark.mean, mark.epoch)
        self.marks = []
        self._sort()

    def _sort(self) -> None:
        self.sorted_means = sorted(rating.mean for rating in self.documents.known.values())

    def sums(self) -> Sums:
        """Of the positions and cuts that were passed over since the last call; how many documents are rated."""
        found, self.counts = self.counts, Counter()
        sums: Sums = {}
        if self.window is not None:
            sums = {f"difficulty/{name}": (float(found[name]), 1.0) for name in ("easy", "hard")}
            sums["difficulty/reviewed"] = (float(found["reviewed"]), 1.0)
            sums["difficulty/rated"] = (float(len(self.documents.known)), 1.0)
        if self.retired_at is not None:
            sums["sampling/retired_documents"] = (float(found["retired"]), 1.0)
            sums["sampling/retired_cuts"] = (float(found["retired_cuts"]), 1.0)
        return sums

    def rows(self) -> list[Row]:
        """For a checkpoint: all ratings, on the main rank alone, since every rank has the same."""
        if not self.world.is_main:
            return []
        return [
            {"place": PLACE, "position": -1, "of": of, "name": name, "rating": list(rating)}
            for of, ratings in (("document", self.documents), ("prompt", self.prompts))
            for name, rating in ratings.known.items()
        ]

    def restore(self, rows: Iterable[Row]) -> None:
        """Every rank takes all of them."""
        kinds = {"document": self.documents, "prompt": self.prompts}
        for row in rows:
            kinds[row["of"]].known[row["name"]] = Rating(*row["rating"])
        self._sort()


def _prompt(document: str, cut: int) -> str:
    return f"{document}@{cut}"
