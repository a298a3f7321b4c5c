"""Rewards -> advantages and weights: what the update multiplies log-probabilities by. Statistics of the batch are
reduced over ranks here, and nowhere else.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from rlpt import dist, rng
from rlpt.advantage import Moments, advantage, batch_moments
from rlpt.objective import token_weights
from rlpt.reward.control import constant, permuted, random_like
from rlpt.stages import RLStage
from rlpt.types import Group


@dataclass(frozen=True)
class Credit:
    """How the rewards of one step become advantages."""

    stage: RLStage
    world: dist.World
    seed: int
    step: int

    def controlled(
        self, reward_PG: Float[np.ndarray, "P G"], groups: Sequence[Group]
    ) -> Float[np.ndarray, "P G"]:
        """Apply a training control; its draws belong to the prompt, so ranks cannot change them."""
        kind = self.stage.reward_control
        if kind == "none":
            return reward_PG
        if kind == "constant":
            return constant(reward_PG)
        draws = [rng.generator(self.seed, kind, self.step, *group.prompt.key) for group in groups]
        if kind == "permuted":
            return permuted(reward_PG, draws)
        return random_like(reward_PG, self._reduced(batch_moments(reward_PG)), draws)

    def advantages(self, reward_PG: Float[np.ndarray, "P G"]) -> Float[np.ndarray, "P G"]:
        """Advantages of the whole step's rewards."""
        cfg = self.stage.advantage
        moments = None
        if cfg.scale == "batch_std":
            moments = self._reduced(batch_moments(self.unscaled(reward_PG)))
        return advantage(reward_PG, baseline=cfg.baseline, scale=cfg.scale, moments=moments)

    def unscaled(self, reward_PG: Float[np.ndarray, "P G"]) -> Float[np.ndarray, "P G"]:
        """Advantages but for a factor that only the whole batch knows."""
        cfg = self.stage.advantage
        scale = "none" if cfg.scale == "batch_std" else cfg.scale
        return advantage(reward_PG, baseline=cfg.baseline, scale=scale, moments=None)

    def factor(self, unscaled_PG: Float[np.ndarray, "P G"]) -> float:
        """What `unscaled` leaves out, for the whole step: 1, or 1 / std of the batch (0 where it agrees)."""
        if self.stage.advantage.scale != "batch_std":
            return 1.0
        std = self._reduced(batch_moments(unscaled_PG)).std
        return 1.0 / std if std > 0 else 0.0

    def weights(self, groups: Sequence[Group]) -> Float[np.ndarray, "P G"]:
        """The weight of one action of every rollout: the inverse of a count over the whole step."""
        counts = [[rollout.num_actions for rollout in group.rollouts] for group in groups]
        actions, prompts = dist.total(
            [float(sum(map(sum, counts))), float(len(groups))], self.world
        )
        weights = token_weights(
            counts, self.stage.objective.aggregate, total_actions=actions, num_prompts=prompts
        )
        return np.asarray(weights, dtype=np.float64)

    def _reduced(self, moments: Moments) -> Moments:
        return Moments(
            *dist.total([moments.count, moments.total, moments.total_square], self.world)
        )
