"""RPT's law: what is missing to the ceiling falls as a power of compute.

    P(C) = A / C^alpha + P*            Dong et al., "Reinforcement Pre-Training", arXiv 2506.08007

For a given alpha the curve is linear in A and P*. A is negative where the curve rises. ScaleRL warns that this law
reads too high a ceiling off early points, which a sigmoid would call its bend.

Parameters as fitted: (P*, ln alpha, k), k = A / C_last^alpha: A itself changes by orders of magnitude with alpha.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Float

from rlpt.law.points import Cells, Points, Range

EXPONENTS = Range(math.log(0.01), math.log(10.0))
"""ln alpha: flatter is a logarithm, which has no ceiling, steeper a step."""


@dataclass(frozen=True)
class Power:
    """The law, with the compute that k belongs to."""

    last: float
    """C_last, the largest compute."""
    names: ClassVar[tuple[str, ...]] = ("P*", "alpha", "A")

    def curve(
        self, theta_KQ: Float[np.ndarray, "K 3"], compute_N: Float[np.ndarray, " N"]
    ) -> Float[np.ndarray, "K N"]:
        return theta_KQ[:, :1] + theta_KQ[:, 2:] * self._left(theta_KQ[:, 1], compute_N)

    def slopes(
        self, theta_KQ: Float[np.ndarray, "K 3"], compute_N: Float[np.ndarray, " N"]
    ) -> Float[np.ndarray, "K N 3"]:
        """dP/dP* = 1; with h = (C/C_last)^-alpha, dP/dk = h and dP/d ln alpha = k h ln h."""
        left_KN = self._left(theta_KQ[:, 1], compute_N)
        by_alpha_KN = theta_KQ[:, 2:] * left_KN * np.log(left_KN)
        return np.stack([np.ones_like(left_KN), by_alpha_KN, left_KN], axis=2)

    def cells(self, points: Points) -> Cells:
        """200 exponents; P* and k by weighted least squares in each."""
        alpha_M = np.linspace(EXPONENTS.low, EXPONENTS.high, 200)
        left_MN, weight_N = self._left(alpha_M, points.compute_N), points.scale**-2.0
        total = weight_N.sum()
        value_N = points.value_N - weight_N @ points.value_N / total
        centred_MN = left_MN - (left_MN @ weight_N / total)[:, None]
        spread_M = np.maximum((centred_MN**2) @ weight_N, np.finfo(np.float64).tiny)
        product_M = centred_MN @ (weight_N * value_N)
        k_M = product_M / spread_M
        floor_M = weight_N @ points.value_N / total - k_M * (left_MN @ weight_N) / total
        # P* moves with k at its best for it: what is left of sum(w) after k has followed.
        curvature_M = (
            total * spread_M / np.maximum((left_MN**2) @ weight_N, np.finfo(np.float64).tiny)
        )
        theta_MQ = np.stack([floor_M, alpha_M, k_M], axis=1)
        return Cells(theta_MQ, weight_N @ value_N**2 - k_M * product_M, curvature_M)

    def limit_error(self, points: Points, direction: int) -> float:
        """Of a + b ln C, which the law becomes as P* goes to infinity and alpha to 0; b has the sign of direction."""
        weight_N = points.scale**-2.0
        log_N = np.log(points.compute_N)
        log_N = log_N - weight_N @ log_N / weight_N.sum()
        value_N = points.value_N - weight_N @ points.value_N / weight_N.sum()
        product = max(direction * float(weight_N @ (log_N * value_N)), 0.0)
        return float(weight_N @ value_N**2 - product**2 / (weight_N @ log_N**2))

    def ranges(self, points: Points) -> dict[int, Range]:
        return {1: EXPONENTS}

    def plain(self, theta_Q: Float[np.ndarray, " 3"]) -> dict[str, float]:
        alpha = math.exp(theta_Q[1])
        return {"P*": float(theta_Q[0]), "alpha": alpha, "A": float(theta_Q[2]) * self.last**alpha}

    def _left(
        self, log_alpha_K: Float[np.ndarray, " K"], compute_N: Float[np.ndarray, " N"]
    ) -> Float[np.ndarray, "K N"]:
        """(C/C_last)^-alpha: 1 at the last point, more before."""
        power_KN = np.exp(log_alpha_K)[:, None] * np.log(self.last / compute_N)
        return np.exp(np.minimum(power_KN, 300.0))
