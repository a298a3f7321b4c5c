"""Dynamic sampling: of a step's documents those whose rewards differ go on, the others make room for fresh ones."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Bool

from rlpt.lots import Lot
from rlpt.pool import Pool
from rlpt.reward.base import Reward, Rewarded
from rlpt.types import Sums


@dataclass
class Screen:
    """One rank's documents of one step. ``reward`` None: all go on."""

    reward: Reward | None
    pool: Pool
    agreeing: list[Lot] = field(default_factory=list)
    """Documents without a group whose rewards differ, in the order they were asked for."""
    seen: int = 0
    used: int = 0
    filled: int = 0
    """Groups."""

    def passed(self, lots: Sequence[Lot]) -> Sequence[Lot]:
        """Those with groups whose rewards differ, and only these groups."""
        if self.reward is None or not lots:
            return lots
        groups = [group for lot in lots for group in lot.groups or ()]
        rewarded = self.reward(groups)
        self.pool.rate(groups, rewarded)
        differ = iter(apart(rewarded))
        good: list[Lot] = []
        for lot in lots:
            held = [group for group in lot.groups or () if next(differ)]
            (good if held else self.agreeing).append(lot)
            lot.groups = held or lot.groups
            self.used += len(held)
        self.seen += len(groups)
        return good

    def fill(self, missing: int) -> list[Lot]:
        """What agrees, where nothing else is left for the step: it teaches nothing, and denominators count it."""
        lots, self.agreeing = self.agreeing[:missing], self.agreeing[missing:]
        self.filled += sum(len(lot.groups or ()) for lot in lots)
        return lots

    def sums(self, group_size: int, ranks: int) -> Sums:
        """The share of groups that differ, rollouts sampled and thrown away, and groups used though they agree."""
        if self.reward is None:
            return {}
        thrown = self.seen - self.used - self.filled
        return {
            "sampling/differing": (float(self.used), float(self.seen)),
            "sampling/rollouts_sampled": (float(self.seen * group_size), 1.0 / ranks),
            "sampling/rollouts_thrown": (float(thrown * group_size), 1.0 / ranks),
            "sampling/filled_groups": (float(self.filled), 1.0 / ranks),
        }


def apart(rewarded: Rewarded) -> Bool[np.ndarray, " P"]:
    """Which groups have two rollouts that count with different rewards."""
    kept_PG = rewarded.kept_PG
    if kept_PG is None:
        return np.ptp(rewarded.reward_PG, axis=1) > 0
    high_P = np.where(kept_PG, rewarded.reward_PG, -np.inf).max(axis=1)
    low_P = np.where(kept_PG, rewarded.reward_PG, np.inf).min(axis=1)
    return high_P > low_P
