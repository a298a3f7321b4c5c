"""Objectives: pure functions from log-probabilities to a scalar whose gradient is the update.

Every row carries its weight, which already holds the denominator of the *whole step*: all
micro-batches, all ranks. A denominator of one micro-batch would weigh a token by the company it
keeps, and the gradient would change with the way the step happened to be split. Rows of weight 0
are padding: they add nothing.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rlpt_kernels.objective import TRUST_REGIONS, Ratio, coefficients

Aggregate = Literal["token", "prompt", "sequence", "constant"]


def token_weights(
    action_counts: Sequence[Sequence[int]],
    aggregate: Aggregate,
    *,
    total_actions: int | float,
    num_prompts: int | float,
    constant_tokens: float = 1.0,
    sizes: Sequence[int] | None = None,
) -> list[list[float]]:
    """The weight of one action of every rollout; one inner sequence of ``action_counts`` per group.

    token: 1 / total actions. prompt: 1 / (prompts x actions of the group). sequence: 1 / (prompts x
    rollouts of the group x actions of the rollout). constant: 1 / (prompts x rollouts of the group x
    ``constant_tokens``). Totals are those of the whole step; ``sizes`` are the rollouts of every
    group that count, all of them unless given. Summed over its actions the first three make 1, less what prompts or
    rollouts without any action would have had.
    """
    if aggregate == "token":
        return [[_inverse(total_actions) for _ in group] for group in action_counts]
    if aggregate == "prompt":
        return [[_inverse(num_prompts * sum(group)) for _ in group] for group in action_counts]
    sizes = [len(group) for group in action_counts] if sizes is None else sizes
    lengths = [
        [actions if aggregate == "sequence" else constant_tokens for actions in group]
        for group in action_counts
    ]
    return [
        [_inverse(num_prompts * size * length) for length in group]
        for size, group in zip(sizes, lengths, strict=True)
    ]


def _inverse(number: int | float) -> float:
    return 1.0 / number if number else 0.0


def gold_shares(
    gold_PG: Float[np.ndarray, "P G"],
    kind: Literal["probability", "softmax"],
    kept_PG: Bool[np.ndarray, "P G"],
) -> Float[np.ndarray, "P G"]:
    """What the gradient of log p(y | x, z) is multiplied by, detached; ``gold_PG`` is log p(y | x, z).

    probability: p(y | x, z) (VeriFree, arXiv 2505.21493). softmax: p_i / sum_j p_j over the kept
    rollouts of the group, the gradient of log-mean-exp (JEPO, arXiv 2503.19618).
    """
    logp_PG = np.where(kept_PG, gold_PG.astype(np.float64), -np.inf)
    if kind == "probability":
        return np.exp(logp_PG)
    top_P1 = logp_PG.max(axis=1, keepdims=True)
    share_PG = np.exp(logp_PG - np.where(np.isfinite(top_P1), top_P1, 0.0))
    return share_PG / np.maximum(share_PG.sum(axis=1, keepdims=True), np.finfo(np.float64).tiny)


@dataclass(frozen=True)
class TrustRegion:
    """Which ratio is taken, what is done with it, and where an update is left out. See `rlpt.terms.ObjectiveConfig`."""

    mask: Literal["none", "clip", "tv", "band", "m2"] = "none"
    clip_low: float = 0.2
    clip_high: float = 0.28
    tv_delta: float = 0.2
    max_ratio: float | None = None
    ratio: Literal["token", "sequence", "none"] = "token"
    band_low: float = 0.5
    band_high: float = 5.0

    @property
    def kernel(self) -> Ratio:
        """The part that the fused kernel knows."""
        known = self.mask if self.mask in TRUST_REGIONS else "none"
        return Ratio(known, self.clip_low, self.clip_high, self.tv_delta, self.max_ratio)


def policy_gradient(
    logp_R: Float[Tensor, " R"],
    behaviour_logp_R: Float[Tensor, " R"],
    advantage_R: Float[Tensor, " R"],
    weight_R: Float[Tensor, " R"],
    region: TrustRegion,
    *,
    lengths: Sequence[int] | None = None,
    m2_threshold: float = math.inf,
) -> tuple[Float[Tensor, ""], dict[str, float]]:
    """-sum_r w_r M_r sg(min(rho_r, max_ratio)) A_r log pi_r, rho = pi / behaviour.

    The unified form of DPPO (arXiv 2602.04879, Eq. 23). rho is the token's; or, with ratio =
    "sequence", the geometric mean over the actions of its rollout (GSPO), whose numbers of rows
    ``lengths`` gives; or 1 (REINFORCE). M is 0 where the update would leave the trust region
    further. clip: A > 0 and rho > 1 + clip_high, or A < 0 and rho < 1 - clip_low (PPO, GRPO). tv:
    A > 0 and rho > 1, or A < 0 and rho < 1, where |pi - behaviour| > tv_delta. band: rho outside
    [band_low, band_high], whatever A (IcePop). m2: A > 0 and rho > 1, or A < 0 and rho < 1, where
    |log rho| > ``m2_threshold`` (M2PO). none: nowhere (CISPO). Ratio, mask and advantage are
    constants of the gradient. Returns the loss of these rows and how many of them were masked and
    capped.
    """
    used_R = weight_R != 0
    log_ratio_R = torch.where(used_R, logp_R.detach() - behaviour_logp_R, 0.0)
    if region.ratio == "none":
        log_ratio_R = torch.zeros_like(log_ratio_R)
    elif region.ratio == "sequence":
        assert lengths is not None
        log_ratio_R = _means(log_ratio_R, lengths)
    outside_R = _outside(log_ratio_R, advantage_R, region, m2_threshold)
    found = coefficients(
        behaviour_logp_R + log_ratio_R if region.ratio != "token" else logp_R,
        behaviour_logp_R,
        torch.where(outside_R, 0.0, advantage_R),
        weight_R,
        region.kernel,
    )
    capped_R = used_R & (found.log_ratio_N > region.kernel.log_cap)
    # One transfer for both: each on its own would wait for the device.
    masked, capped = torch.stack(
        [((found.masked_N | outside_R) & used_R).sum(), capped_R.sum()]
    ).tolist()
    stats = {"masked": float(masked), "capped": float(capped)}
    return found.loss(logp_R), stats


def _means(value_R: Float[Tensor, " R"], lengths: Sequence[int]) -> Float[Tensor, " R"]:
    """The mean of every stretch, at each of its rows."""
    length_N = torch.tensor(lengths, device=value_R.device)
    owner_R = torch.repeat_interleave(torch.arange(len(lengths), device=value_R.device), length_N)
    total_N = value_R.new_zeros(len(lengths)).index_add(0, owner_R, value_R)
    return (total_N / length_N.clamp(min=1))[owner_R]


def _outside(
    log_ratio_R: Float[Tensor, " R"],
    advantage_R: Float[Tensor, " R"],
    region: TrustRegion,
    m2_threshold: float,
) -> Bool[Tensor, " R"]:
    """Rows that the masks beyond the kernel's leave out."""
    if region.mask == "band":
        low = math.log(region.band_low) if region.band_low else -math.inf
        return (log_ratio_R < low) | (log_ratio_R > math.log(region.band_high))
    if region.mask == "m2":
        away_R = log_ratio_R * advantage_R.sign() > 0
        return away_R & (log_ratio_R.abs() > m2_threshold)
    return torch.zeros_like(log_ratio_R, dtype=torch.bool)


def m2_threshold(
    log_ratio_R: Float[np.ndarray, " R"], advantage_R: Float[np.ndarray, " R"], limit: float
) -> float:
    """The |log rho| above which M2PO leaves out tokens that move away, for the mean square of the rest to be ``limit``.

    Those that move away go, largest first, until the mean of (log rho)^2 over all that stay is at
    most ``limit`` (M2PO: second moment 0.04). inf where nothing has to go. Rows of the whole step.
    """
    square_R = log_ratio_R.astype(np.float64) ** 2
    away_R = log_ratio_R * np.sign(advantage_R) > 0
    order = np.argsort(-square_R[away_R], kind="stable")
    falling = square_R[away_R][order]
    # Entry k: once the k largest have gone.
    left = square_R.sum() - np.concatenate([[0.0], np.cumsum(falling)])
    count = len(square_R) - np.arange(len(falling) + 1)
    met = left <= limit * count + 1e-12
    gone = int(np.argmax(met)) if met.any() else len(falling)
    if not gone:
        return math.inf
    return float(np.sqrt(falling[gone])) if gone < len(falling) else 0.0


def kl_terms(
    log_ratio_R: Float[Tensor, " R"], estimator: Literal["k1", "k2", "k3"]
) -> Float[Tensor, " R"]:
    """Estimates of KL(pi || ref) at tokens that pi sampled, ``log_ratio_R`` = log pi - log ref.

    k1 = d, unbiased; k2 = d^2 / 2; k3 = exp(-d) - 1 + d, unbiased and never negative (Schulman 2020,
    "Approximating KL divergence").
    """
    if estimator == "k1":
        return log_ratio_R
    if estimator == "k2":
        return 0.5 * log_ratio_R**2
    return torch.expm1(-log_ratio_R) + log_ratio_R


def next_token_loss(
    logp_R: Float[Tensor, " R"], weight_R: Float[Tensor, " R"]
) -> Float[Tensor, ""]:
    """-sum_r w_r log pi_r. Its weights hold a denominator of their own, never the thoughts'."""
    return -torch.where(weight_R != 0, weight_R * logp_R, 0.0).sum()
