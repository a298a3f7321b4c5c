"""The loss of one micro-batch: the policy's term, and next-token, gold and KL terms, each logged by itself."""

from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from rlpt import dist
from rlpt.batch import RolloutBatch, per_action
from rlpt.credit import Credited
from rlpt.mismatch import Extremes, measured
from rlpt.objective import TrustRegion, kl_terms, next_token_loss, policy_gradient
from rlpt.policy.policy import Readout
from rlpt.stages import RLStage
from rlpt.types import Sums
from rlpt.update import add

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
    gold_count: float
    """Held-out tokens after all thoughts, likewise."""
    m2_threshold: float
    reference_R: Float[Tensor, " R"] | None
    """The reference's log-probabilities of the actions, where KL is in the loss."""
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
            logp_R = readout.scores(batch.continuations).logp_R
            parts.append(
                self._text("loss/gold", logp_R, self._gold_weights(batch, credited, logp_R))
            )
        return torch.stack(parts).sum()

    def _gold_weights(
        self, batch: RolloutBatch, credited: Credited, logp_R: Float[Tensor, " R"]
    ) -> Float[Tensor, " R"]:
        if credited.gold_PG is None:
            return torch.full_like(logp_R, self.stage.objective.gold_weight / self.gold_count)
        return per_action(credited.gold_PG, batch.horizons, logp_R.device)

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
        known = {
            "behaviour_logp_R": batch.behaviour_logp_R,
            "advantage_R": per_action(credited.advantage_PG, batch.counts, device),
            "weight_R": per_action(credited.weight_PG, batch.counts, device),
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
        self._monitor(logp_R, batch, known["weight_R"] != 0)
        add(self.sums, {"loss/policy": (float(loss.detach()) * self.world.size, 0.0)})
        return (
            loss
            if self.reference_R is None
            else loss + self._kl(logp_R, self.reference_R, known["weight_R"])
        )

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
            logp_R.detach(), batch.behaviour_logp_R, used_R, batch.current_R
        )
        add(self.sums, sums)
