"""One optimiser step of reinforcement learning: groups -> reward -> advantage -> loss -> update.

Rewards are read off the forward that is trained wherever that gives the same weights as a scoring pass of its own
(MEASURING, section 7): the body runs once, the head first on the held-out rows without gradient, then, fused with the
policy loss, on the actions.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from rlpt import dist
from rlpt.batch import (
    RolloutBatch,
    Wanted,
    documents,
    padded_costs,
    per_action,
    rollout_batch,
    split_evenly,
    trunks_of,
)
from rlpt.credit import Credit
from rlpt.mismatch import Extremes, measured, raise_to
from rlpt.objective import next_token_loss, policy_gradient
from rlpt.policy.logprobs import Ratio
from rlpt.policy.policy import Readout, RowScores
from rlpt.policy.scoring import split_scores
from rlpt.reward.rewards import PolicyScores, Reward, Rewarded, joined
from rlpt.stages import RLStage
from rlpt.types import Group, Sums
from rlpt.update import Learner, Stepped, add, apply_gradients, scale_gradients

Advantages = Callable[[Readout, RolloutBatch], Float[np.ndarray, "P G"]]
"""The advantages of one micro-batch; may ask its forward for the scores that rewards are made of."""


def rl_step(
    learner: Learner,
    groups: Sequence[Group],
    reward: Reward,
    stage: RLStage,
    step: int,
    stage_step: int,
) -> Stepped:
    """groups -> reward -> advantage -> loss -> update. ``groups`` are this rank's share, whole documents."""
    started = time.perf_counter()
    update = _Update(learner, groups, stage, Credit(stage, learner.world, learner.seed, step), step)
    parts = update.parts(continuations=True)
    together = _reads_training_forward(stage, whole=len(parts) == 1)
    if together:
        rewarded, advantage_PG = update.in_one_forward(reward, parts)
    else:
        rewarded, advantage_PG = update.after_scoring(reward)
    norm = apply_gradients(learner, stage.optimizer, stage_step, stage.steps, stage.ema_decay)
    controlled_PG = update.credit.controlled(rewarded.reward_PG, groups)
    sums = update.sums | rewarded.sums | _moments_of("reward/mean", controlled_PG)
    sums |= _thought_sums(groups) | {
        "update/one_forward": (float(together), 1.0),
        "time/score": (update.scoring, 1.0),
        "time/train": (time.perf_counter() - started - update.scoring, 1.0),
    }
    return Stepped(sums, norm, rewarded, advantage_PG, update.extremes)


def rl_score(
    learner: Learner,
    groups: Sequence[Group],
    reward: Reward,
    stage: RLStage,
    step: int,
    stage_step: int,
) -> Stepped:
    """What `rl_step` would have learned from: rewards and advantages alone, the weights left as they are."""
    started = time.perf_counter()
    credit = Credit(stage, learner.world, learner.seed, step)
    rewarded = reward(groups)
    controlled_PG = credit.controlled(rewarded.reward_PG, groups)
    sums = rewarded.sums | _moments_of("reward/mean", controlled_PG) | _thought_sums(groups)
    sums |= {"time/score": (time.perf_counter() - started, 1.0)}
    return Stepped(sums, 0.0, rewarded, credit.advantages(controlled_PG))


def _reads_training_forward(stage: RLStage, whole: bool) -> bool:
    """Whether rewards come out of the forward that is trained."""
    how, reason = stage.update.score_with, stage.why_separate(whole)
    # The session has refused what does not fit.
    assert how != "training_forward" or reason is None, reason
    return how != "separate_pass" and reason is None


@dataclass
class _Update:
    """The forwards and backwards of one step on this rank."""

    learner: Learner
    groups: Sequence[Group]
    stage: RLStage
    credit: Credit
    version: int
    """Of the weights that are trained."""
    sums: Sums = field(
        default_factory=lambda: {"loss/policy": (0.0, 1.0), "tokens/train": (0.0, 1.0)}
    )
    extremes: Extremes = field(default_factory=dict)
    scoring: float = 0.0
    """Seconds spent on scores and rewards."""

    def __post_init__(self) -> None:
        self.weight_PG = self.credit.weights(self.groups)
        trunks = trunks_of(self.groups)
        text = sum(len(trunk.ids) - 1 for trunk in trunks)
        gold = sum(len(group.rollouts) * group.prompt.horizon for group in self.groups)
        self.text_count, self.gold_count = dist.total(
            [float(text), float(gold)], self.learner.world
        )

    def wanted(self, continuations: bool) -> Wanted:
        cfg = self.stage.objective
        return Wanted(continuations or cfg.gold_weight > 0, cfg.next_token_weight > 0)

    def parts(self, continuations: bool) -> list[list[int]]:
        """Indices of groups, micro-batch by micro-batch, whole documents each."""
        whole, wanted = documents(self.groups), self.wanted(continuations)
        costs = padded_costs(
            [[self.groups[p] for p in part] for part in whole], wanted, self.learner.policy.layout
        )
        bins = split_evenly(costs, self.stage.micro_batch_tokens, self.learner.world)
        return [[p for d in each for p in whole[d]] for each in bins]

    def after_scoring(self, reward: Reward) -> tuple[Rewarded, Float[np.ndarray, "P G"]]:
        """Two passes: rewards of the whole step first."""
        started = time.perf_counter()
        rewarded = reward(self.groups)
        controlled_PG = self.credit.controlled(rewarded.reward_PG, self.groups)
        advantage_PG = self.credit.advantages(controlled_PG)
        self.scoring = time.perf_counter() - started
        for part in self.parts(continuations=False):
            self._backward(part, False, lambda _readout, _batch, part=part: advantage_PG[part])
        return rewarded, advantage_PG

    def in_one_forward(
        self, reward: Reward, parts: Sequence[Sequence[int]]
    ) -> tuple[Rewarded, Float[np.ndarray, "P G"]]:
        """One pass: rewards of a micro-batch as soon as its hidden states are there.

        A factor that only the whole batch knows multiplies the accumulated gradient, before it is clipped.
        """
        found: list[Rewarded] = []
        width = len(self.groups[0].rollouts)
        advantage_PG = np.zeros((len(self.groups), width))
        for part in parts:
            groups = [self.groups[p] for p in part]

            def credited(readout: Readout, batch: RolloutBatch, groups=groups, part=part):
                started = time.perf_counter()
                found.append(reward(groups, _policy_scores(readout, batch, groups)))
                controlled_PG = self.credit.controlled(found[-1].reward_PG, groups)
                whole = self.credit.advantages if len(parts) == 1 else self.credit.unscaled
                advantage_PG[part] = whole(controlled_PG)
                self.scoring += time.perf_counter() - started
                return advantage_PG[part]

            self._backward(part, True, credited)
        if len(parts) > 1:
            advantage_PG *= self._rescale(self.credit.factor(advantage_PG))
        return joined(found, parts), advantage_PG

    def _rescale(self, factor: float) -> float:
        scale_gradients(self.learner.policy, factor)
        loss, count = self.sums["loss/policy"]
        self.sums["loss/policy"] = (loss * factor, count)
        return factor

    def _backward(self, part: Sequence[int], continuations: bool, credited: Advantages) -> None:
        """Forward and backward of one micro-batch."""
        groups = [self.groups[p] for p in part]
        learner, wanted = self.learner, self.wanted(continuations)
        batch = rollout_batch(
            groups,
            learner.markers,
            learner.world.device,
            learner.policy.layout,
            wanted,
            self.version,
            learner.temperature,
        )

        def read(readout: Readout) -> tuple[Tensor]:
            advantage_PG = credited(readout, batch)
            return (self._loss(readout, batch, advantage_PG, self.weight_PG[part]),)

        (loss,) = learner.policy(batch.packed, read)
        learner.backward(loss)
        add(self.sums, {"tokens/train": (float(batch.packed.num_tokens), 0.0)})

    def _loss(
        self,
        readout: Readout,
        batch: RolloutBatch,
        advantage_PG: Float[np.ndarray, "P G"],
        weight_PG: Float[np.ndarray, "P G"],
    ) -> Float[Tensor, ""]:
        """Every term of the objective, logged by itself."""
        cfg, size = self.stage.objective, self.learner.world.size
        loss = self._policy_loss(readout, batch, advantage_PG, weight_PG)
        add(self.sums, {"loss/policy": (float(loss.detach()) * size, 0.0)})
        for name, kind, weight, count in (
            ("loss/next_token", batch.text, cfg.next_token_weight, self.text_count),
            ("loss/gold", batch.continuations, cfg.gold_weight, self.gold_count),
        ):
            if kind is not None and weight:
                logp_R = readout.scores(kind).logp_R
                loss = loss + next_token_loss(logp_R, torch.full_like(logp_R, weight / count))
                nats = -float(logp_R.detach().sum(dtype=torch.float64))
                add(self.sums, {name: (nats, float(len(logp_R)))})
        return loss

    def _policy_loss(
        self,
        readout: Readout,
        batch: RolloutBatch,
        advantage_PG: Float[np.ndarray, "P G"],
        weight_PG: Float[np.ndarray, "P G"],
    ) -> Float[Tensor, ""]:
        cfg, device = self.stage.objective, self.learner.world.device
        known = {
            "behaviour_logp_R": batch.behaviour_logp_R,
            "advantage_R": per_action(advantage_PG, batch.counts, device),
            "weight_R": per_action(weight_PG, batch.counts, device),
        }
        bounds = {
            name: getattr(cfg, name) for name in ("clip_low", "clip_high", "tv_delta", "max_ratio")
        }
        found = readout.policy_loss(batch.actions, **known, ratio=Ratio(cfg.mask, **bounds))
        # The fused loss does not keep what the monitor wants.
        _, stats = policy_gradient(found.logp, **known, mask=cfg.mask, **bounds)
        count = float(len(found.logp))
        add(self.sums, {f"mismatch/{name}": (value, count) for name, value in stats.items()})
        used_R = known["weight_R"] != 0
        sums, extremes = measured(found.logp, batch.behaviour_logp_R, used_R, batch.current_R)
        add(self.sums, sums)
        raise_to(self.extremes, extremes)
        return found.loss


def _policy_scores(readout: Readout, batch: RolloutBatch, groups: Sequence[Group]) -> PolicyScores:
    assert batch.continuations is not None
    assert batch.no_think is not None
    horizons = [group.prompt.horizon for group in groups]
    per_rollout = [group.prompt.horizon for group in groups for _ in group.rollouts]
    return PolicyScores(
        _pieces(readout.constants(batch.continuations), per_rollout),
        _pieces(readout.constants(batch.no_think), horizons),
    )


def _pieces(scored: RowScores, lengths: Sequence[int]):
    return split_scores(scored.logp_R, scored.argmax_R, lengths)


def _thought_sums(groups: Sequence[Group]) -> Sums:
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    count = float(len(rollouts))
    actions = sum(rollout.num_actions for rollout in rollouts)
    closed = sum(rollout.finish == "closer" for rollout in rollouts)
    nats = -float(sum(rollout.logp.sum(dtype=np.float64) for rollout in rollouts))
    return {
        "thought/length": (float(sum(rollout.thought_len for rollout in rollouts)), count),
        "thought/closer_rate": (float(closed), count),
        "thought/nll": (nats, float(actions)),
        "tokens/rollout": (float(sum(len(rollout.ids) for rollout in rollouts)), 1.0),
    }


def _moments_of(name: str, values: Float[np.ndarray, "P G"]) -> Sums:
    centred = values - values.mean(axis=1, keepdims=True) if values.size else values
    spread = float(np.sqrt((centred**2).mean(axis=1)).sum()) if values.size else 0.0
    return {
        name: (float(values.sum()), float(values.size)),
        "reward/group_std": (spread, float(len(values))),
    }
