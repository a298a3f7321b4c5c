"""Rewards -> advantages and weights: what the update multiplies log-probabilities by. Statistics of the batch are
reduced over ranks here, and nowhere else.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from rlpt import dist, rng
from rlpt.advantage import RESOLUTION, Mask, Moments, advantage, batch_moments, group_std
from rlpt.objective import gold_shares, token_weights
from rlpt.reward.control import constant, permuted, random_like
from rlpt.reward.gates import well_formed
from rlpt.stages import RLStage
from rlpt.types import Group


@dataclass(frozen=True)
class Credited:
    """What the log-probabilities of a micro-batch are multiplied by."""

    advantage_PG: Float[np.ndarray, "P G"]
    weight_PG: Float[np.ndarray, "P G"]
    """Of one action."""
    gold_PG: Float[np.ndarray, "P G"] | None = None
    """Of one held-out token; None: there is no gold term."""

    def part(self, chosen: Sequence[int]) -> "Credited":
        gold_PG = None if self.gold_PG is None else self.gold_PG[chosen]
        return Credited(self.advantage_PG[chosen], self.weight_PG[chosen], gold_PG)


@dataclass(frozen=True)
class Credit:
    """How the rewards of one step become advantages."""

    stage: RLStage
    world: dist.World
    seed: int
    step: int
    noise: float = RESOLUTION
    """Standard deviation that rounding alone gives a reward, for `advantage.min_std = "noise"`."""

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

    def admitted(self, reward_PG: Float[np.ndarray, "P G"], kept_PG: Mask | None) -> Mask | None:
        """Of the rollouts that count those whose group spreads enough to teach anything; None: all."""
        least = self.stage.advantage.min_std
        if not least or not len(reward_PG):
            return kept_PG
        spread_P1 = group_std(reward_PG, kept_PG)
        apart_PG = np.broadcast_to(
            spread_P1 > (self.noise if least == "noise" else least), reward_PG.shape
        )
        return apart_PG if kept_PG is None else kept_PG & apart_PG

    def advantages(
        self, reward_PG: Float[np.ndarray, "P G"], kept_PG: Mask | None = None
    ) -> Float[np.ndarray, "P G"]:
        """Advantages of the whole step's rewards."""
        unscaled_PG = self.unscaled(reward_PG, kept_PG)
        return self._clipped(unscaled_PG * self.factor(unscaled_PG, kept_PG))

    def unscaled(
        self, reward_PG: Float[np.ndarray, "P G"], kept_PG: Mask | None = None
    ) -> Float[np.ndarray, "P G"]:
        """Advantages but for a factor that only the whole batch knows."""
        cfg = self.stage.advantage
        whole = cfg.scale == "batch_std"
        found_PG = advantage(
            reward_PG,
            baseline=cfg.baseline,
            scale="none" if whole else cfg.scale,
            kept_PG=kept_PG,
            relative=self.stage.reward.relative,
        )
        return found_PG if whole else self._clipped(found_PG)

    def _clipped(self, advantage_PG: Float[np.ndarray, "P G"]) -> Float[np.ndarray, "P G"]:
        cfg = self.stage.advantage
        low = 0.0 if cfg.positive_only else -np.inf if cfg.clip is None else -cfg.clip
        return np.clip(advantage_PG, low, np.inf if cfg.clip is None else cfg.clip)

    def factor(self, unscaled_PG: Float[np.ndarray, "P G"], kept_PG: Mask | None = None) -> float:
        """What `unscaled` leaves out, for the whole step: 1, or 1 / std of the batch (0 where it agrees)."""
        if self.stage.advantage.scale != "batch_std":
            return 1.0
        std = self._reduced(batch_moments(unscaled_PG, kept_PG)).std
        return 1.0 / std if std > 0 else 0.0

    def weights(
        self, groups: Sequence[Group], kept_PG: Mask | None = None
    ) -> Float[np.ndarray, "P G"]:
        """The weight of one action of every rollout: the inverse of a count over the whole step."""
        counts = [[rollout.num_actions for rollout in group.rollouts] for group in groups]
        if kept_PG is not None:
            counts = (np.asarray(counts) * kept_PG).tolist()
        num_prompts = len(groups) if kept_PG is None else int(kept_PG.any(axis=1).sum())
        actions, prompts = dist.total(
            [float(sum(map(sum, counts))), float(num_prompts)], self.world
        )
        cfg = self.stage.objective
        weights = token_weights(
            counts,
            cfg.aggregate,
            total_actions=actions,
            num_prompts=prompts,
            constant_tokens=cfg.constant_tokens,
            sizes=None if kept_PG is None else kept_PG.sum(axis=1).tolist(),
        )
        weight_PG = np.asarray(weights, dtype=np.float64)
        return weight_PG if kept_PG is None else np.where(kept_PG, weight_PG, 0.0)

    def gold_weights(
        self,
        groups: Sequence[Group],
        gold_PG: Float[np.ndarray, "P G"],
        weight_PG: Float[np.ndarray, "P G"],
        kept_PG: Mask | None,
        count: float,
    ) -> Float[np.ndarray, "P G"]:
        """The weight of one held-out token of every rollout; 0 of those that do not count or are of bad form.

        ``gold_PG`` is log p(y | x, z), ``weight_PG`` that of an action, ``count`` is `gold_count`'s. A share of the
        group is that among all thoughts that count, as in the bound whose gradient it is; bad form takes it out after.
        """
        cfg = self.stage.objective
        taught_PG = self._taught(groups, kept_PG)
        taught_PG = np.ones(gold_PG.shape, dtype=bool) if taught_PG is None else taught_PG
        if cfg.gold == "constant":
            return taught_PG * (cfg.gold_weight / max(count, 1.0))
        kept_PG = np.ones(gold_PG.shape, dtype=bool) if kept_PG is None else kept_PG
        share_PG = gold_shares(gold_PG, cfg.gold, kept_PG)
        return cfg.gold_weight * weight_PG * np.where(taught_PG, share_PG, 0.0)

    def gold_count(self, groups: Sequence[Group], kept_PG: Mask | None) -> float:
        """Held-out tokens after all rollouts of the step that count and are of good form, where the gold term is their
        mean. Collective."""
        cfg = self.stage.objective
        if not cfg.gold_weight or cfg.gold != "constant":
            return 0.0
        taught_PG = self._taught(groups, kept_PG)
        counted = (
            group.prompt.horizon
            * (len(group.rollouts) if taught_PG is None else int(taught_PG[p].sum()))
            for p, group in enumerate(groups)
        )
        return dist.total([float(sum(counted))], self.world)[0]

    def _taught(self, groups: Sequence[Group], kept_PG: Mask | None) -> Mask | None:
        """Rollouts after which the gold text is learned; None: all."""
        formed_PG = well_formed(groups, self.stage.gates)
        if formed_PG is None or kept_PG is None:
            return kept_PG if formed_PG is None else formed_PG
        return formed_PG & kept_PG

    def _reduced(self, moments: Moments) -> Moments:
        return Moments(
            *dist.total([moments.count, moments.total, moments.total_square], self.world)
        )
