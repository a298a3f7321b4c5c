"""Objectives: pure functions from log-probabilities to a scalar whose gradient is the update.

Every row carries its weight, which already holds the denominator of the *whole step*: all
micro-batches, all ranks. A denominator of one micro-batch would weigh a token by the company it
keeps, and the gradient would change with the way the step happened to be split. Rows of weight 0
are padding: they add nothing.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from rlpt_kernels.objective import Ratio, coefficients

Mask = Literal["none", "clip", "tv"]
Aggregate = Literal["token", "prompt", "sequence"]


def token_weights(
    action_counts: Sequence[Sequence[int]],
    aggregate: Aggregate,
    *,
    total_actions: int | float,
    num_prompts: int | float,
) -> list[list[float]]:
    """The weight of one action of every rollout; one inner sequence of ``action_counts`` per group.

    token: 1 / total actions. prompt: 1 / (prompts x actions of the group). sequence: 1 / (prompts x
    rollouts of the group x actions of the rollout). Totals are those of the whole step. Summed over
    its actions the weights make 1, less what prompts or rollouts without any action would have had.
    """
    if aggregate == "token":
        return [[_inverse(total_actions) for _ in group] for group in action_counts]
    if aggregate == "prompt":
        return [[_inverse(num_prompts * sum(group)) for _ in group] for group in action_counts]
    return [
        [_inverse(num_prompts * len(group) * actions) for actions in group]
        for group in action_counts
    ]


def _inverse(number: int | float) -> float:
    return 1.0 / number if number else 0.0


def policy_gradient(
    logp_R: Float[Tensor, " R"],
    behaviour_logp_R: Float[Tensor, " R"],
    advantage_R: Float[Tensor, " R"],
    weight_R: Float[Tensor, " R"],
    *,
    mask: Mask,
    clip_low: float,
    clip_high: float,
    tv_delta: float,
    max_ratio: float | None,
) -> tuple[Float[Tensor, ""], dict[str, float]]:
    """-sum_r w_r M_r sg(min(rho_r, max_ratio)) A_r log pi_r with rho = pi / behaviour.

    The unified form of DPPO (arXiv 2602.04879, Eq. 23). M is 0 where the update would leave the
    trust region further. clip: A > 0 and rho > 1 + clip_high, or A < 0 and rho < 1 - clip_low (PPO,
    GRPO). tv: A > 0 and rho > 1, or A < 0 and rho < 1, where |pi - behaviour| > tv_delta. none:
    nowhere (CISPO). Ratio, mask and advantage are constants of the gradient. Returns the loss of
    these rows and how many of them were masked and capped.
    """
    ratio = Ratio(mask, clip_low, clip_high, tv_delta, max_ratio)
    found = coefficients(logp_R, behaviour_logp_R, advantage_R, weight_R, ratio)
    capped_R = (weight_R != 0) & (found.log_ratio_N > ratio.log_cap)
    # One transfer for both: each on its own would wait for the device.
    masked, capped = torch.stack(
        [(found.masked_N & (weight_R != 0)).sum(), capped_R.sum()]
    ).tolist()
    stats = {"masked": float(masked), "capped": float(capped)}
    return found.loss(logp_R), stats


def next_token_loss(
    logp_R: Float[Tensor, " R"], weight_R: Float[Tensor, " R"]
) -> Float[Tensor, ""]:
    """-sum_r w_r log pi_r. Its weights hold a denominator of their own, never the thoughts'."""
    return -torch.where(weight_R != 0, weight_R * logp_R, 0.0).sum()
