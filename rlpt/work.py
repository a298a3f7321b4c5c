"""The parts of one stage: what learns, where documents come from, and what rewards thoughts."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from rlpt import dist
from rlpt.config import RunConfig
from rlpt.critic import Critic
from rlpt.frames import Framer
from rlpt.guards import ROUNDING
from rlpt.phases import phase
from rlpt.policy.foreign import encoded, foreign
from rlpt.policy.load import Blueprint, copy_weights
from rlpt.policy.policy import Policy
from rlpt.policy.scoring import Scorer
from rlpt.prompts import Samples
from rlpt.reference import action_scorer
from rlpt.reward.base import Kit, Reward
from rlpt.saved_supply import SavedSupply
from rlpt.stages import RLStage
from rlpt.supply import Supply
from rlpt.types import Ids
from rlpt.update import Learner
from rlpt_data.shards import ShardFolder


@dataclass
class Work:
    """The parts of one stage."""

    learner: Learner
    stream: Samples
    framer: Framer | None = None
    reward: Reward | None = None
    frozen: Policy | None = None
    supply: Supply | SavedSupply | None = None

    def parts(self) -> dict[str, Any]:
        """What a checkpoint inside the stage holds. The order and the samplers have no state but the progress: every
        draw has a key of its own (`rlpt.rng`), and nothing draws from torch's generator."""
        held: dict[str, Any] = {**copies_of(self.learner, self.frozen)}
        return held | {
            "optimizer": (self.learner.policy, self.learner.optimizer),
            "loss_scale": {"state": self.learner.scale.state},
            **self._critic(),
        }

    def _critic(self) -> dict[str, Any]:
        critic = self.learner.critic
        if critic is None:
            return {}
        weights = {name: value.detach() for name, value in critic.named_parameters()}
        return {"critic": weights, "critic_optimizer": (critic, critic.optimizer)}

    def renew_reference(self, stage: RLStage, steps_done: int) -> None:
        """The frozen copy follows the policy at its period."""
        every = stage.reference_every
        if self.frozen is not None and every and steps_done % every == 0:
            copy_weights(self.frozen, self.learner.policy)

    def close(self) -> None:
        """Nothing is sampled for a stage that is over."""
        if self.supply is not None:
            self.supply.close()


def copies_of(learner: Learner, frozen: Policy | None) -> dict[str, Policy]:
    """The policy and those copies of it that the stage has, by name."""
    named = {"policy": learner.policy, "ema": learner.ema, "frozen": frozen}
    return {name: policy for name, policy in named.items() if policy is not None}


@dataclass(frozen=True)
class Outfit:
    """Builds what an RL stage adds to its learner: the reward, and the reference of the KL term."""

    cfg: RunConfig
    shards: ShardFolder
    plan: Blueprint
    world: dist.World
    stage: RLStage
    learner: Learner
    frozen: Policy | None

    @property
    def copies(self) -> dict[str, Policy]:
        return copies_of(self.learner, self.frozen)

    def learner_with_reference(self) -> Learner:
        """The learner with its value head, told what KL is held against and how much its scores are rounded."""
        if (critic := self.stage.objective.critic) is not None:
            width = self.plan.config.hidden_size
            optimizer = self.stage.optimizer
            self.learner.critic = Critic(width, optimizer, self.world, critic.heads, self.cfg.seed)
        name, tokens = self.stage.kl.reference, self.stage.micro_batch_tokens
        if name != "none":
            self.learner.reference = action_scorer(self.copies[name], self.learner, tokens)
        self.learner.noise = self._noise
        return self.learner

    @property
    def _noise(self) -> float:
        """What rounding makes of a mean over the continuation."""
        horizon = self.cfg.prompts.horizon_tokens
        return ROUNDING[self.cfg.policy.compute_dtype] / horizon**0.5

    def reward(self) -> Reward:
        """The stage's reward behind its gates."""
        markers, tokens = self.plan.vocabulary.markers, self.stage.micro_batch_tokens
        scorers = {
            name: Scorer(policy, markers.ids, self.world, tokens)
            for name, policy in self.copies.items()
        }
        separator = self._foreign(scorers, tokens)
        centred = self.stage.cancels_baselines
        token_bytes = partial(self.plan.token_bytes, self.shards)
        kit = Kit(scorers, markers, centred, token_bytes, separator, self._noise)
        return phase("score")(self.stage.built(kit))

    def _foreign(self, scorers: dict[str, Scorer], tokens: int) -> Ids | None:
        """Add another model's scorer, if the reward names one; what stands for the markers there."""
        cfg = getattr(self.stage.reward, "foreign", None)
        if cfg is None:
            return None
        model = foreign(cfg.path, self.plan, self.cfg.longest_path, self.world)
        scorers["foreign"] = Scorer(model, (), self.world, tokens)
        return np.array(encoded(cfg.separator, self.shards), dtype=np.int64)
