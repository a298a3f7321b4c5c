"""Advantages: rewards relative to their siblings. Arrays in, arrays out, float64.

A statistic over the batch arrives already reduced over ranks, as ``Moments``.
A group whose rewards agree teaches nothing: it gets exactly 0, not rounding over a tiny std.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float

Baseline = Literal["group_mean", "leave_one_out", "none"]
Scale = Literal["none", "group_std", "batch_std", "group_mean"]
Mask = Bool[np.ndarray, "P G"]
"""Rollouts that count. The others are left out of every statistic, and their advantage is 0."""

RESOLUTION = 1e-6
"""Rewards this close agree: two float32 paths to one log-probability differ by as much."""


@dataclass(frozen=True)
class Moments:
    """Sums over the rewards of a batch. Sums over ranks are the sums of the whole batch."""

    count: float
    total: float
    total_square: float

    def __add__(self, other: "Moments") -> "Moments":
        return Moments(
            self.count + other.count,
            self.total + other.total,
            self.total_square + other.total_square,
        )

    @property
    def mean(self) -> float:
        return self.total / self.count if self.count else 0.0

    @property
    def std(self) -> float:
        """Population standard deviation; 0 for an empty batch or one value repeated."""
        if not self.count:
            return 0.0
        mean_square = self.total_square / self.count
        variance = mean_square - self.mean**2
        # Below this share of its terms the difference is rounding: 0.1 repeated has variance 1e-18.
        return 0.0 if variance <= 1e-12 * mean_square else variance**0.5


def batch_moments(value_PG: Float[np.ndarray, "P G"], kept_PG: Mask | None = None) -> Moments:
    """The moments of this rank's values, to be added over ranks."""
    value_K = value_PG.astype(np.float64)[_all(value_PG) if kept_PG is None else kept_PG]
    return Moments(float(value_K.size), float(value_K.sum()), float((value_K**2).sum()))


def centred(
    reward_PG: Float[np.ndarray, "P G"],
    *,
    baseline: Baseline,
    resolution: float = RESOLUTION,
    kept_PG: Mask | None = None,
    relative: bool = False,
) -> Float[np.ndarray, "P G"]:
    """Rewards minus a baseline of their group.

    group_mean: r - mean. leave_one_out: r - mean of the others = G/(G-1) (r - mean), which is
    unbiased (RLOO; RLP, arXiv 2510.01265, Eq. 7). none: r as it is. Both baselines give exactly 0
    to a group whose rewards lie within ``resolution`` of each other (``relative``: that share of the
    largest), and where one rollout at most is kept. Raises FloatingPointError naming a prompt whose
    reward is not finite, ValueError where there are no siblings.
    """
    reward_PG = reward_PG.astype(np.float64)
    kept_PG = _all(reward_PG) if kept_PG is None else kept_PG
    _check_finite(np.where(kept_PG, reward_PG, 0.0))
    if baseline == "none":
        return np.where(kept_PG, reward_PG, 0.0)
    group_size = reward_PG.shape[1]
    if group_size < 2:
        raise ValueError(f"{baseline} compares siblings, so it needs G >= 2; got G = {group_size}")
    mean_P1, count_P1 = _means(reward_PG, kept_PG)
    centred_PG = reward_PG - mean_P1
    if baseline == "leave_one_out":
        centred_PG = centred_PG * (count_P1 / np.maximum(count_P1 - 1, 1))
    silent_P1 = agreeing(reward_PG, resolution, kept_PG, relative)[:, None]
    return np.where(kept_PG & ~silent_P1, centred_PG, 0.0)


def advantage(
    reward_PG: Float[np.ndarray, "P G"],
    *,
    baseline: Baseline,
    scale: Scale,
    moments: Moments | None = None,
    resolution: float = RESOLUTION,
    kept_PG: Mask | None = None,
    relative: bool = False,
) -> Float[np.ndarray, "P G"]:
    """Centred rewards, divided by 1, by the std of their group's or of the batch's, or by their group's mean reward.

    Standard deviations are those of the population of *centred* rewards, without an epsilon: where
    a group (group_std) or the whole batch (batch_std) agrees, the advantage is exactly 0. group_mean
    is MaxRL's (arXiv 2602.02710): rewards must not be negative, and a group without any gets 0.
    ``moments`` are ``batch_moments`` of the centred rewards added over ranks; batch_std needs them.
    """
    centred_PG = centred(
        reward_PG, baseline=baseline, resolution=resolution, kept_PG=kept_PG, relative=relative
    )
    kept_PG = _all(reward_PG) if kept_PG is None else kept_PG
    if scale == "none":
        return centred_PG
    if scale == "group_std":
        silent_P1 = agreeing(reward_PG, resolution, kept_PG, relative)[:, None]
        return _divided(centred_PG, np.where(silent_P1, 0.0, group_std(centred_PG, kept_PG)))
    if scale == "group_mean":
        return _divided(centred_PG, np.maximum(_means(reward_PG, kept_PG)[0], 0.0))
    if moments is None:
        raise ValueError("batch_std needs the moments of the whole batch's centred rewards")
    return centred_PG / moments.std if moments.std > 0 else np.zeros_like(centred_PG)


def gae(
    reward_N: Float[np.ndarray, " N"],
    value_R: Float[np.ndarray, " R"],
    lengths: Sequence[int],
    gamma: float,
    gae_lambda: float,
) -> Float[np.ndarray, " R"]:
    """sum_k (gamma lambda)^k delta_{t+k}, delta_t = r_t + gamma V_{t+1} - V_t, of every action of N rollouts.

    A rollout's reward comes with its last action, after which there is nothing (Schulman et al. 2016,
    arXiv 1506.02438, Eq. 16). ``lengths`` are the actions of every rollout; they add up to R.
    """
    advantage_R = np.zeros(len(value_R))
    stop = len(value_R)
    for reward, length in zip(reward_N[::-1], reversed(lengths), strict=True):
        after, running = 0.0, 0.0
        for t in range(stop - 1, stop - length - 1, -1):
            delta = (reward if t == stop - 1 else 0.0) + gamma * after - value_R[t]
            running = delta + gamma * gae_lambda * running
            advantage_R[t], after = running, value_R[t]
        stop -= length
    return advantage_R


def group_std(
    value_PG: Float[np.ndarray, "P G"], kept_PG: Mask | None = None
) -> Float[np.ndarray, "P 1"]:
    """Population standard deviation of every group's kept values; 0 where there is none."""
    kept_PG = _all(value_PG) if kept_PG is None else kept_PG
    mean_P1, _ = _means(value_PG, kept_PG)
    return np.sqrt(_means((value_PG - mean_P1) ** 2, kept_PG)[0])


def agreeing(
    reward_PG: Float[np.ndarray, "P G"],
    resolution: float = RESOLUTION,
    kept_PG: Mask | None = None,
    relative: bool = False,
) -> Bool[np.ndarray, " P"]:
    """Groups whose rewards lie within ``resolution``, or within float64's own, of each other.

    ``relative``: within that share of the largest, as probabilities that were rounded as logarithms do.
    """
    kept_PG = _all(reward_PG) if kept_PG is None else kept_PG
    highest_P = np.where(kept_PG, reward_PG, -np.inf).max(axis=1)
    spread_P = highest_P - np.where(kept_PG, reward_PG, np.inf).min(axis=1)
    largest_P = np.where(kept_PG, np.abs(reward_PG), 0.0).max(axis=1, initial=0.0)
    least_P = resolution * largest_P if relative else resolution
    return spread_P <= np.maximum(least_P, 4 * np.finfo(np.float64).eps * largest_P)


def _all(value_PG: np.ndarray) -> Mask:
    return np.ones(value_PG.shape, dtype=bool)


def _means(
    value_PG: Float[np.ndarray, "P G"], kept_PG: Mask
) -> tuple[Float[np.ndarray, "P 1"], Float[np.ndarray, "P 1"]]:
    """Of the kept values of every group, and how many they are."""
    count_P1 = kept_PG.sum(axis=1, keepdims=True).astype(np.float64)
    total_P1 = np.where(kept_PG, value_PG, 0.0).sum(axis=1, keepdims=True)
    return total_P1 / np.maximum(count_P1, 1.0), count_P1


def _divided(
    value_PG: Float[np.ndarray, "P G"], divisor_P1: Float[np.ndarray, "P 1"]
) -> Float[np.ndarray, "P G"]:
    """Exactly 0 where the divisor is."""
    silent_P1 = divisor_P1 == 0
    return np.where(silent_P1, 0.0, value_PG / np.where(silent_P1, 1.0, divisor_P1))


def _check_finite(reward_PG: Float[np.ndarray, "P G"]) -> None:
    if not np.isfinite(reward_PG).all():
        prompt, rollout = (int(i) for i in np.argwhere(~np.isfinite(reward_PG))[0])
        raise FloatingPointError(
            f"the reward of prompt {prompt}, rollout {rollout} is {reward_PG[prompt, rollout]}"
        )
