"""The loss of one micro-batch: the policy's term, and next-token, gold and KL terms, each logged by itself."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from rlpt import dist
from rlpt.batch import RolloutBatch, per_action
from rlpt.credit import Credited
from rlpt.critic import Critic, Estimated, estimated
from rlpt.mismatch import Extremes, measured
from rlpt.objective import TrustRegion, kl_terms, next_token_loss, policy_gradient
from rlpt.policy.policy import Readout
from rlpt.stages import RLStage
from rlpt.types import Sums
from rlpt.update import Learner, add

_BOUNDS = (
    "mask",
    "clip_low",
    "clip_high",
    "tv_delta",
    "max_ratio",
    "ratio",
    "band_low",
    "band_high",
)


@dataclass
class Terms:
    """What the losses of one micro-batch need beside its rows."""

    stage: RLStage
    world: dist.World
    text_count: float
    """Tokens of the next-token term, over all ranks and micro-batches."""
    m2_threshold: float
    reference_R: Float[Tensor, " R"] | None
    """The reference's log-probabilities of the actions, where KL is in the loss."""
    critic: Critic | None = None
    offset: float = 0.0
    """What is taken off every advantage of the critic."""
    sums: Sums = field(default_factory=dict)
    extremes: Extremes = field(default_factory=dict)

    def loss(self, readout: Readout, batch: RolloutBatch, credited: Credited) -> Float[Tensor, ""]:
        """Every term of the objective."""
        parts = [self._policy(readout, batch, credited)]
        if (weight := self.stage.objective.next_token_weight) and batch.text is not None:
            logp_R = readout.scores(batch.text).logp_R
            each = weight / max(self.text_count, 1.0)
            parts.append(self._text("loss/next_token", logp_R, torch.full_like(logp_R, each)))
        if self.stage.objective.gold_weight and batch.continuations is not None:
            assert credited.gold_PG is not None
            logp_R = readout.scores(batch.continuations).logp_R
            weight_R = per_action(credited.gold_PG, batch.horizons, logp_R.device)
            parts.append(self._text("loss/gold", logp_R, weight_R))
        return torch.stack(parts).sum()

    def _text(
        self, name: str, logp_R: Float[Tensor, " R"], weight_R: Float[Tensor, " R"]
    ) -> Float[Tensor, ""]:
        nats = -float(logp_R.detach().sum(dtype=torch.float64))
        add(self.sums, {name: (nats, float(len(logp_R)))})
        return next_token_loss(logp_R, weight_R)

    def _policy(
        self, readout: Readout, batch: RolloutBatch, credited: Credited
    ) -> Float[Tensor, ""]:
        cfg, device = self.stage.objective, self.world.device
        region = TrustRegion(**{name: getattr(cfg, name) for name in _BOUNDS})
        weight_R = per_action(credited.weight_PG, batch.counts, device)
        advantage_R, value_loss = self._advantages(readout, batch, credited, weight_R)
        known = {
            "behaviour_logp_R": batch.behaviour_logp_R,
            "advantage_R": advantage_R,
            "weight_R": weight_R,
        }
        fused = cfg.fused and self.reference_R is None
        found = readout.policy_loss(batch.actions, **known, ratio=region.kernel) if fused else None
        logp_R = readout.scores(batch.actions).logp_R if found is None else found.logp
        # The fused loss does not keep what the monitor wants.
        loss, stats = policy_gradient(
            logp_R, **known, region=region, lengths=batch.counts, m2_threshold=self.m2_threshold
        )
        loss = loss if found is None else found.loss
        count = float(len(logp_R))
        add(self.sums, {f"mismatch/{name}": (value, count) for name, value in stats.items()})
        self._monitor(logp_R, batch, weight_R != 0)
        add(self.sums, {"loss/policy": (float(loss.detach()) * self.world.size, 0.0)})
        if value_loss is not None:
            loss = loss + value_loss
        if self.reference_R is not None:
            loss = loss + self._kl(logp_R, self.reference_R, weight_R)
        return loss

    def _advantages(
        self,
        readout: Readout,
        batch: RolloutBatch,
        credited: Credited,
        weight_R: Float[Tensor, " R"],
    ) -> tuple[Float[Tensor, " R"], Float[Tensor, ""] | None]:
        """Of every action: its rollout's; or, with a critic, its own, and the critic's loss."""
        cfg = self.stage.objective.critic
        if cfg is None or self.critic is None:
            return per_action(credited.advantage_PG, batch.counts, weight_R.device), None
        value_RK = self.critic(readout.hidden(batch.actions))
        found = estimated(value_RK, credited.advantage_PG.reshape(-1), batch.counts, cfg)
        error_RK = value_RK - torch.from_numpy(found.return_RK).to(value_RK)
        loss = cfg.weight * 0.5 * (weight_R * (error_RK**2).mean(dim=1)).sum()
        add(self.sums, {"loss/value": (float(loss.detach()) * self.world.size, 0.0)})
        return torch.from_numpy(found.advantage_R - self.offset).to(value_RK), loss

    def _kl(
        self,
        logp_R: Float[Tensor, " R"],
        reference_R: Float[Tensor, " R"],
        weight_R: Float[Tensor, " R"],
    ) -> Float[Tensor, ""]:
        """weight x sum w_r k(log pi_r - log ref_r), the actions weighted as in the policy's term."""
        kl = self.stage.kl
        used_R = weight_R != 0
        # Select, never multiply by 0: exp(-garbage) may be infinite.
        value_R = kl_terms(torch.where(used_R, logp_R - reference_R, 0.0), kl.estimator)
        loss = kl.weight * (weight_R * value_R).sum()
        add(self.sums, {"loss/kl": (float(loss.detach()) * self.world.size, 0.0)})
        return loss

    def _monitor(self, logp_R: Float[Tensor, " R"], batch: RolloutBatch, used_R: Tensor) -> None:
        sums, self.extremes = measured(
            logp_R.detach(), batch.behaviour_logp_R, used_R & batch.watched_R, batch.current_R
        )
        add(self.sums, sums)


@torch.no_grad()
def mean_advantage(
    learner: Learner, stage: RLStage, batches: Iterable[tuple[RolloutBatch, Credited]]
) -> float:
    """By the critic, over the step's actions that count; ``batches`` are this rank's. Collective."""
    cfg, critic = stage.objective.critic, learner.critic
    assert cfg is not None
    assert critic is not None
    total = np.zeros(2)
    for batch, credited in batches:

        def read(readout: Readout, batch=batch, credited=credited) -> Estimated:
            value_RK = critic(readout.hidden(batch.actions))
            return estimated(value_RK, credited.advantage_PG.reshape(-1), batch.counts, cfg)

        advantage_R = learner.policy(batch.packed, read).advantage_R
        counts_R = np.repeat(credited.weight_PG.reshape(-1) != 0, batch.counts)
        total += (advantage_R[counts_R].sum(), counts_R.sum())
    learner.policy.reshard()
    summed, count = dist.total(total.tolist(), learner.world)
    return summed / max(count, 1.0)
