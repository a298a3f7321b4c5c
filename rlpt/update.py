"""One optimiser step. The reward is computed inside it, so that later one forward can serve reward and loss.

FSDP averages gradients over ranks; every denominator here is a count over the whole step, so each loss is multiplied by
the number of ranks to undo the mean. Nothing is divided per micro-batch.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.distributed.tensor import DTensor

from rlpt import dist, rng
from rlpt.advantage import Moments, advantage, batch_moments
from rlpt.batch import Weighted, action_batch, framed_batch, split_documents
from rlpt.frames import Framed
from rlpt.objective import next_token_loss, policy_gradient, token_weights
from rlpt.optim import learning_rate, set_learning_rate
from rlpt.policy.load import local
from rlpt.policy.policy import Policy
from rlpt.reward.control import constant, permuted, random_like
from rlpt.reward.rewards import Reward, Rewarded
from rlpt.stages import NextTokenStage, OptimizerConfig, RLStage
from rlpt.types import Group, Markers, Sums
from rlpt_data.strict import UserError


@dataclass
class Learner:
    """What an update changes, and where it runs."""

    policy: Policy
    optimizer: torch.optim.Optimizer
    ema: Policy | None
    markers: Markers
    world: dist.World
    seed: int


@dataclass(frozen=True)
class Stepped:
    """Local sums of one step, and what the rollout dump shows."""

    sums: Sums
    grad_norm: float
    rewarded: Rewarded | None = None
    advantage_PG: np.ndarray | None = None


def rl_step(
    learner: Learner,
    groups: Sequence[Group],
    reward: Reward,
    stage: RLStage,
    step: int,
    stage_step: int,
) -> Stepped:
    """groups -> reward -> advantage -> loss -> update. ``groups`` are this rank's share of the step."""
    started = time.perf_counter()
    rewarded = reward(groups)
    reward_PG = _controlled(rewarded.reward_PG, groups, stage, learner, step)
    advantage_PG = _advantages(reward_PG, stage, learner.world)
    scored = time.perf_counter()
    weighted = _weighted(groups, advantage_PG, stage, learner.world)
    sums = _policy_gradient(learner, weighted, stage)
    norm = apply_gradients(learner, stage.optimizer, stage_step, stage.steps, stage.ema_decay)
    sums |= rewarded.sums | _moments_of("reward/mean", reward_PG) | _thought_sums(groups)
    sums |= {
        "time/score": (scored - started, 1.0),
        "time/train": (time.perf_counter() - scored, 1.0),
    }
    return Stepped(sums, norm, rewarded, advantage_PG)


def next_token_step(
    learner: Learner, frames: Sequence[Framed], stage: NextTokenStage, stage_step: int
) -> Stepped:
    """The same update with next-token prediction as its only objective."""
    started = time.perf_counter()
    count = dist.total([sum(frame.num_targets for frame in frames)], learner.world)[0]
    if not count:
        raise UserError(
            f"stage {stage.name}: no token of this step is a target; raise window_tokens or "
            "documents_per_step, or prepare documents with more target_spans"
        )
    sums: Sums = {}
    for start in range(0, len(frames), stage.micro_batch):
        packed, kinds = framed_batch(
            frames[start : start + stage.micro_batch], learner.markers, learner.world.device
        )
        scored = learner.policy(packed, kinds)
        losses = [
            next_token_loss(kind.logp_R, torch.full_like(kind.logp_R, 1.0 / count))
            for kind in scored
        ]
        (torch.stack(losses).sum() * learner.world.size).backward()
        for name, kind in zip(("loss/next_token", "loss/thought"), scored, strict=True):
            _add(
                sums,
                {
                    name: (
                        -float(kind.logp_R.detach().sum(dtype=torch.float64)),
                        float(len(kind.logp_R)),
                    )
                },
            )
    norm = apply_gradients(learner, stage.optimizer, stage_step, stage.steps, stage.ema_decay)
    tokens = sum(
        len(frame.trunk.ids[: frame.branch.cut]) + len(frame.branch.ids) for frame in frames
    )
    sums |= {
        "time/train": (time.perf_counter() - started, 1.0),
        "tokens/train": (float(tokens), 1.0),
    }
    return Stepped(sums, norm)


def _controlled(
    reward_PG: np.ndarray, groups: Sequence[Group], stage: RLStage, learner: Learner, step: int
) -> np.ndarray:
    """Apply a training control; its draws belong to the prompt, so ranks cannot change them."""
    if stage.reward_control == "none":
        return reward_PG
    if stage.reward_control == "constant":
        return constant(reward_PG)
    draws = [
        rng.generator(learner.seed, stage.reward_control, step, *group.prompt.key)
        for group in groups
    ]
    if stage.reward_control == "permuted":
        return permuted(reward_PG, draws)
    moments = _reduced(batch_moments(reward_PG), learner.world)
    return random_like(reward_PG, moments, draws)


def _advantages(reward_PG: np.ndarray, stage: RLStage, world: dist.World) -> np.ndarray:
    cfg = stage.advantage
    if cfg.scale != "batch_std":
        return advantage(reward_PG, baseline=cfg.baseline, scale=cfg.scale, moments=None)
    centred_PG = advantage(reward_PG, baseline=cfg.baseline, scale="none", moments=None)
    return advantage(
        reward_PG,
        baseline=cfg.baseline,
        scale=cfg.scale,
        moments=_reduced(batch_moments(centred_PG), world),
    )


def _reduced(moments: Moments, world: dist.World) -> Moments:
    return Moments(*dist.total([moments.count, moments.total, moments.total_square], world))


def _weighted(
    groups: Sequence[Group], advantage_PG: np.ndarray, stage: RLStage, world: dist.World
) -> list[Weighted]:
    """Attach advantages and the weights that hold the step's denominators."""
    counts = [[rollout.num_actions for rollout in group.rollouts] for group in groups]
    actions, prompts = dist.total([float(sum(map(sum, counts))), float(len(groups))], world)
    weight_PG = token_weights(
        counts, stage.objective.aggregate, total_actions=actions, num_prompts=prompts
    )
    return [
        Weighted(*item) for item in zip(groups, advantage_PG, np.asarray(weight_PG), strict=True)
    ]


def _policy_gradient(learner: Learner, weighted: Sequence[Weighted], stage: RLStage) -> Sums:
    cfg = stage.objective
    text_count = _text_count(weighted, learner.world) if cfg.next_token_weight else 1.0
    sums: Sums = {}
    tokens = 0
    for items in split_documents(weighted, stage.micro_batch):
        batch = action_batch(
            items, learner.markers, learner.world.device, with_text=cfg.next_token_weight > 0
        )
        kinds = [batch.actions] if batch.trunk_text is None else [batch.actions, batch.trunk_text]
        scored = learner.policy(batch.packed, kinds)
        loss, stats = policy_gradient(
            scored[0].logp_R, batch.behaviour_logp_R, batch.advantage_R, batch.weight_R,
            mask=cfg.mask, clip_low=cfg.clip_low, clip_high=cfg.clip_high, tv_delta=cfg.tv_delta,
            max_ratio=cfg.max_ratio,
        )  # fmt: skip
        _add(
            sums,
            {"loss/policy": (float(loss.detach()), 1.0)} | _mismatch(stats, len(batch.weight_R)),
        )
        if batch.trunk_text is not None:
            logp_R = scored[1].logp_R
            loss = loss + next_token_loss(
                logp_R, torch.full_like(logp_R, cfg.next_token_weight / text_count)
            )
            _add(
                sums,
                {
                    "loss/next_token": (
                        -float(logp_R.detach().sum(dtype=torch.float64)),
                        float(len(logp_R)),
                    )
                },
            )
        (loss * learner.world.size).backward()
        tokens += batch.num_tokens
    sums["loss/policy"] = (sums["loss/policy"][0] * learner.world.size, 1.0)
    return sums | {"tokens/train": (float(tokens), 1.0)}


def _text_count(weighted: Sequence[Weighted], world: dist.World) -> float:
    trunks = {
        id(item.group.prompt.trunk): len(item.group.prompt.trunk.ids) - 1 for item in weighted
    }
    return dist.total([float(sum(trunks.values()))], world)[0]


def _mismatch(stats: dict[str, float], count: int) -> Sums:
    return {f"mismatch/{name}": (value, float(count)) for name, value in stats.items()}


def apply_gradients(
    learner: Learner, cfg: OptimizerConfig, stage_step: int, steps: int, ema_decay: float
) -> float:
    """Clip, check, step, move the EMA. Raises FloatingPointError on a gradient that is not finite, changing nothing."""
    norm = torch.nn.utils.clip_grad_norm_(learner.policy.parameters(), cfg.clip_norm)
    grad_norm = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    if not math.isfinite(grad_norm):
        learner.optimizer.zero_grad()
        raise FloatingPointError(
            f"gradient norm is {grad_norm}; the weights were left as they were before this step"
        )
    set_learning_rate(learner.optimizer, learning_rate(cfg, stage_step, steps))
    learner.optimizer.step()
    learner.optimizer.zero_grad()
    if learner.ema is not None:
        move_ema(learner.ema, learner.policy, ema_decay)
    return grad_norm


@torch.no_grad()
def move_ema(ema: Policy, policy: Policy, decay: float) -> None:
    """ema <- decay * ema + (1 - decay) * policy, shard by shard."""
    for average, parameter in zip(ema.parameters(), policy.parameters(), strict=True):
        local(average).lerp_(local(parameter), 1.0 - decay)


def _thought_sums(groups: Sequence[Group]) -> Sums:
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    count = float(len(rollouts))
    actions = sum(rollout.num_actions for rollout in rollouts)
    return {
        "thought/length": (float(sum(rollout.thought_len for rollout in rollouts)), count),
        "thought/closer_rate": (
            float(sum(rollout.finish == "closer" for rollout in rollouts)),
            count,
        ),
        "thought/nll": (
            -float(sum(rollout.logp.sum(dtype=np.float64) for rollout in rollouts)),
            float(actions),
        ),
        "tokens/rollout": (float(sum(len(rollout.ids) for rollout in rollouts)), 1.0),
    }


def _moments_of(name: str, values: np.ndarray) -> Sums:
    centred = values - values.mean(axis=1, keepdims=True) if values.size else values
    spread = float(np.sqrt((centred**2).mean(axis=1)).sum()) if values.size else 0.0
    return {
        name: (float(values.sum()), float(values.size)),
        "reward/group_std": (spread, float(len(values))),
    }


def _add(into: Sums, more: Sums) -> None:
    for name, (value, count) in more.items():
        old_value, old_count = into.get(name, (0.0, 0.0))
        into[name] = (old_value + value, old_count + count)
