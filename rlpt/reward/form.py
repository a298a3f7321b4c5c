"""Form alone: a control. It pays for a closed thought whatever it says, so what it gains is what the format gains."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field

from rlpt.reward.base import Kit, PolicyScores, RewardBase, Rewarded, mean_of
from rlpt.types import Group


class FormReward(RewardBase):
    """1 where the policy closes a thought of at least ``min_tokens`` itself, else 0."""

    kind: Literal["form"]
    min_tokens: Annotated[int, Field(ge=0)] = 1

    predicts: ClassVar[bool] = False

    def build(self, kit: Kit) -> "Form":
        return Form(self.min_tokens)


@dataclass(frozen=True)
class Form:
    """See `FormReward`."""

    min_tokens: int

    def __call__(self, groups: Sequence[Group], policy: PolicyScores | None = None) -> Rewarded:
        reward_PG = np.array(
            [
                [
                    float(r.finish == "closer" and r.thought_len >= self.min_tokens)
                    for r in g.rollouts
                ]
                for g in groups
            ]
        )
        return Rewarded(reward_PG, mean_of("reward/form", reward_PG))
