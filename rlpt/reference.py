"""The distance of the policy to a reference, and sampled tokens as other copies score them."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from rlpt.batch import action_pairs, concat_floats
from rlpt.policy.policy import Policy
from rlpt.policy.scoring import Scorer
from rlpt.terms import KLConfig
from rlpt.types import Group, Rollout, Sums
from rlpt.update import Learner

LOGGED_SHARE = 16
"""At weight 0 one group in so many is scored, to be logged."""


def action_scorer(policy: Policy, learner: Learner, tokens: int) -> Scorer:
    """Scores sampled tokens as they were sampled: the opener banned, at the thoughts' temperature."""
    banned = (learner.markers.opener,)
    return Scorer(policy, banned, learner.world, tokens, temperature=learner.temperature)


def rollouts(groups: Sequence[Group]) -> list[Rollout]:
    return [rollout for group in groups for rollout in group.rollouts]


def action_logps(scorer: Scorer, groups: Sequence[Group]) -> list[np.ndarray]:
    """Log-probabilities of every rollout's actions, an array each, float64. Collective."""
    scores = scorer.branches(action_pairs(groups))
    chosen = zip(scores, rollouts(groups), strict=True)
    return [score.logp[rollout.action].astype(np.float64) for score, rollout in chosen]


@dataclass
class Reference:
    """What the reference policy says of the actions of one step's groups."""

    learner: Learner
    cfg: KLConfig
    groups: Sequence[Group]
    sums: Sums = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._logps: list[np.ndarray] | None = None
        self._penalty_PG: np.ndarray | None = None
        if self.learner.reference is None:
            return
        logged = self.groups if self.cfg.weight else self.groups[::LOGGED_SHARE]
        logps = action_logps(self.learner.reference, logged)
        self._log(logged, logps)
        if self.cfg.weight:
            self._logps = logps
        if self.cfg.weight and self.cfg.placement == "reward":
            self._penalty_PG = self._paid(logps)
            paid, count = float(self._penalty_PG.sum()), float(self._penalty_PG.size)
            self.sums |= {"reward/kl": (-paid, count)}

    def _paid(self, logps: Sequence[np.ndarray]) -> Float[np.ndarray, "P G"]:
        """weight x sum over a rollout's actions of log pi - log ref."""
        flat = [
            self.cfg.weight * float((rollout.logp[rollout.action] - logp).sum())
            for rollout, logp in zip(rollouts(self.groups), logps, strict=True)
        ]
        return np.array(flat).reshape(len(self.groups), -1)

    def _log(self, groups: Sequence[Group], logps: Sequence[np.ndarray]) -> None:
        """k3, which is never negative, and k1, for its sign, of what sampled the actions."""
        d_A = np.concatenate(
            [*(r.logp[r.action] - own for r, own in zip(rollouts(groups), logps, strict=True)), []]
        )
        count = float(len(d_A))
        self.sums |= {
            "kl/k1": (float(d_A.sum()), count),
            "kl/k3": (float((np.expm1(-d_A) + d_A).sum()), count),
        }

    def penalized(
        self, reward_PG: Float[np.ndarray, "P G"], part: Sequence[int]
    ) -> Float[np.ndarray, "P G"]:
        """Rewards of a micro-batch, less what KL costs them with placement = 'reward'."""
        return reward_PG if self._penalty_PG is None else reward_PG - self._penalty_PG[list(part)]

    def rows(self, part: Sequence[int], device: torch.device) -> Float[Tensor, " R"] | None:
        """The reference's log-probabilities of a micro-batch's actions, for placement = 'loss'; else None."""
        if self._logps is None or self.cfg.placement != "loss":
            return None
        width = len(self._logps) // len(self.groups)
        chosen = [self._logps[p * width + g] for p in part for g in range(width)]
        return concat_floats(chosen, device)
