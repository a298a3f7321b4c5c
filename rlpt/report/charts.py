"""What was measured on held-out text: gain along training, controls, lengths of thoughts."""

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from rlpt.report.drawing import BAND, INK, SERIES, canvas, line_style, svg, two_columns, whole_steps
from rlpt.report.run import Run
from rlpt.report.words import CONTROLS
from rlpt.statistics import HARMLESS_BAND

Row = dict[str, Any]
_NEUTRAL = SERIES[2]


def held_out(runs: Sequence[Run]) -> str | None:
    """Held-out gain over the steps with 95% bars, a line a run; None where no evaluation has one."""
    measured = [_gains(run.evaluations) for run in runs]
    if not any(measured):
        return None
    with canvas(7.6, 2.7) as (figure, axes):
        axes.axhspan(-HARMLESS_BAND, HARMLESS_BAND, color=BAND, linewidth=0)
        axes.axhline(0, color=INK, linewidth=0.8)
        for number, points in enumerate(measured):
            _bars(axes, points, number)
        axes.set(ylabel="held-out gain, nats per token")
        whole_steps(axes)
        return svg(figure, "heldout", "Held-out gain over training steps")


def _gains(evaluations: Sequence[Row]) -> list[tuple[int, Row]]:
    """(step, gain) of every evaluation that measured one."""
    found = ((row["step"], row["summary"].get("gain_heldout")) for row in evaluations)
    return [(step, gain) for step, gain in found if gain and gain.get("mean") is not None]


def _bars(axes: Axes, points: Sequence[tuple[int, Row]], number: int) -> None:
    style = line_style(number)
    means = [gain["mean"] for _, gain in points]
    axes.plot([step for step, _ in points], means, **style, linewidth=1.6, marker="o", markersize=4)
    for at, gain in points:
        if gain.get("ci_low") is not None:
            axes.plot(
                [at, at], [gain["ci_low"], gain["ci_high"]], color=style["color"], linewidth=1.2
            )


def forest(summary: Row) -> str | None:
    """Left: own thought and controls against no thought. Right: own against each control."""
    controls = {
        name: summary["controls"][name] for name in CONTROLS if name in summary.get("controls", {})
    }
    if not summary.get("gain_heldout"):
        return None
    names = ["own", *controls]
    against_none = [summary["gain_heldout"], *(control["gain"] for control in controls.values())]
    own_minus = [None, *(control["own_minus_control"] for control in controls.values())]
    with two_columns(0.9 + 0.32 * len(names)) as (figure, left, right):
        _whiskers(left, against_none, "against no thought, nats per token")
        _whiskers(right, own_minus, "own thought minus control, nats per token")
        _names(left, [CONTROLS[name][0] for name in names])
        return svg(figure, "forest", "Controls with 95% intervals")


def side_by_side(runs: Sequence[Run]) -> str | None:
    """Last held-out gain of every run, and its change, each with its 95% interval."""
    gains = [run.last_evaluation.get("gain_heldout") for run in runs]
    if not any(gains):
        return None
    with two_columns(0.9 + 0.32 * len(runs)) as (figure, left, right):
        _whiskers(left, gains, "held-out gain, nats per token", alike=False)
        changes = [run.summary.get("gain_change") for run in runs]
        _whiskers(right, changes, "its change in the run, nats per token", alike=False)
        _names(left, [run.name for run in runs])
        return svg(figure, "runs", "Held-out gain of every run with 95% intervals")


def _names(axes: Axes, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), list(names))
    axes.set_ylim(len(names) - 0.5, -0.5)


def _whiskers(
    axes: Axes, measured: Sequence[Row | None], label: str, *, alike: bool = True
) -> None:
    """A point and its interval a row; ``alike``: all but the first are the same kind of thing."""
    axes.axvspan(-HARMLESS_BAND, HARMLESS_BAND, color=BAND, linewidth=0)
    axes.axvline(0, color=INK, linewidth=0.8)
    for place, table in enumerate(measured):
        if table is None or table.get("mean") is None:
            continue
        colour = SERIES[place % len(SERIES)] if not alike else SERIES[0] if not place else _NEUTRAL
        if table.get("ci_low") is not None:
            axes.plot(
                [table["ci_low"], table["ci_high"]], [place, place], color=colour, linewidth=2
            )
        axes.plot([table["mean"]], [place], color=colour, marker="o", markersize=5)
    axes.set_xlabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.grid(visible=False, axis="y")


def lengths(histogram: Sequence[int]) -> str | None:
    """How many thoughts have how many tokens."""
    if not histogram:
        return None
    with canvas() as (figure, axes):
        axes.bar(range(len(histogram)), histogram, color=SERIES[0], width=0.85)
        axes.set(xlabel="tokens in the thought", ylabel="thoughts")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(visible=False, axis="x")
        return svg(figure, "lengths", "Lengths of held-out thoughts")
