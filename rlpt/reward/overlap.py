"""N-gram overlap of the prediction with the held-out text: a dense stand-in for a match."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from rlpt.reward.base import Kit, PolicyScores, RewardBase, Rewarded, mean_of
from rlpt.reward.match import predicted
from rlpt.types import Group


class OverlapReward(RewardBase):
    """F1 of the prediction's word n-grams against the held-out text's (ROUGE-N, Lin 2004), from 0 to 1."""

    kind: Literal["overlap"]
    n: Annotated[int, Field(ge=1, le=4)] = 1

    def build(self, kit: Kit) -> "Overlap":
        return Overlap(self.n, kit)


def overlap(prediction: str, gold: str, n: int) -> float:
    """2 PR / (P + R) over n-grams of words; a text shorter than n words has none, and scores 0."""
    ours, theirs = _grams(prediction, n), _grams(gold, n)
    shared = (ours & theirs).total()
    return 2.0 * shared / (ours.total() + theirs.total()) if shared else 0.0


def _grams(text: str, n: int) -> Counter[tuple[str, ...]]:
    words = text.split()
    return Counter(tuple(words[k : k + n]) for k in range(len(words) - n + 1))


@dataclass(frozen=True)
class Overlap:
    """See `OverlapReward`."""

    n: int
    kit: Kit

    @cached_property
    def _token_bytes(self) -> Sequence[bytes]:
        return self.kit.token_bytes()

    def __call__(self, groups: Sequence[Group], policy: PolicyScores | None = None) -> Rewarded:
        reward_PG = np.array(
            [[self._value(group, g) for g in range(len(group.rollouts))] for group in groups]
        )
        return Rewarded(reward_PG, mean_of("reward/overlap", reward_PG))

    def _value(self, group: Group, g: int) -> float:
        prediction = predicted(group, g, self.kit.markers.closer, self._token_bytes)
        gold = b"".join(self._token_bytes[int(index)] for index in group.prompt.continuation_ids)
        return overlap(prediction.decode(errors="replace"), gold.decode(errors="replace"), self.n)
