"""Training controls: rewards that know nothing of the thought they are given to.

Every group draws from its own generator, so that batching and ranks change no draw.
"""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float


@runtime_checkable
class Spread(Protocol):
    """Mean and standard deviation of the whole batch, reduced over ranks by the caller."""

    @property
    def mean(self) -> float: ...

    @property
    def std(self) -> float: ...


def permuted(
    reward_PG: Float[np.ndarray, "P G"], generators: Sequence[np.random.Generator]
) -> Float[np.ndarray, "P G"]:
    """The group's own rewards in a uniformly random order: same values, no information."""
    rows = zip(reward_PG, generators, strict=True)
    shuffled = [generator.permutation(row_G) for row_G, generator in rows]
    return np.stack(shuffled) if shuffled else reward_PG.copy()


def random_like(
    reward_PG: Float[np.ndarray, "P G"],
    moments: Spread,
    generators: Sequence[np.random.Generator],
) -> Float[np.ndarray, "P G"]:
    """Normal noise with the mean and std of the whole batch of rewards that it replaces."""
    if not np.isfinite(moments.std):
        raise FloatingPointError(f"the std of the batch's rewards is {moments.std}")
    group_size = reward_PG.shape[1]
    rows = zip(reward_PG, generators, strict=True)
    noise = [generator.normal(moments.mean, moments.std, group_size) for _, generator in rows]
    return np.stack(noise) if noise else reward_PG.copy()


def constant(reward_PG: Float[np.ndarray, "P G"], value: float = 1.0) -> Float[np.ndarray, "P G"]:
    """One value for all: a centred advantage, and with it the gradient, must be exactly 0."""
    return np.full_like(reward_PG, value)
