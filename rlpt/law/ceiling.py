"""Several runs under one ceiling, so that their other parameters can be compared.

B and C_mid say how fast a run goes where it goes; of runs that go to different ceilings they compare nothing.
ScaleRL (arXiv 2510.13786, appendix A.7) refits two runs with the average of their ceilings. Here it is the ceiling with
the least squares over all points of all runs, and an F test says whether one is enough.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from rlpt.law.least_squares import Fit, best_with
from rlpt.law.profile import Bounds, ceiling_error, ceiling_interval, shape_intervals, top

_POINTS, _CLOSER = 17, 1e-9


@dataclass(frozen=True)
class Shared:
    """What one ceiling makes of several fits."""

    ceiling: float
    bounds: Bounds
    fits: tuple[Fit, ...]
    """Each at its best under the ceiling."""
    shapes: tuple[dict[str, Bounds], ...]
    """Intervals of the other parameters of every run, the ceiling held."""
    p_value: float
    """How often points of runs with one ceiling would speak against it as loudly as these."""


def shared(fits: Sequence[Fit]) -> Shared:
    """The ceiling that all runs agree on best. Needs two fits or more, of one law."""
    ceiling = _lowest(fits)
    held = tuple(_held(fitted, ceiling) for fitted in fits)
    least = sum(fitted.error for fitted in held)
    highest = top(fits, least, 2 * len(fits) + 1)
    return Shared(
        ceiling,
        ceiling_interval(held, ceiling, least, highest),
        held,
        tuple(shape_intervals(fitted, {0: ceiling}) for fitted in held),
        _p_value(fits, least),
    )


def _lowest(fits: Sequence[Fit]) -> float:
    """The ceiling with the least error; it lies between the lowest and the highest of the runs alone."""
    ceilings = [float(fitted.theta_Q[0]) for fitted in fits]
    low, high = min(ceilings), max(ceilings)
    while high - low > _CLOSER * max(1.0, abs(low), abs(high)):
        grid_K = np.linspace(low, high, _POINTS)
        k = int(ceiling_error(fits, grid_K).argmin())
        low, high = float(grid_K[max(k - 1, 0)]), float(grid_K[min(k + 1, _POINTS - 1)])
    return (low + high) / 2


def _held(fitted: Fit, ceiling: float) -> Fit:
    error_K, theta_KQ = best_with(fitted, {0: np.array([ceiling])})
    return replace(fitted, theta_Q=theta_KQ[0], error=float(error_K[0]))


def _p_value(fits: Sequence[Fit], least: float) -> float:
    """F = (rise of the error / (R - 1)) / (error of R runs alone / (n - 3 R)); chi-squared where the noise is given."""
    from scipy.special import chdtrc, fdtrc

    alone, ceilings = sum(fitted.error for fitted in fits), len(fits) - 1
    rise = max(least - alone, 0.0)
    if fits[0].points.sd_N is not None:
        return float(chdtrc(ceilings, rise))
    freedom = sum(len(fitted.points) for fitted in fits) - 3 * len(fits)
    return float(fdtrc(ceilings, freedom, rise / ceilings / (alone / freedom))) if alone else 1.0
