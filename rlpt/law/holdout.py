"""Does the law predict? It is fitted to the first part of the compute and asked for the rest.

ScaleRL (arXiv 2510.13786, section 4) fits the first half and predicts the second. What an extrapolation missed by is
the one honest measure of a fit: a good one misses by the noise, and as often above as below.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from rlpt.law.least_squares import Fit, fit
from rlpt.law.points import Law, Points

LEAST_POINTS = 4
"""Three parameters, and one point to be wrong at."""


@dataclass(frozen=True)
class Miss:
    """By how much the rest of the points lay off the curve through the first ones."""

    fitted: Fit
    points: Points
    """What was predicted."""
    until: float
    """The compute up to which points were fitted."""

    @property
    def rms(self) -> float:
        return math.sqrt(float(np.mean(self._off**2)))

    @property
    def signed(self) -> float:
        """Mean of measured minus predicted: above 0, the law promised too little."""
        return float(np.mean(self._off))

    @property
    def _off(self) -> np.ndarray:
        return self.points.value_N - self.fitted.predict(self.points.compute_N)


def held_out(make: Callable[[Points], Law], points: Points, fraction: float) -> Miss | None:
    """The miss over the last ``fraction`` of the compute; None where too few points come before it."""
    last = float(points.compute_N.max())
    until = last - fraction * last
    first_N = points.compute_N <= until
    if first_N.sum() < LEAST_POINTS:
        return None
    first = points.where(first_N)
    return Miss(fit(make(first), first), points.where(~first_N), until)
