"""The engine's log-probabilities against the trainer's, with the limits that judge them drawn in."""

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rlpt.guards import Guard, bounds
from rlpt.limits import MismatchConfig
from rlpt.report.curves import Curve, curves, positive
from rlpt.report.drawing import BAD, INK, canvas, finite, line_style, powers, svg, thin, whole_steps
from rlpt.report.readings import dtype_of, limits_of
from rlpt.report.run import Run

Row = dict[str, Any]
ENGINE = Curve(
    "Engine against trainer",
    "|d|, nats per token",
    (
        ("mismatch/abs_log_ratio", "mean"),
        ("mismatch/max_abs_log_ratio", "largest"),
        ("mismatch/current_abs_log_ratio", "mean, newest weights"),
    ),
    "log",
)
_LINEAR = ("current_exp_abs_log_ratio", "ess", "ratio")
_JUDGED = {
    "current_exp_abs_log_ratio": ("Newest weights: mean exp|d|", "1 is equal"),
    "current_rms_log_ratio": ("Newest weights: rms of d", "nats per token"),
    "current_k1": ("Newest weights: |mean d|", "nats per token"),
    "k1": ("All tokens: |mean d|", "nats per token"),
    "chi2": ("All tokens: chi-squared", "mean ratio² - 1"),
    "ess": ("Effective sample", "share"),
    "ratio": ("Mean ratio", "1 is equal"),
}
"""Guard -> (title, unit); in the order of the panel."""


def shared_limits(runs: Sequence[Run]) -> MismatchConfig | None:
    """The limits of all runs; None where they have not the same."""
    first = limits_of(runs[0].config)
    return first if all(limits_of(run.config) == first for run in runs) else None


def alarms(run: Run) -> tuple[int, int] | None:
    """(steps in which the trainer warned, steps it judged); None where it judged none."""
    counted = [value for _, value in finite(run.metrics, "mismatch/warnings")]
    return (sum(value > 0 for value in counted), len(counted)) if counted else None


def mismatch(runs: Sequence[Run]) -> list[str]:
    """A chart for every judged number that was measured, with the limits of the runs where they
    share them.
    """
    judge = shared_limits(runs)
    drawn = []
    for metric, (title, unit) in _JUDGED.items():
        if any(finite(run.metrics, f"mismatch/{metric}") for run in runs):
            figure = _judged(runs, metric, title, unit, judge)
            drawn.append(svg(figure, f"judged-{metric}", title))
    return drawn + curves(runs, [ENGINE])


def _judged(
    runs: Sequence[Run], metric: str, title: str, unit: str, judge: MismatchConfig | None
) -> Figure:
    linear = metric in _LINEAR
    with canvas() as (figure, axes):
        axes.set_title(title, fontweight="bold")
        for number, run in enumerate(runs):
            points = positive(_sizes(run, metric), not linear)
            if points:
                axes.plot(*zip(*thin(points), strict=True), **line_style(number), linewidth=1.3)
        if judge is not None:
            _limit_lines(axes, runs[0], metric, "warn", judge)
            _limit_lines(axes, runs[0], metric, "halt", judge)
        axes.set_ylabel(unit)
        if metric == "ess":
            axes.set_ylim(0, 1.05)
        if not linear:
            powers(axes)
        whole_steps(axes)
        return figure


def _sizes(run: Run, metric: str) -> list[tuple[int, float]]:
    """(step, what is held against the limit)."""
    points = finite(run.metrics, f"mismatch/{metric}")
    return [(step, abs(value) if metric.endswith("k1") else value) for step, value in points]


def _limit_lines(axes: Axes, run: Run, metric: str, level: str, judge: MismatchConfig) -> None:
    """Where the trainer warns (dotted) and where it ends the run (solid), step by step."""
    found: dict[str, list[tuple[int, float]]] = {}
    for row in run.metrics:
        for guard, limit in _bounds(row, judge, level, run.config):
            if guard.metric == metric and 0 < limit < math.inf:
                found.setdefault(guard.limit, []).append((row["step"], limit))
    for points in found.values():
        style: Any = "-" if level == "halt" else (0, (1.2, 1.6))
        colour = BAD if level == "halt" else INK
        axes.plot(*zip(*thin(points), strict=True), color=colour, linestyle=style, linewidth=1)
        # At opposite ends: on axes of powers of ten the two lines are close.
        at, side = (points[-1], "right") if level == "halt" else (points[0], "left")
        axes.annotate(level, at, ha=side, va="bottom", color=colour, fontsize=8)


def _bounds(row: Row, judge: MismatchConfig, level: str, config: Row) -> list[tuple[Guard, float]]:
    numbers = {name: value for name, value in row.items() if isinstance(value, (int, float))}
    try:
        return list(bounds(numbers, getattr(judge, level), dtype_of(config)))
    except KeyError:
        # A line that lacks what the limit of a mean is computed from, or a dtype that nobody knows, cannot be judged.
        return []
