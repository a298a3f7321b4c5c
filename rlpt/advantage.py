"""Advantages: rewards relative to their siblings. Arrays in, arrays out, float64.

A statistic over the batch arrives already reduced over ranks, as ``Moments``.
A group whose rewards agree teaches nothing: it gets exactly 0, not rounding over a tiny std.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float

Baseline = Literal["group_mean", "leave_one_out", "none"]
Scale = Literal["none", "group_std", "batch_std"]

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


def batch_moments(value_PG: Float[np.ndarray, "P G"]) -> Moments:
    """The moments of this rank's values, to be added over ranks."""
    value_PG = value_PG.astype(np.float64)
    return Moments(float(value_PG.size), float(value_PG.sum()), float((value_PG**2).sum()))


def centred(
    reward_PG: Float[np.ndarray, "P G"], *, baseline: Baseline, resolution: float = RESOLUTION
) -> Float[np.ndarray, "P G"]:
    """Rewards minus a baseline of their group.

    group_mean: r - mean. leave_one_out: r - mean of the others = G/(G-1) (r - mean), which is
    unbiased (RLOO; RLP, arXiv 2510.01265, Eq. 7). none: r as it is. Both baselines give exactly 0
    to a group whose rewards lie within ``resolution`` of each other. Raises FloatingPointError
    naming a prompt whose reward is not finite, ValueError where there are no siblings.
    """
    reward_PG = reward_PG.astype(np.float64)
    _check_finite(reward_PG)
    if baseline == "none":
        return reward_PG
    group_size = reward_PG.shape[1]
    if group_size < 2:
        raise ValueError(f"{baseline} compares siblings, so it needs G >= 2; got G = {group_size}")
    centred_PG = reward_PG - reward_PG.mean(axis=1, keepdims=True)
    if baseline == "leave_one_out":
        centred_PG = centred_PG * (group_size / (group_size - 1))
    return np.where(agreeing(reward_PG, resolution)[:, None], 0.0, centred_PG)


def advantage(
    reward_PG: Float[np.ndarray, "P G"],
    *,
    baseline: Baseline,
    scale: Scale,
    moments: Moments | None = None,
    resolution: float = RESOLUTION,
) -> Float[np.ndarray, "P G"]:
    """Centred rewards, divided by 1, by the std of their group's or by the std of the batch's.

    Standard deviations are those of the population of *centred* rewards, without an epsilon: where
    a group (group_std) or the whole batch (batch_std) agrees, the advantage is exactly 0.
    ``moments`` are ``batch_moments`` of the centred rewards added over ranks; batch_std needs them.
    """
    centred_PG = centred(reward_PG, baseline=baseline, resolution=resolution)
    if scale == "none":
        return centred_PG
    if scale == "group_std":
        divisor_P1 = centred_PG.std(axis=1, keepdims=True)
        silent_P1 = agreeing(reward_PG, resolution)[:, None]
        return np.where(silent_P1, 0.0, centred_PG / np.where(silent_P1, 1.0, divisor_P1))
    if moments is None:
        raise ValueError("batch_std needs the moments of the whole batch's centred rewards")
    return centred_PG / moments.std if moments.std > 0 else np.zeros_like(centred_PG)


def agreeing(
    reward_PG: Float[np.ndarray, "P G"], resolution: float = RESOLUTION
) -> Bool[np.ndarray, " P"]:
    """Groups whose rewards lie within ``resolution``, or within float64's own, of each other."""
    spread_P = np.ptp(reward_PG, axis=1)
    own_P = 4 * np.finfo(np.float64).eps * np.abs(reward_PG).max(axis=1, initial=0.0)
    return spread_P <= np.maximum(resolution, own_P)


def _check_finite(reward_PG: Float[np.ndarray, "P G"]) -> None:
    if not np.isfinite(reward_PG).all():
        prompt, rollout = (int(i) for i in np.argwhere(~np.isfinite(reward_PG))[0])
        raise FloatingPointError(
            f"the reward of prompt {prompt}, rollout {rollout} is {reward_PG[prompt, rollout]}"
        )
