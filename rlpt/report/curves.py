"""Metrics over the steps of training: a chart a metric, of one run or of several on the same axes."""

from collections.abc import Sequence
from typing import NamedTuple

from matplotlib.figure import Figure

from rlpt.report.drawing import canvas, finite, line_style, powers, stages, svg, thin, whole_steps
from rlpt.report.run import Run


class Curve(NamedTuple):
    """One small chart of some metrics over the steps. Of several runs only the first metric is
    drawn, a line a run.
    """

    title: str
    unit: str
    series: tuple[tuple[str, str], ...]
    """(metric, name in the legend)."""
    scale: str = "linear"
    """Of the values; "log" where a mean and a maximum share the axes."""


CURVES = (
    Curve(
        "Next-token loss",
        "nats per token",
        (("loss/next_token", "text"), ("loss/thought", "thoughts")),
    ),
    Curve("Reward", "mean of the step", (("reward/mean", "reward"),)),
    Curve(
        "Gain while training",
        "nats per token",
        (("gain/mean", "mean"), ("gain/marginal_n", "marginal")),
    ),
    Curve("Thought length", "tokens", (("thought/length", "mean"),)),
    Curve("Thoughts that end themselves", "share", (("thought/closer_rate", "own closer"),)),
    Curve("Surprise in thoughts", "nats per action", (("thought/nll", "-log p"),)),
    Curve("Spread within a group", "std of the reward", (("reward/group_std", "std"),)),
    Curve("Gradient norm", "before clipping", (("loss/grad_norm", "norm"),)),
)
"""The charts; all other metrics are in the table."""


def curves(runs: Sequence[Run], wanted: Sequence[Curve] = CURVES) -> list[str]:
    """One small chart for every wanted curve that some step of some run has a finite value for."""
    return [
        svg(_curve(curve, runs), f"curve{number}-{curve.title}", curve.title)
        for number, curve in enumerate(wanted)
        if any(finite(run.metrics, name) for run in runs for name, _ in curve.series)
    ]


def _curve(curve: Curve, runs: Sequence[Run]) -> Figure:
    series = (
        [(runs[0].metrics, *pair) for pair in curve.series]
        if len(runs) == 1
        else [(run.metrics, curve.series[0][0], "") for run in runs]
    )
    with canvas() as (figure, axes):
        axes.set_title(curve.title, fontweight="bold")
        if len(runs) == 1:
            stages(axes, runs[0].metrics)
        drawn = 0
        for number, (metrics, name, label) in enumerate(series):
            # A value of exactly 0 has no place on axes of powers of ten.
            points = positive(finite(metrics, name), curve.scale == "log")
            if points:
                drawn += 1
                axes.plot(
                    *zip(*thin(points), strict=True),
                    **line_style(number),
                    linewidth=1.3,
                    label=label,
                )
        axes.set_ylabel(curve.unit)
        if curve.scale == "log" and drawn:
            powers(axes)
        whole_steps(axes)
        if drawn > 1 and len(runs) == 1:
            axes.legend()
        return figure


def positive(points: list[tuple[int, float]], only: bool) -> list[tuple[int, float]]:
    """The points above 0 where ``only`` those have a place; else all."""
    return [point for point in points if point[1] > 0] if only else points
