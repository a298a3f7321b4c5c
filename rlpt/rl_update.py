"""One optimiser step of reinforcement learning: groups -> reward -> advantage -> loss -> update.

Rewards are read off the forward that is trained wherever that gives the same weights as a scoring pass of its own
(MEASURING, section 7): the body runs once, the head first on the held-out rows without gradient, then, fused with the
policy loss, on the actions.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float
from torch import Tensor

from rlpt import dist
from rlpt.advantage import Mask
from rlpt.batch import (
    RolloutBatch,
    Wanted,
    documents,
    padded_costs,
    rollout_batch,
    split_evenly,
    text_positions,
)
from rlpt.credit import Credit, Credited
from rlpt.faults import Faults, solid
from rlpt.gaming import thought_sums
from rlpt.loss_terms import Terms, mean_advantage
from rlpt.mismatch import Extremes, raise_to
from rlpt.objective import m2_threshold
from rlpt.policy.policy import Readout, RowScores
from rlpt.policy.scoring import split_scores
from rlpt.reference import Reference, action_logps, action_scorer, rollouts
from rlpt.reward.base import PolicyScores, Reward, Rewarded, joined
from rlpt.reward.gates import kept
from rlpt.stages import RLStage
from rlpt.types import Group, Sums
from rlpt.update import Learner, Stepped, add, apply_gradients, scale_gradients

Crediting = Callable[[Readout, RolloutBatch], Credited]
"""The credit of one micro-batch; may ask its forward for the scores that rewards are made of."""


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
    update = _Update(
        learner,
        groups,
        stage,
        Credit(stage, learner.world, learner.seed, step, learner.noise),
        step,
    )
    parts = update.parts(continuations=True)
    together = _reads_training_forward(stage, whole=len(parts) == 1)
    if together:
        rewarded, advantage_PG = update.in_one_forward(reward, parts)
    else:
        rewarded, advantage_PG = update.after_scoring(reward)
    applied = apply_gradients(
        *(learner, stage.optimizer, stage_step, stage.steps, stage.ema_decay), update.faults
    )
    controlled_PG = update.credit.controlled(solid(rewarded.reward_PG), groups)
    sums = update.sums | rewarded.sums | _moments_of("reward/mean", controlled_PG)
    sums |= thought_sums(groups, advantage_PG) | {
        "update/one_forward": (float(together), 1.0),
        "time/score": (update.scoring, 1.0),
        "time/train": (time.perf_counter() - started - update.scoring, 1.0),
    }
    return Stepped(
        sums, applied.grad_norm, rewarded, advantage_PG, update.extremes, applied.skipped
    )


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
    credit = Credit(stage, learner.world, learner.seed, step, learner.noise)
    reference, faults = Reference(learner, stage.kl, groups), Faults()
    rewarded = reward(groups)
    reward_PG = _controlled(rewarded, groups, range(len(groups)), credit, reference, faults)
    advantage_PG = credit.advantages(reward_PG, credit.admitted(reward_PG, rewarded.kept_PG))
    controlled_PG = credit.controlled(solid(rewarded.reward_PG), groups)
    sums = rewarded.sums | _moments_of("reward/mean", controlled_PG)
    sums |= thought_sums(groups, advantage_PG) | reference.sums
    sums |= {"time/score": (time.perf_counter() - started, 1.0)}
    skipped = faults.everyones(learner.world)
    return Stepped(sums, 0.0, rewarded, advantage_PG, skipped=skipped)


def _controlled(
    rewarded: Rewarded,
    groups: Sequence[Group],
    part: Sequence[int],
    credit: Credit,
    reference: Reference,
    faults: Faults,
) -> Float[np.ndarray, "P G"]:
    """Rewards as advantages are made of them: under a training control, less what KL costs; all of them finite."""
    reward_PG = faults.rewards(rewarded.reward_PG, rewarded.kept_PG, groups)
    reward_PG = reference.penalized(credit.controlled(reward_PG, groups), part)
    return faults.rewards(reward_PG, rewarded.kept_PG, groups)


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
    m2_threshold: float = math.inf
    offset: float = 0.0
    """Of a critic's advantages."""
    faults: Faults = field(default_factory=Faults)

    def __post_init__(self) -> None:
        wanted = self.wanted(continuations=False)
        text = sum(len(at) for _, at in text_positions(self.groups, wanted))
        (self.text_count,) = dist.total([float(text)], self.learner.world)
        self.reference = Reference(self.learner, self.stage.kl, self.groups)
        # Losses are sums over the step: every rank counts once, whatever its micro-batches.
        kl, critic = self.stage.kl, self.stage.objective.critic
        used = {"loss/kl": kl.weight and kl.placement == "loss", "loss/value": critic is not None}
        add(self.sums, self.reference.sums | {name: (0.0, 1.0) for name in used if used[name]})

    def wanted(self, continuations: bool) -> Wanted:
        cfg = self.stage.objective
        return Wanted(
            continuations or cfg.gold_weight > 0, cfg.next_token_weight > 0, cfg.next_token_targets
        )

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
        credited = self._credited(rewarded, range(len(self.groups)))
        if self.stage.objective.mask == "m2":
            self.m2_threshold = self._threshold(credited)
        parts, critic = self.parts(continuations=False), self.stage.objective.critic
        if critic is not None and critic.centre:
            batches = ((self._batch(part, False), credited.part(part)) for part in parts)
            self.offset = mean_advantage(self.learner, self.stage, batches)
            add(self.sums, {"critic/offset": (self.offset, 1.0)})
        self.scoring = time.perf_counter() - started
        for part in parts:
            self._backward(part, False, lambda _readout, _batch, part=part: credited.part(part))
        return rewarded, credited.advantage_PG

    def _credited(self, rewarded: Rewarded, part: Sequence[int]) -> Credited:
        """The credit of all groups of the step."""
        reward_PG = self._controlled(rewarded, part)
        kept_PG = self.credit.admitted(reward_PG, rewarded.kept_PG)
        weight_PG = self.credit.weights(self.groups, kept_PG)
        if self.stage.advantage.min_std and len(reward_PG):
            kept = len(reward_PG) if kept_PG is None else int(kept_PG.any(axis=1).sum())
            add(self.sums, {"reward/admitted": (float(kept), float(len(reward_PG)))})
        advantage_PG = self.credit.advantages(reward_PG, kept_PG)
        count = self.credit.gold_count(self.groups, kept_PG)
        gold_PG = self._gold(rewarded, part, weight_PG, kept_PG, count)
        return Credited(advantage_PG, weight_PG, gold_PG)

    def _controlled(self, rewarded: Rewarded, part: Sequence[int]) -> Float[np.ndarray, "P G"]:
        groups = [self.groups[p] for p in part]
        return _controlled(rewarded, groups, part, self.credit, self.reference, self.faults)

    def _gold(
        self,
        rewarded: Rewarded,
        part: Sequence[int],
        weight_PG: Float[np.ndarray, "P G"],
        kept_PG: Mask | None,
        count: float,
    ) -> Float[np.ndarray, "P G"] | None:
        if not self.stage.objective.gold_weight:
            return None
        assert rewarded.gold_PG is not None
        groups = [self.groups[p] for p in part]
        return self.credit.gold_weights(groups, rewarded.gold_PG, weight_PG, kept_PG, count)

    def _threshold(self, credited: Credited) -> float:
        """Of M2PO, over the actions of the whole step that count. Collective."""
        learner = self.learner
        scorer = action_scorer(learner.policy, learner, self.stage.micro_batch_tokens)
        ratios = [
            logp - rollout.logp[rollout.action]
            for logp, rollout in zip(
                action_logps(scorer, self.groups), rollouts(self.groups), strict=True
            )
        ]
        lengths = [len(ratio) for ratio in ratios]
        advantage_R = np.repeat(credited.advantage_PG.reshape(-1), lengths)
        counts_R = np.repeat(credited.weight_PG.reshape(-1) != 0, lengths)
        mine = (np.concatenate([*ratios, np.zeros(0)])[counts_R], advantage_R[counts_R])
        whole = [
            np.concatenate(each) for each in zip(*dist.gathered(mine, learner.world), strict=True)
        ]
        return m2_threshold(*whole, limit=self.stage.objective.m2_limit)

    def in_one_forward(
        self, reward: Reward, parts: Sequence[Sequence[int]]
    ) -> tuple[Rewarded, Float[np.ndarray, "P G"]]:
        """One pass: rewards of a micro-batch as soon as its hidden states are there.

        A factor that only the whole batch knows multiplies the accumulated gradient, before it is clipped.
        """
        found: list[Rewarded] = []
        width = len(self.groups[0].rollouts)
        advantage_PG = np.zeros((len(self.groups), width))
        kept_PG = kept(self.groups, self.stage.gates)
        weight_PG = self.credit.weights(self.groups, kept_PG)
        count = self.credit.gold_count(self.groups, kept_PG)
        for part in parts:

            def credited(readout: Readout, batch: RolloutBatch, part=part) -> Credited:
                started = time.perf_counter()
                groups = [self.groups[p] for p in part]
                found.append(reward(groups, _policy_scores(readout, batch, groups)))
                if len(parts) == 1:
                    credit = self._credited(found[-1], part)
                else:
                    credit = self._unscaled(found[-1], part, weight_PG[part], count)
                advantage_PG[part] = credit.advantage_PG
                self.scoring += time.perf_counter() - started
                return credit

            self._backward(part, True, credited)
        if len(parts) > 1:
            advantage_PG *= self._rescale(self.credit.factor(advantage_PG, kept_PG))
        return joined(found, parts), advantage_PG

    def _unscaled(
        self,
        rewarded: Rewarded,
        part: Sequence[int],
        weight_PG: Float[np.ndarray, "P G"],
        count: float,
    ) -> Credited:
        """The credit of one micro-batch, but for the factor that only the whole step knows."""
        advantage_PG = self.credit.unscaled(self._controlled(rewarded, part), rewarded.kept_PG)
        gold_PG = self._gold(rewarded, part, weight_PG, rewarded.kept_PG, count)
        return Credited(advantage_PG, weight_PG, gold_PG)

    def _rescale(self, factor: float) -> float:
        scale_gradients(self.learner.policy, factor)
        loss, count = self.sums["loss/policy"]
        self.sums["loss/policy"] = (loss * factor, count)
        return factor

    def _batch(self, part: Sequence[int], continuations: bool) -> RolloutBatch:
        learner = self.learner
        return rollout_batch(
            [self.groups[p] for p in part],
            learner.markers,
            learner.world.device,
            learner.policy.layout,
            self.wanted(continuations),
            self.version,
            learner.temperature,
        )

    def _backward(self, part: Sequence[int], continuations: bool, crediting: Crediting) -> None:
        """Forward and backward of one micro-batch."""
        learner, batch = self.learner, self._batch(part, continuations)
        reference_R = self.reference.rows(part, learner.world.device)
        terms = Terms(
            self.stage,
            learner.world,
            self.text_count,
            self.m2_threshold,
            reference_R,
            learner.critic,
            self.offset,
        )

        def read(readout: Readout) -> tuple[Tensor]:
            return (terms.loss(readout, batch, crediting(readout, batch)),)

        (loss,) = learner.policy(batch.packed, read)
        self.faults.loss(float(loss.detach()), [self.groups[p].prompt.trunk.document for p in part])
        learner.backward(loss)
        add(self.sums, terms.sums | {"tokens/train": (float(batch.packed.num_tokens), 0.0)})
        raise_to(self.extremes, terms.extremes)


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


def _moments_of(name: str, values: Float[np.ndarray, "P G"]) -> Sums:
    centred = values - values.mean(axis=1, keepdims=True) if values.size else values
    spread = float(np.sqrt((centred**2).mean(axis=1)).sum()) if values.size else 0.0
    return {
        name: (float(values.sum()), float(values.size)),
        "reward/group_std": (spread, float(len(values))),
    }
