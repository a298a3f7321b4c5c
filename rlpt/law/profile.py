"""Profile-likelihood intervals: every value of a parameter with which, the others at their best, the error is below

    S_min (1 + t^2 / (n - p))      the noise estimated from the residuals of n points and p parameters, t of Student
    S_min + 1.96^2                 the standard error of every point given

(Bates and Watts 1988, "Nonlinear Regression Analysis", section 6.1). Unlike a mean plus or minus two standard errors it
has an end only where the points give it one: a curve that has not begun to bend has no upper end, and None says so.
Points count as independent.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from rlpt.law.least_squares import Fit, best_with

Bounds = tuple[float | None, float | None]
"""An interval; None: no end."""

_NEAR = np.geomspace(0.25, 4.0, 8)
_REACHES = 16.0 ** np.arange(6)
_ROUNDS, _STRAIGHT = 30, 0.5
_NORMAL = 1.959963984540054


@dataclass(frozen=True)
class Valley:
    """The error along one parameter with the others at their best."""

    error: Callable[[Float[np.ndarray, " K"]], Float[np.ndarray, " K"]]
    best: float
    least: float
    top: float
    """The error that is just inside the interval."""
    unit: float
    """How far from the best that would be for a linear law."""

    def end(self, edge: float) -> float | None:
        """Where on the way to ``edge`` the error rises above the top; None: nowhere.

        Tried at growing multiples of the unit, then between the two around it.
        """
        unit = math.copysign(self.unit, edge - self.best)
        for reach in _REACHES:
            offset_K = np.minimum(np.abs(reach * unit * _NEAR), abs(edge - self.best))
            grid_K = np.concatenate([[self.best], self.best + np.copysign(offset_K, unit)])
            k = self._last_inside(grid_K)
            if k < len(_NEAR):
                return self._crossing(float(grid_K[k]), float(grid_K[k + 1]))
            if grid_K[-1] == edge:
                return None
        return None

    def _last_inside(self, grid_K: Float[np.ndarray, " K"]) -> int:
        inside = np.flatnonzero(self.error(grid_K[1:]) <= self.top)
        return int(inside[-1]) + 1 if len(inside) else 0

    def _crossing(self, low: float, high: float, rounds: int = _ROUNDS) -> float:
        """Where the error crosses the top between two places, ``high`` outside.

        Narrowed down until the root of what the error has risen by, straight for a linear law, is nearly so.
        """
        wanted = math.sqrt(self.top - self.least)
        grid_K = np.linspace(low, high, 6)
        risen_K = np.sqrt(np.maximum(self.error(grid_K) - self.least, 0.0))
        inside = np.flatnonzero(risen_K <= wanted)
        k = min(int(inside[-1]) if len(inside) else 0, len(grid_K) - 2)
        low, high, rise = float(grid_K[k]), float(grid_K[k + 1]), float(risen_K[k + 1] - risen_K[k])
        if rise > _STRAIGHT * wanted and rounds:
            return self._crossing(low, high, rounds - 1)
        share = (wanted - float(risen_K[k])) / rise if rise > 0 else 0.0
        return low + min(max(share, 0.0), 1.0) * (high - low)


def intervals(fitted: Fit) -> dict[str, Bounds]:
    """95% intervals of the ceiling, and of the parameters the law has a range for, as the papers write them."""
    ceiling = float(fitted.theta_Q[0])
    ceilings = ceiling_interval([fitted], ceiling, fitted.error, top([fitted], fitted.error, 3))
    return {fitted.law.names[0]: ceilings} | shape_intervals(fitted, {})


def shape_intervals(fitted: Fit, held: Mapping[int, float]) -> dict[str, Bounds]:
    """Of the parameters but the ceiling; ``held`` stay where they are."""
    highest = top([fitted], fitted.error, len(fitted.theta_Q) - len(held))
    shapes = fitted.law.ranges(fitted.points)
    return {fitted.law.names[q]: _shape_interval(fitted, q, highest, held) for q in shapes}


def top(fits: Sequence[Fit], least: float, parameters: int) -> float:
    """The error that a profile of so many parameters may have inside a 95% interval."""
    if fits[0].points.sd_N is not None:
        return least + _NORMAL**2
    from scipy.special import stdtrit

    freedom = sum(len(fitted.points) for fitted in fits) - parameters
    # Without any noise the last digits of the arithmetic are all there is.
    rounding = 1e-18 * sum(float(fitted.points.value_N @ fitted.points.value_N) for fitted in fits)
    return least * (1.0 + float(stdtrit(freedom, 0.975)) ** 2 / freedom) + rounding


def ceiling_error(
    fits: Sequence[Fit], ceiling_K: Float[np.ndarray, " K"]
) -> Float[np.ndarray, " K"]:
    """The least error of all fits together under one ceiling."""
    return np.sum([best_with(fitted, {0: ceiling_K})[0] for fitted in fits], axis=0)


def ceiling_interval(fits: Sequence[Fit], ceiling: float, least: float, highest: float) -> Bounds:
    """Of the ceiling that all share; no end on a side where curves that never level off stay below ``highest``."""
    unit = min(_linear_end(fitted, 0, highest - least, {}) for fitted in fits)
    valley = Valley(lambda ceiling_K: ceiling_error(fits, ceiling_K), ceiling, least, highest, unit)
    low, high = (
        None
        if sum(fitted.law.limit_error(fitted.points, side) for fitted in fits) <= highest
        else valley.end(side * math.inf)
        for side in (-1, 1)
    )
    return low, high


def _shape_interval(fitted: Fit, q: int, highest: float, held: Mapping[int, float]) -> Bounds:
    """Not in logarithms; no end where it would lie outside what is searched."""

    def error(value_K: Float[np.ndarray, " K"]) -> Float[np.ndarray, " K"]:
        others = {i: np.full(len(value_K), value) for i, value in held.items()}
        return best_with(fitted, {**others, q: value_K})[0]

    unit = _linear_end(fitted, q, highest - fitted.error, held)
    valley = Valley(error, float(fitted.theta_Q[q]), fitted.error, highest, unit)
    where = fitted.law.ranges(fitted.points)[q]
    low, high = (valley.end(edge) for edge in (where.low, where.high))
    return None if low is None else math.exp(low), None if high is None else math.exp(high)


def _linear_end(fitted: Fit, q: int, rise: float, held: Mapping[int, float]) -> float:
    """Half the interval if the law were linear: sqrt(rise inv(J'J)_qq)."""
    free = [i for i in range(len(fitted.theta_Q)) if i not in held]
    slope_NQ = fitted.law.slopes(fitted.theta_Q[None], fitted.points.compute_N)[0][:, free]
    slope_NQ = slope_NQ / fitted.points.scale[:, None]
    inverse_QQ = np.linalg.pinv(slope_NQ.T @ slope_NQ, hermitian=True)
    place = free.index(q)
    tiny = 1e-9 * (1.0 + abs(float(fitted.theta_Q[q])))
    return max(math.sqrt(rise * max(float(inverse_QQ[place, place]), 0.0)), tiny)
