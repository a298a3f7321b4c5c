"""A law at its best for some points, with any of its parameters held.

Every search is exhaustive before it is local: a coarse grid of all shapes starts it, so there are no first guesses. All
candidates of a search are improved together, by the damped steps of Levenberg and Marquardt.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from rlpt.law.points import Cells, Law, Points

Held = Mapping[int, Float[np.ndarray, " K"]]
"""Parameter -> the values at which it stays, one for each candidate."""

_MOST_STEPS, _ENOUGH = 40, 1e-8


@dataclass(frozen=True)
class Fit:
    """A law and the parameters with the least error."""

    law: Law
    points: Points
    cells: Cells
    theta_Q: Float[np.ndarray, " 3"]
    error: float
    """The sum of squared residuals, each over its standard error where that is given."""

    @property
    def values(self) -> dict[str, float]:
        """The parameters as the papers write them."""
        return self.law.plain(self.theta_Q)

    @property
    def noise(self) -> float:
        """Standard deviation of the residuals, with n - 3 degrees of freedom."""
        residual_N = self.points.value_N - self.predict(self.points.compute_N)
        return math.sqrt(float(residual_N @ residual_N) / (len(self.points) - len(self.theta_Q)))

    def predict(self, compute_N: Float[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
        return self.law.curve(self.theta_Q[None], compute_N)[0]


def fit(law: Law, points: Points) -> Fit:
    """The best parameters of all. Needs more points than parameters."""
    assert len(points) > len(law.names), (len(points), law.names)
    cells = law.cells(points)
    best = cells.theta_MQ[np.argsort(cells.error_M)[:3]]
    theta_KQ, error_K = _improved(law, points, best, ())
    k = int(error_K.argmin())
    return Fit(law, points, cells, theta_KQ[k], float(error_K[k]))


def best_with(fitted: Fit, held: Held) -> tuple[Float[np.ndarray, " K"], Float[np.ndarray, "K 3"]]:
    """(the least error, the parameters there) with some parameters held."""
    starts_KQ = _starts(fitted.cells, held)
    theta_KQ, error_K = _improved(fitted.law, fitted.points, starts_KQ, tuple(held))
    return error_K, theta_KQ


def _starts(cells: Cells, held: Held) -> Float[np.ndarray, "K 3"]:
    """For every candidate the cell that is best under what is held."""
    count = len(next(iter(held.values())))
    cost_MK = np.repeat(cells.error_M[:, None], count, axis=1)
    for q, value_K in held.items():
        distance_MK = np.abs(cells.theta_MQ[:, q, None] - value_K)
        if q == 0:
            cost_MK = cost_MK + cells.curvature_M[:, None] * distance_MK**2
        else:
            cost_MK = np.where(distance_MK <= distance_MK.min(axis=0) + 1e-9, cost_MK, np.inf)
    theta_KQ = cells.theta_MQ[cost_MK.argmin(axis=0)]
    for q, value_K in held.items():
        theta_KQ[:, q] = value_K
    return theta_KQ


def _improved(
    law: Law, points: Points, theta_KQ: Float[np.ndarray, "K 3"], held: tuple[int, ...]
) -> tuple[Float[np.ndarray, "K 3"], Float[np.ndarray, " K"]]:
    """Damped steps of all candidates together, until none promises more. The error of none ever rises."""
    residual_KN, damping_K = _residuals(law, points, theta_KQ), np.full(len(theta_KQ), 1e-3)
    exponents = law.ranges(points)[1]
    for _ in range(_MOST_STEPS):
        error_K = _error(residual_KN)
        step_KQ, promised_K = _step(law, points, theta_KQ, residual_KN, damping_K, held)
        if (promised_K <= _ENOUGH * error_K).all():
            break
        proposed_KQ = theta_KQ + step_KQ
        if 1 not in held:
            proposed_KQ[:, 1] = np.clip(proposed_KQ[:, 1], exponents.low, exponents.high)
        proposed_KN = _residuals(law, points, proposed_KQ)
        better_K = _error(proposed_KN) < error_K
        theta_KQ = np.where(better_K[:, None], proposed_KQ, theta_KQ)
        residual_KN = np.where(better_K[:, None], proposed_KN, residual_KN)
        damping_K = np.where(better_K, damping_K / 10, damping_K * 10)
    return theta_KQ, _error(residual_KN)


def _residuals(
    law: Law, points: Points, theta_KQ: Float[np.ndarray, "K 3"]
) -> Float[np.ndarray, "K N"]:
    return (points.value_N - law.curve(theta_KQ, points.compute_N)) / points.scale


def _error(residual_KN: Float[np.ndarray, "K N"]) -> Float[np.ndarray, " K"]:
    return np.einsum("kn,kn->k", residual_KN, residual_KN)


def _step(
    law: Law,
    points: Points,
    theta_KQ: Float[np.ndarray, "K 3"],
    residual_KN: Float[np.ndarray, "K N"],
    damping_K: Float[np.ndarray, " K"],
    held: tuple[int, ...],
) -> tuple[Float[np.ndarray, "K 3"], Float[np.ndarray, " K"]]:
    """(J'J + damping diag(J'J))^-1 J'r, without the held parameters; and by how much it should lower the error."""
    slope_KNQ = law.slopes(theta_KQ, points.compute_N) / points.scale[:, None]
    slope_KNQ[:, :, list(held)] = 0.0
    turned_KQN = slope_KNQ.transpose(0, 2, 1)
    normal_KQQ = turned_KQN @ slope_KNQ
    size_KQ = np.einsum("kqq->kq", normal_KQQ)
    # A parameter without any effect stays where it is.
    damped_KQ = np.where(size_KQ > 0, size_KQ * damping_K[:, None], 1.0)
    normal_KQQ = normal_KQQ + damped_KQ[:, :, None] * np.eye(theta_KQ.shape[1])
    wanted_KQ = (turned_KQN @ residual_KN[:, :, None])[:, :, 0]
    step_KQ = np.linalg.solve(normal_KQQ, wanted_KQ[:, :, None])[:, :, 0]
    return step_KQ, (step_KQ * wanted_KQ).sum(axis=1)
