"""Gates and length terms: what a rollout's form does to its reward. Pure: they look at rollouts, never at scores.

A gate multiplies or masks, it does not add: a bonus for form alone would be learned instead of thinking.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from jaxtyping import Bool, Float
from pydantic import Field, model_validator

from rlpt.reward.base import PolicyScores, Reward, Rewarded, mean_of
from rlpt.types import Group, Rollout
from rlpt_data.strict import Strict

Values = Float[np.ndarray, "P G"]
Tokens = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]


class FormatGate(Strict):
    """Rollouts of bad form get ``value`` instead of their reward; the gold text after them is not learned."""

    kind: Literal["format"]
    closed: bool = True
    """The policy must close its thought itself."""
    min_thought_tokens: Annotated[int, Field(ge=0)] = 0
    min_prediction_tokens: Annotated[int, Field(ge=0)] = 0
    value: float = 0.0

    def __call__(self, reward_PG: Values, groups: Sequence[Group]) -> Values:
        return np.where(_each(groups, self.well_formed), reward_PG, self.value)

    def refuse_unfit(self, most_thought: int, most_prediction: int) -> None:
        """Raises ValueError where no rollout could be well formed; both in tokens."""
        for what, least, most in (
            ("thought", self.min_thought_tokens, most_thought),
            ("prediction", self.min_prediction_tokens, most_prediction),
        ):
            if least > most:
                raise ValueError(
                    f"gates, format: min_{what}_tokens = {least}, and a {what} has {most} at most; lower it"
                )

    def well_formed(self, rollout: Rollout) -> bool:
        return (
            (rollout.finish == "closer" or not self.closed)
            and rollout.thought_len >= self.min_thought_tokens
            and len(rollout.prediction_ids) >= self.min_prediction_tokens
        )


class LengthBudget(Strict):
    """(1 - weight) r + weight x triangle: 1 at ``tokens``, 0 at none and at twice as many (RMT, arXiv 2509.24375).

    tokens = "budget": those of the budget that the thought was sampled under.
    """

    kind: Literal["length_budget"]
    tokens: Tokens | Literal["budget"]
    weight: Share

    def __call__(self, reward_PG: Values, groups: Sequence[Group]) -> Values:
        length_PG = _lengths(groups)
        tokens = self.tokens if self.tokens != "budget" else _budgets(groups)
        triangle_PG = np.maximum(0.0, 1.0 - np.abs(length_PG - tokens) / tokens)
        return (1.0 - self.weight) * reward_PG + self.weight * triangle_PG


class SoftOverlong(Strict):
    """r + clip((most_tokens - length) / cache_tokens - 1, -1, 0): over the last cache_tokens (DAPO, 2503.14476)."""

    kind: Literal["soft_overlong"]
    most_tokens: Tokens
    cache_tokens: Tokens

    @model_validator(mode="after")
    def _cache_fits(self) -> "SoftOverlong":
        if self.cache_tokens > self.most_tokens:
            raise ValueError(
                f"cache_tokens = {self.cache_tokens} exceeds most_tokens = {self.most_tokens}"
            )
        return self

    def __call__(self, reward_PG: Values, groups: Sequence[Group]) -> Values:
        left_PG = (self.most_tokens - _lengths(groups)) / self.cache_tokens
        return reward_PG + np.clip(left_PG - 1.0, -1.0, 0.0)


class TruncationMask(Strict):
    """Thoughts that the budget ended are neither compared with nor trained on (DAPO's overlong filtering)."""

    kind: Literal["mask_truncated"]

    def __call__(self, reward_PG: Values, groups: Sequence[Group]) -> Values:
        return reward_PG


Gate = Annotated[
    FormatGate | LengthBudget | SoftOverlong | TruncationMask, Field(discriminator="kind")
]


def kept(groups: Sequence[Group], gates: Sequence[Gate]) -> Bool[np.ndarray, "P G"] | None:
    """Rollouts that no gate masks; None: all."""
    if not any(gate.kind == "mask_truncated" for gate in gates):
        return None
    return _each(groups, lambda rollout: rollout.finish != "budget")


def well_formed(groups: Sequence[Group], gates: Sequence[Gate]) -> Bool[np.ndarray, "P G"] | None:
    """Rollouts whose form every format gate takes; None: all."""
    tests = [gate.well_formed for gate in gates if gate.kind == "format"]
    if not tests:
        return None
    return _each(groups, lambda rollout: all(test(rollout) for test in tests))


def gated(rewarded: Rewarded, groups: Sequence[Group], gates: Sequence[Gate]) -> Rewarded:
    """The reward after all gates, in order; what each changed is logged by itself."""
    if not gates or not groups:
        return rewarded
    reward_PG, sums = rewarded.reward_PG, dict(rewarded.sums)
    for gate in gates:
        changed_PG = gate(reward_PG, groups)
        sums |= mean_of(f"reward/{gate.kind}", changed_PG - reward_PG)
        reward_PG = changed_PG
    kept_PG = kept(groups, gates)
    if kept_PG is not None:
        sums |= mean_of("reward/truncated", (~kept_PG).astype(np.float64))
        kept_PG = kept_PG if rewarded.kept_PG is None else kept_PG & rewarded.kept_PG
    else:
        kept_PG = rewarded.kept_PG
    return Rewarded(reward_PG, sums, rewarded.detail, kept_PG, rewarded.gold_PG)


@dataclass(frozen=True)
class Gated:
    """A reward behind its gates."""

    reward: Reward
    gates: tuple[Gate, ...]

    def __call__(self, groups: Sequence[Group], policy: PolicyScores | None = None) -> Rewarded:
        return gated(self.reward(groups, policy), groups, self.gates)


def _each(groups: Sequence[Group], test: Callable[[Rollout], bool]) -> Bool[np.ndarray, "P G"]:
    return np.array([[test(rollout) for rollout in group.rollouts] for group in groups], dtype=bool)


def _lengths(groups: Sequence[Group]) -> Values:
    return np.array(
        [[float(rollout.thought_len) for rollout in group.rollouts] for group in groups]
    )


def _budgets(groups: Sequence[Group]) -> Float[np.ndarray, "P 1"]:
    assert all(group.budget for group in groups), "a group without a budget"
    return np.array([[float(group.budget or 0)] for group in groups])
