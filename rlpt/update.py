"""What an update changes and how: gradients into weights, and the next-token step.

FSDP averages gradients over ranks; every denominator is a count over the whole step, so each loss is multiplied by the
number of ranks to undo the mean. Nothing is divided per micro-batch.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from rlpt import dist
from rlpt.advantage import RESOLUTION
from rlpt.batch import framed_batch, split_padded
from rlpt.critic import Critic
from rlpt.faults import Faults
from rlpt.frames import Framed
from rlpt.guards import PREFIX
from rlpt.mismatch import Extremes, finished
from rlpt.objective import next_token_loss
from rlpt.optim import learning_rate, set_learning_rate
from rlpt.phases import CLOCK
from rlpt.policy.load import local
from rlpt.policy.policy import Policy, scores_of
from rlpt.policy.scoring import Scorer
from rlpt.reward.base import Rewarded
from rlpt.stages import NextTokenStage, OptimizerConfig
from rlpt.types import Markers, Sums
from rlpt_data.strict import UserError


class LossScale:
    """What a loss is multiplied by before its backward, and gradients are divided by after it: float16 has nothing
    below 6e-8. Halved where a step overflows, which is skipped, doubled after `PATIENCE` good ones (Micikevicius et
    al. 2018, "Mixed precision training"). Always 1 in other dtypes.
    """

    FIRST, PATIENCE = 2.0**14, 500

    def __init__(self, dtype: str) -> None:
        self.moves = dtype == "float16"
        self.state = torch.tensor([self.FIRST if self.moves else 1.0, 0.0], dtype=torch.float64)
        """The scale, and good steps since it changed: a part of the checkpoint, read in place."""

    @property
    def value(self) -> float:
        return float(self.state[0])

    def good(self) -> None:
        if self.moves:
            self.state[1] += 1
            if self.state[1] >= self.PATIENCE:
                self.state[0], self.state[1] = self.state[0] * 2, 0.0

    def overflowed(self) -> bool:
        """Halve it; False where that is no remedy, because the loss itself is not finite."""
        if not self.moves or self.value <= 1.0:
            return False
        self.state[0], self.state[1] = self.state[0] / 2, 0.0
        return True


@dataclass
class Learner:
    """What an update changes, and where it runs."""

    policy: Policy
    optimizer: torch.optim.Optimizer
    ema: Policy | None
    markers: Markers
    world: dist.World
    seed: int
    temperature: float = 1.0
    """At which thoughts are sampled."""
    scale: LossScale = field(default_factory=lambda: LossScale("float32"))
    reference: Scorer | None = None
    """Scores what was sampled under the reference policy, at the temperature it was sampled at."""
    critic: Critic | None = None
    noise: float = RESOLUTION
    """Standard deviation that rounding gives a mean log-probability of the continuation."""

    def backward(self, loss: Float[torch.Tensor, ""]) -> None:
        """FSDP averages over ranks; the factor undoes the mean."""
        (loss * (self.world.size * self.scale.value)).backward()
        CLOCK.beat()


@dataclass(frozen=True)
class Stepped:
    """Local sums and extremes of one step, and what the rollout dump shows."""

    sums: Sums
    grad_norm: float
    rewarded: Rewarded | None = None
    advantage_PG: np.ndarray | None = None
    extremes: Extremes = field(default_factory=dict)
    skipped: tuple[str, ...] = ()
    """What was not finite, on any rank, so that nothing was trained on; empty: the step was taken."""


class Applied(NamedTuple):
    """What became of a step's gradients, the same on every rank."""

    grad_norm: float
    skipped: tuple[str, ...]
    """As in `Stepped`."""


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
    faults = Faults()
    lengths = [frame.branch.cut + len(frame.branch.ids) for frame in frames]
    for part in split_padded(lengths, stage.micro_batch_tokens, learner.world):
        packed, kinds = framed_batch(
            [frames[i] for i in part], learner.markers, learner.world.device
        )
        scored = learner.policy(packed, scores_of(kinds))
        losses = [
            next_token_loss(kind.logp_R, torch.full_like(kind.logp_R, 1.0 / count))
            for kind in scored
        ]
        loss = torch.stack(losses).sum()
        faults.loss(float(loss.detach()), [frames[i].trunk.document for i in part])
        learner.backward(loss)
        for name, kind in zip(("loss/next_token", "loss/thought"), scored, strict=True):
            add(
                sums,
                {
                    name: (
                        -float(kind.logp_R.detach().sum(dtype=torch.float64)),
                        float(len(kind.logp_R)),
                    )
                },
            )
    applied = apply_gradients(
        *(learner, stage.optimizer, stage_step, stage.steps, stage.ema_decay), faults
    )
    sums |= {
        "time/train": (time.perf_counter() - started, 1.0),
        "tokens/train": (float(sum(lengths)), 1.0),
    }
    return Stepped(sums, applied.grad_norm, skipped=applied.skipped)


def apply_gradients(
    learner: Learner,
    cfg: OptimizerConfig,
    stage_step: int,
    steps: int,
    ema_decay: float,
    faults: Faults,
) -> Applied:
    """Clip, step, move the EMA; nothing where a reward, a loss or the gradient was not finite on any rank. Collective.

    A step that is skipped leaves weights, moments, EMA, critic and their bias corrections bit for bit as they were. It
    counts all the same: its documents are consumed, the learning rate goes on along its schedule, the version of the
    weights rises. In float16 a gradient that overflows is no fault while a smaller scale may be the remedy; its norm
    is then 0.
    """
    if learner.scale.value != 1.0:
        scale_gradients(learner.policy, 1.0 / learner.scale.value)
    parameters = list(learner.policy.parameters())
    norm = get_total_norm([each.grad for each in parameters if each.grad is not None])
    grad_norm = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    if learner.critic is not None and not learner.critic.has_finite_gradients:
        faults.found.append("the gradient of the critic is not finite")
    skipped = faults.everyones(learner.world)
    if not skipped and not math.isfinite(grad_norm):
        if learner.scale.overflowed():
            _drop_gradients(learner)
            return Applied(0.0, ())
        skipped = _where_not_finite(learner, grad_norm)
    if skipped:
        _drop_gradients(learner)
        return Applied(grad_norm, skipped)
    clip_grads_with_norm_(parameters, cfg.clip_norm, norm)
    rate = learning_rate(cfg, stage_step, steps)
    set_learning_rate(learner.optimizer, rate)
    learner.optimizer.step()
    if learner.critic is not None:
        learner.critic.step(rate, learner.scale.value)
    learner.optimizer.zero_grad()
    learner.scale.good()
    if learner.ema is not None:
        move_ema(learner.ema, learner.policy, ema_decay)
    return Applied(grad_norm, ())


def _drop_gradients(learner: Learner) -> None:
    learner.optimizer.zero_grad()
    if learner.critic is not None:
        learner.critic.optimizer.zero_grad()


def _where_not_finite(learner: Learner, grad_norm: float) -> tuple[str, ...]:
    """What is known of a gradient whose norm is not finite. By now it is the sum over ranks: the rank is that of the
    shard. Collective."""
    named = Faults(
        [
            f"the gradient of {name} is not finite"
            for name, each in learner.policy.named_parameters()
            if each.grad is not None and not bool(local(each.grad).isfinite().all())
        ]
    ).everyones(learner.world)
    return named or (f"the norm of the gradient is {grad_norm}, though every entry is finite",)


@torch.no_grad()
def scale_gradients(policy: Policy, factor: float) -> None:
    """Multiply what was accumulated, shard by shard."""
    for parameter in policy.parameters():
        if parameter.grad is not None:
            local(parameter.grad).mul_(factor)


@torch.no_grad()
def move_ema(ema: Policy, policy: Policy, decay: float) -> None:
    """ema <- decay * ema + (1 - decay) * policy, shard by shard."""
    for average, parameter in zip(ema.parameters(), policy.parameters(), strict=True):
        local(average).lerp_(local(parameter), 1.0 - decay)


def add(into: Sums, more: Sums) -> None:
    """Add sums and counts, name by name."""
    for name, (value, count) in more.items():
        old_value, old_count = into.get(name, (0.0, 0.0))
        into[name] = (old_value + value, old_count + count)


def reduced(sums: Sums, extremes: Extremes, world: dist.World) -> dict[str, float]:
    """Ratios of sums over all ranks, and what they and the extremes make of the mismatch; ``tokens/*`` are totals, they
    are not divided. A mean over nothing is left out. Collective.
    """
    names, peaks = sorted(sums), sorted(extremes)
    flat = dist.total([value for name in names for value in sums[name]], world)
    totals = dict(zip(names, zip(flat[::2], flat[1::2], strict=True), strict=True))
    largest = dist.greatest([extremes[name] for name in peaks], world)
    means = {
        name: value if name.startswith("tokens/") else value / count
        for name, (value, count) in totals.items()
        if not name.startswith(PREFIX) and (count or name.startswith("tokens/"))
    }
    return means | finished(totals, dict(zip(peaks, largest, strict=True)))
