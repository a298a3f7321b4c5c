"""Which points a law sees: where it starts, what is too early, what is too little. Pure."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from rlpt.law.curves import Curve
from rlpt.law.holdout import LEAST_POINTS
from rlpt.law.points import Points
from rlpt_data.strict import UserError

EARLY = 0.05
"""Points in this first part of the compute are dropped unless said otherwise. Rewards begin almost linearly, and no
sigmoid does: ScaleRL (arXiv 2510.13786, appendix A.5) drops 1.5k of 8k to 100k GPU-hours. The rule looks at compute
alone, so it cannot be fitted to the values."""


@dataclass(frozen=True)
class Window:
    """What is fitted, and what is not."""

    start: float | None
    """R0: the value before any compute; None: the law has no use for it."""
    start_from: str
    skip_before: float
    points: Points
    early: Points
    """Dropped; a point without any compute is not among them."""


def window(
    curve: Curve,
    skip_before: float | None,
    start: float | Literal["measured"] | None,
    weighted: bool,
) -> Window:
    """The points of a curve that a law is fitted to. Raises UserError where they are too few or all the same.

    A measured start is the first point, which then is no point of the fit.
    """
    _check(curve, weighted)
    points = Points(curve.compute_N, curve.value_N, curve.sd_N if weighted else None)
    skip = EARLY * float(curve.compute_N.max()) if skip_before is None else skip_before
    late_N = (points.compute_N >= skip) & (points.compute_N > 0)
    start_from = "given"
    if start == "measured":
        late_N &= np.arange(len(points)) > 0
        start, start_from = float(curve.value_N[0]), f"the first point, at {curve.compute_N[0]:g}"
    _check_count(curve, int(late_N.sum()), skip)
    early = points.where(~late_N & (points.compute_N > 0))
    return Window(start, start_from, skip, points.where(late_N), early)


def _check(curve: Curve, weighted: bool) -> None:
    if not len(curve.value_N):
        raise UserError(
            f"{curve.name}: no point that is a number ({curve.not_finite} are not); nothing to fit"
        )
    if len(curve.value_N) > 1 and np.ptp(curve.value_N) == 0:
        raise UserError(
            f"{curve.name}: all {len(curve.value_N)} points are {curve.value_N[0]:g}; a law needs a value that moves"
        )
    if weighted and curve.sd_N is None:
        raise UserError(f"{curve.name}: not every point has an interval; use --noise residuals")


def _check_count(curve: Curve, count: int, skip: float) -> None:
    if count < LEAST_POINTS:
        total = len(curve.value_N)
        raise UserError(
            f"{curve.name}: {count} of {total} points to fit (from {skip:g} on, the start left out), and a law of "
            f"three parameters needs {LEAST_POINTS}; evaluate more often, or lower --skip-before"
        )
