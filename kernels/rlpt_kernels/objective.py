"""The policy-gradient coefficient of a token: the unified form of DPPO (arXiv 2602.04879, Eq. 23), in torch.

coefficient = w M sg(min(rho, max_ratio)) A with rho = pi / behaviour; the loss is -sum coefficient * log pi.
`triton_rows` restates it for the row kernel, and the tests hold one against the other.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

TrustRegion = Literal["none", "clip", "tv"]
TRUST_REGIONS: tuple[TrustRegion, ...] = ("none", "clip", "tv")
"""The row kernel knows them by their position."""


@dataclass(frozen=True)
class Ratio:
    """What is done with the importance ratio rho = pi / behaviour."""

    trust_region: TrustRegion = "none"
    clip_low: float = 0.2
    clip_high: float = 0.28
    tv_delta: float = 0.2
    max_ratio: float | None = None

    @property
    def log_low(self) -> float:
        """log(1 - clip_low): rho below it is outside; -inf where clip_low is 1 or more."""
        return math.log1p(-self.clip_low) if self.clip_low < 1 else -math.inf

    @property
    def log_high(self) -> float:
        """log(1 + clip_high)."""
        return math.log1p(self.clip_high)

    @property
    def log_cap(self) -> float:
        """log max_ratio; inf without one."""
        return math.inf if self.max_ratio is None else math.log(self.max_ratio)


class Coefficients(NamedTuple):
    """Constants of the gradient, one per token."""

    coefficient_N: Float[Tensor, " N"]
    """0 where the token is padding, outside the trust region or without advantage."""
    log_ratio_N: Float[Tensor, " N"]
    """log rho; 0 where the weight is 0."""
    masked_N: Bool[Tensor, " N"]
    """Where the update would leave the trust region further."""
    kept_N: Bool[Tensor, " N"]
    """What the loss sums over: neither padding, nor masked, nor without advantage."""

    def loss(self, logp_N: Float[Tensor, " N"]) -> Float[Tensor, ""]:
        """-sum coefficient log pi. A kept token that the policy calls impossible makes it NaN: it was sampled."""
        return -torch.where(self.kept_N, self.coefficient_N * logp_N, 0.0).sum()


def coefficients(
    logp_N: Float[Tensor, " N"],
    behaviour_logp_N: Float[Tensor, " N"],
    advantage_N: Float[Tensor, " N"],
    weight_N: Float[Tensor, " N"],
    ratio: Ratio,
) -> Coefficients:
    """M is 0 where the update would leave the trust region further.

    clip: A > 0 and rho > 1 + clip_high, or A < 0 and rho < 1 - clip_low (PPO, GRPO). tv: A > 0 and rho > 1,
    or A < 0 and rho < 1, where |pi - behaviour| > tv_delta. none: nowhere (CISPO). Rows of weight 0 are
    padding and may hold anything.
    """
    used_N = weight_N != 0
    log_ratio_N = torch.where(used_N, logp_N.detach() - behaviour_logp_N, 0.0)
    if ratio.trust_region == "none":
        masked_N = torch.zeros_like(used_N)
    elif ratio.trust_region == "clip":
        above_N = (advantage_N > 0) & (log_ratio_N > ratio.log_high)
        masked_N = above_N | ((advantage_N < 0) & (log_ratio_N < ratio.log_low))
    else:
        distance_N = (logp_N.detach().exp() - behaviour_logp_N.exp()).abs()
        masked_N = _moving_away(log_ratio_N, advantage_N) & (distance_N > ratio.tv_delta)
    kept_N = used_N & ~masked_N & (advantage_N != 0)
    capped_N = log_ratio_N.clamp(max=ratio.log_cap).exp()
    # Select, never multiply by 0: 0 * exp(garbage) is NaN.
    value_N = torch.where(kept_N, weight_N * capped_N * advantage_N, 0.0)
    return Coefficients(value_N, log_ratio_N, masked_N, kept_N)


def _moving_away(
    log_ratio_N: Float[Tensor, " N"], advantage_N: Float[Tensor, " N"]
) -> Bool[Tensor, " N"]:
    """Where the update pushes the ratio further from 1."""
    return ((advantage_N > 0) & (log_ratio_N > 0)) | ((advantage_N < 0) & (log_ratio_N < 0))
