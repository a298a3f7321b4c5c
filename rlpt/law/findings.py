"""What was found, and fit.json: plain values, every bound without an end with the reason beside it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rlpt.law.ceiling import Shared
from rlpt.law.curves import Curve
from rlpt.law.holdout import Miss
from rlpt.law.least_squares import Fit
from rlpt.law.points import Points
from rlpt.law.profile import Bounds
from rlpt.law.window import Window

MARGIN = 0.02
"""ScaleRL takes ceilings this near for one and the same: by three seeds, of pass rates, not of nats."""
Table = dict[str, Any]


@dataclass(frozen=True)
class Found:
    """One curve and its law."""

    curve: Curve
    window: Window
    fitted: Fit
    bounds: dict[str, Bounds]
    miss: Miss | None


def tabled(found: Sequence[Found], together: Shared | None) -> Table:
    """One table for every run, and one for what they share."""
    table: Table = {"runs": [_run(each) for each in found]}
    if together is not None:
        table["shared_ceiling"] = _together(found, together)
    return table


def _run(each: Found) -> Table:
    law, curve, seen, points = each.fitted.law, each.curve, each.window, each.fitted.points
    residual_N = points.value_N - each.fitted.predict(points.compute_N)
    spread = float(((points.value_N - points.value_N.mean()) ** 2).sum())
    return {
        "name": curve.name,
        "note": curve.note,
        "start": None if seen.start is None else {"value": seen.start, "from": seen.start_from},
        "parameters": {
            name: parameter(each.fitted.values[name], bounds, name == law.names[0])
            for name, bounds in each.bounds.items()
        },
        "all_parameters": each.fitted.values,
        "noise": each.fitted.noise,
        "noise_from": "residuals" if points.sd_N is None else "intervals",
        "r_squared": 1.0 - float(residual_N @ residual_N) / spread if spread else None,
        "points": {
            "fitted": _plain(points),
            "early": _plain(seen.early),
            "skip_before": seen.skip_before,
            "not_finite": curve.not_finite,
        },
        "hold_out": None if each.miss is None else _miss(each.miss),
    }


def parameter(value: float, bounds: Bounds, is_ceiling: bool) -> Table:
    """Value and 95% interval."""
    low, high = bounds
    table: Table = {"value": value, "ci_low": low, "ci_high": high}
    if None in bounds:
        table["reason"] = _reason(bounds, is_ceiling)
    return table


def _reason(bounds: Bounds, is_ceiling: bool) -> str:
    side = (
        "at all" if bounds == (None, None) else "from above" if bounds[1] is None else "from below"
    )
    if is_ceiling:
        return f"cannot be bounded {side}: a curve that never levels off fits as well; more compute would tell"
    return f"cannot be bounded {side}"


def _miss(miss: Miss) -> Table:
    return {
        "until": miss.until,
        "fitted_points": len(miss.fitted.points),
        "predicted_points": len(miss.points),
        "rms": miss.rms,
        "signed": miss.signed,
        "noise": miss.fitted.noise,
        "all_parameters": miss.fitted.values,
    }


def _together(found: Sequence[Found], together: Shared) -> Table:
    ceilings = [float(each.fitted.theta_Q[0]) for each in found]
    return {
        "ceiling": parameter(together.ceiling, together.bounds, True),
        "p_value": together.p_value,
        "largest_difference": max(ceilings) - min(ceilings),
        "margin": MARGIN,
        "runs": [
            {
                "name": each.curve.name,
                "parameters": {
                    name: parameter(fitted.values[name], b, False) for name, b in shapes.items()
                },
                "noise": fitted.noise,
            }
            for each, fitted, shapes in zip(found, together.fits, together.shapes, strict=True)
        ],
    }


def _plain(points: Points) -> list[list[float]]:
    return [[float(x), float(y)] for x, y in zip(points.compute_N, points.value_N, strict=True)]
