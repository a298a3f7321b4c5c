"""What was not finite in the step in hand: rewards and losses of this rank, gathered from all ranks before the update.

Nothing is trained on such a step, and all ranks must skip it alike. A rank that raised where it found a NaN would leave
the others waiting in the next collective: so it notes what it found and goes on with a number.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float

from rlpt import dist
from rlpt.advantage import Mask
from rlpt.types import Group

_SAID = 3
"""Of one rank's faults those that are named; the others are counted."""


@dataclass
class Faults:
    """Of one step, on one rank."""

    found: list[str] = field(default_factory=list)

    def rewards(
        self,
        reward_PG: Float[np.ndarray, "P G"],
        kept_PG: Mask | None,
        groups: Sequence[Group],
    ) -> Float[np.ndarray, "P G"]:
        """`solid` rewards; every one that counts and is not finite is a fault.

        Leaving out its group alone would not do: the actions of all groups are in the denominators of micro-batches
        that were trained before this one, and a policy that scores one page NaN is not to be trusted with another.
        """
        bad_PG = ~np.isfinite(reward_PG)
        for p, g in np.argwhere(bad_PG if kept_PG is None else bad_PG & kept_PG):
            _, document, cut = groups[p].prompt.key
            self.found.append(
                f"the reward of document {document}, cut {cut}, rollout {g} is {reward_PG[p, g]}"
            )
        return solid(reward_PG)

    def loss(self, value: float, documents: Sequence[str]) -> None:
        """Note the loss of a micro-batch of these documents where it is not finite."""
        if not math.isfinite(value):
            others = f" and {len(documents) - 1} more" if len(documents) > 1 else ""
            self.found.append(f"the loss of document {documents[0]}{others} is {value}")

    def everyones(self, world: dist.World) -> tuple[str, ...]:
        """What all ranks found, the same on each; empty where every number is finite. Collective."""
        if not dist.largest(len(self.found), world):
            return ()
        parts = dist.gathered(self.found, world)
        return tuple(line for rank, found in enumerate(parts) for line in _said(rank, found))


def solid(reward_PG: Float[np.ndarray, "P G"]) -> Float[np.ndarray, "P G"]:
    """Rewards with 0 in the place of those that are not finite."""
    return np.where(np.isfinite(reward_PG), reward_PG, 0.0)


def _said(rank: int, found: Sequence[str]) -> list[str]:
    more = [f"{len(found) - _SAID} more"] if len(found) > _SAID else []
    return [f"rank {rank}: {line}" for line in (*found[:_SAID], *more)]
