"""ScaleRL's law: a curve that starts at R0, bends half-way to its ceiling at C_mid and levels off at A.

    R(C) = R0 + (A - R0) / (1 + (C_mid / C)^B)            Khatri, Madaan et al., arXiv 2510.13786, equation 1

R0 is measured and never fitted. For given (B, C_mid) the curve is linear in A, so the grid runs over those two, C_mid
in logarithms, and A is closed; the published procedure grids A and a linear C_mid and fits B in every cell. A is free:
a gain is not bounded by 1, and where A < R0 the curve falls, as bits per byte do.

Parameters as fitted: (A, ln B, ln C_mid).
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Float

from rlpt.law.points import Cells, Points, Range

EXPONENTS = Range(math.log(0.1), math.log(10.0))
"""ln B: flatter than 0.1 is no bend, steeper than 10 is a step between two points. ScaleRL's lie in 1.1 to 2.4."""
_BEYOND = math.log(1000.0)
"""C_mid is looked for up to a factor of 1000 outside the points."""


@dataclass(frozen=True)
class Sigmoid:
    """The law for one measured start."""

    start: float
    """R0."""
    names: ClassVar[tuple[str, ...]] = ("A", "B", "C_mid")

    def curve(
        self, theta_KQ: Float[np.ndarray, "K 3"], compute_N: Float[np.ndarray, " N"]
    ) -> Float[np.ndarray, "K N"]:
        share_KN = _share(np.exp(theta_KQ[:, 1]), theta_KQ[:, 2], compute_N)
        return self.start + (theta_KQ[:, :1] - self.start) * share_KN

    def slopes(
        self, theta_KQ: Float[np.ndarray, "K 3"], compute_N: Float[np.ndarray, " N"]
    ) -> Float[np.ndarray, "K N 3"]:
        """dR/dA = g; with z = B ln(C/C_mid), dR/dz = (A - R0) g (1 - g), dz/d ln B = z, dz/d ln C_mid = -B."""
        exponent_K1 = np.exp(theta_KQ[:, 1:2])
        share_KN = _share(exponent_K1[:, 0], theta_KQ[:, 2], compute_N)
        bend_KN = (theta_KQ[:, :1] - self.start) * share_KN * (1 - share_KN)
        z_KN = exponent_K1 * (np.log(compute_N) - theta_KQ[:, 2:])
        return np.stack([share_KN, bend_KN * z_KN, -bend_KN * exponent_K1], axis=2)

    def cells(self, points: Points) -> Cells:
        """40 exponents by 46 midpoints; A - R0 = sum(g r) / sum(g g) in each, r the rise above R0."""
        rise_N = (points.value_N - self.start) / points.scale
        midpoints = _midpoints(points)
        blocks = []
        for exponent in np.linspace(EXPONENTS.low, EXPONENTS.high, 40):
            share_KN = _share(
                np.full(len(midpoints), math.exp(exponent)), midpoints, points.compute_N
            )
            scaled_KN = share_KN / points.scale
            blocks.append(
                (np.full(len(midpoints), exponent), scaled_KN @ rise_N, (scaled_KN**2).sum(1))
            )
        exponent_M, product_M, square_M = (
            np.concatenate(part) for part in zip(*blocks, strict=True)
        )
        square_M = np.maximum(square_M, np.finfo(np.float64).tiny)
        height_M = product_M / square_M
        midpoint_M = np.tile(midpoints, len(blocks))
        theta_MQ = np.stack([self.start + height_M, exponent_M, midpoint_M], axis=1)
        return Cells(theta_MQ, rise_N @ rise_N - height_M * product_M, square_M)

    def limit_error(self, points: Points, direction: int) -> float:
        """Of R0 + k C^B, which the law becomes as A and C_mid go to infinity together; k has the sign of direction."""
        rise_N = (points.value_N - self.start) / points.scale
        log_N = np.log(points.compute_N / points.compute_N.max())
        power_KN = np.exp(np.exp(np.linspace(EXPONENTS.low, EXPONENTS.high, 400))[:, None] * log_N)
        scaled_KN = power_KN / points.scale
        product_K = np.maximum(direction * (scaled_KN @ rise_N), 0.0)
        return float((rise_N @ rise_N - product_K**2 / (scaled_KN**2).sum(1)).min())

    def ranges(self, points: Points) -> dict[int, Range]:
        low, high = np.log([points.compute_N.min(), points.compute_N.max()])
        return {1: EXPONENTS, 2: Range(float(low) - _BEYOND, float(high) + _BEYOND)}

    def plain(self, theta_Q: Float[np.ndarray, " 3"]) -> dict[str, float]:
        return {"A": float(theta_Q[0]), "B": math.exp(theta_Q[1]), "C_mid": math.exp(theta_Q[2])}


def _share(
    exponent_K: Float[np.ndarray, " K"],
    midpoint_K: Float[np.ndarray, " K"],
    compute_N: Float[np.ndarray, " N"],
) -> Float[np.ndarray, "K N"]:
    """g = 1 / (1 + (C_mid / C)^B): how much of the way to the ceiling is behind."""
    z_KN = exponent_K[:, None] * (np.log(compute_N) - midpoint_K[:, None])
    return 1.0 / (1.0 + np.exp(np.minimum(-z_KN, 700.0)))


def _midpoints(points: Points) -> Float[np.ndarray, " M"]:
    """ln C_mid: evenly over the points and a little beyond; then ever further, for curves that do not bend."""
    low, high = np.log([points.compute_N.min(), points.compute_N.max()])
    further = high + np.array([4.0, 5.0, 7.0, 10.0, 15.0, 20.0])
    return np.concatenate([np.linspace(low - 3.0, high + 3.0, 40), further])
