"""Charts as inline SVG by matplotlib: real axes, the page's own fonts and colours, light and dark
alike.

Colours are written as placeholders that become CSS variables, so that one drawing serves both
themes. Nothing in a drawing refers to anything outside it.
"""

import io
import math
import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from rlpt.report.words import CONTROLS, visible
from rlpt.statistics import HARMLESS_BAND

Row = dict[str, Any]
INK, GRID, BAND, FIRST, SECOND, THIRD = (f"#1000{n:02d}" for n in (1, 2, 3, 4, 5, 6))
_VARIABLES = {INK: "ink-2", GRID: "rule", BAND: "band", FIRST: "c1", SECOND: "c2", THIRD: "c3"}
_SERIES = (FIRST, SECOND, THIRD)
_POINTS = 240
_STYLE: Any = {
    "svg.fonttype": "none",
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": GRID,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "text.parse_math": False,
    "legend.frameon": False,
    "legend.fontsize": 8,
}


class Curve(NamedTuple):
    """One small chart of some metrics over the steps."""

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
    Curve(
        "Engine against trainer",
        "|d|, nats per token",
        (
            ("mismatch/abs_log_ratio", "mean"),
            ("mismatch/max_abs_log_ratio", "largest"),
            ("mismatch/current_abs_log_ratio", "mean, newest weights"),
        ),
        "log",
    ),
    Curve("Drift from the sampling weights", "k3, nats", (("mismatch/k3", "k3"),)),
    Curve("Effective sample", "share", (("mismatch/ess", "ESS"),)),
    Curve("Gradient norm", "before clipping", (("loss/grad_norm", "norm"),)),
)
"""The charts; all other metrics are in the table."""


def curves(metrics: Sequence[Row]) -> list[str]:
    """One small chart for every entry of CURVES that some step has a finite value for."""
    return [
        _svg(_curve(curve, metrics), f"curve{number}", curve.title)
        for number, curve in enumerate(CURVES)
        if any(finite(metrics, name) for name, _ in curve.series)
    ]


def held_out(evaluations: Sequence[Row]) -> str | None:
    """Held-out gain over the steps with 95% bars; None where no evaluation has one."""
    points = [
        (row["step"], row["summary"]["gain_heldout"])
        for row in evaluations
        if "gain_heldout" in row["summary"]
    ]
    if not points:
        return None
    with matplotlib.rc_context(_STYLE):
        figure, axes = _axes(7.6, 2.7)
        axes.axhspan(-HARMLESS_BAND, HARMLESS_BAND, color=BAND, linewidth=0)
        axes.axhline(0, color=INK, linewidth=0.8)
        step = [step for step, _ in points]
        axes.plot(
            step,
            [gain["mean"] for _, gain in points],
            color=FIRST,
            linewidth=1.6,
            marker="o",
            markersize=4,
        )
        for at, gain in points:
            if gain.get("ci_low") is not None:
                axes.plot([at, at], [gain["ci_low"], gain["ci_high"]], color=FIRST, linewidth=1.2)
        axes.set(xlabel="step", ylabel="held-out gain, nats per token")
        _whole_steps(axes)
        return _svg(figure, "heldout", "Held-out gain over training steps")


def forest(summary: Row) -> str | None:
    """Left: own thought and controls against no thought. Right: own against each control."""
    controls = {
        name: summary["controls"][name] for name in CONTROLS if name in summary.get("controls", {})
    }
    if "gain_heldout" not in summary:
        return None
    names = ["own", *controls]
    against_none = [summary["gain_heldout"], *(control["gain"] for control in controls.values())]
    own_minus = [None, *(control["own_minus_control"] for control in controls.values())]
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(7.6, 0.9 + 0.32 * len(names)), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        _whiskers(left, against_none, "against no thought, nats per token")
        _whiskers(right, own_minus, "own thought minus control, nats per token")
        left.set_yticks(range(len(names)), [CONTROLS[name][0] for name in names])
        left.set_ylim(len(names) - 0.5, -0.5)
        return _svg(figure, "forest", "Controls with 95% intervals")


def lengths(histogram: Sequence[int]) -> str | None:
    """How many thoughts have how many tokens."""
    if not histogram:
        return None
    with matplotlib.rc_context(_STYLE):
        figure, axes = _axes(3.7, 2.2)
        axes.bar(range(len(histogram)), histogram, color=FIRST, width=0.85)
        axes.set(xlabel="tokens in the thought", ylabel="thoughts")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(visible=False, axis="x")
        return _svg(figure, "lengths", "Lengths of held-out thoughts")


def sparkline(values: Sequence[float]) -> str:
    """A line of 100 by 20 without axes: the shape of a metric, nothing else."""
    thinned = [value for _, value in _thin(list(enumerate(values)), 60)]
    low, high = min(thinned), max(thinned)
    span = (high - low) or 1.0
    step = 100 / max(1, len(thinned) - 1)
    points = " ".join(
        f"{i * step:.1f},{18 - 16 * (v - low) / span:.1f}" for i, v in enumerate(thinned)
    )
    line = f'<polyline points="{points}"/>'
    return f'<svg class="spark" viewBox="0 0 100 20" aria-hidden="true">{line}</svg>'


def finite(metrics: Sequence[Row], name: str) -> list[tuple[int, float]]:
    """(step, value) wherever the metric is a finite number."""
    pairs = ((row.get("step", 0), row.get(name)) for row in metrics)
    return [
        (step, float(value))
        for step, value in pairs
        if isinstance(value, (int, float)) and math.isfinite(value)
    ]


def _curve(curve: Curve, metrics: Sequence[Row]) -> Figure:
    with matplotlib.rc_context(_STYLE):
        figure, axes = _axes(3.7, 2.2)
        axes.set_title(curve.title, fontweight="bold")
        _stages(axes, metrics)
        drawn = 0
        for (name, label), colour in zip(curve.series, _SERIES, strict=False):
            points = _thin(finite(metrics, name), _POINTS)
            if curve.scale == "log":
                # A difference of exactly 0 has no place on these axes.
                points = [point for point in points if point[1] > 0]
            if points:
                drawn += 1
                axes.plot(*zip(*points, strict=True), color=colour, linewidth=1.3, label=label)
        axes.set(xlabel="step", ylabel=curve.unit)
        if curve.scale == "log" and drawn:
            _powers(axes)
        _whole_steps(axes)
        if drawn > 1:
            axes.legend()
        return figure


def _axes(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _whole_steps(axes: Axes) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.grid(visible=False, axis="x")


def _powers(axes: Axes) -> None:
    """Powers of ten in plain figures: matplotlib's own are mathematics, which is not parsed here."""
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _stages(axes: Axes, metrics: Sequence[Row]) -> None:
    """A thin line where one stage ends and the next begins."""
    for before, after in pairwise(metrics):
        if before.get("stage") != after.get("stage"):
            axes.axvline(after.get("step", 0), color=INK, linewidth=0.8, linestyle=(0, (2, 3)))


def _whiskers(axes: Axes, measured: Sequence[Row | None], label: str) -> None:
    axes.axvspan(-HARMLESS_BAND, HARMLESS_BAND, color=BAND, linewidth=0)
    axes.axvline(0, color=INK, linewidth=0.8)
    for place, table in enumerate(measured):
        if table is None:
            continue
        colour = FIRST if place == 0 or axes.get_subplotspec().is_last_col() else SECOND  # pyright: ignore
        if table.get("ci_low") is not None:
            axes.plot(
                [table["ci_low"], table["ci_high"]], [place, place], color=colour, linewidth=2
            )
        axes.plot([table["mean"]], [place], color=colour, marker="o", markersize=5)
    axes.set_xlabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.grid(visible=False, axis="y")


def _thin(points: list[tuple[int, float]], limit: int) -> list[tuple[float, float]]:
    """At most about ``limit`` points: means of neighbours where there are more."""
    width = max(1, math.ceil(len(points) / limit))
    chunks = [points[i : i + width] for i in range(0, len(points), width)]
    return [tuple(sum(part) / len(chunk) for part in zip(*chunk, strict=True)) for chunk in chunks]  # pyright: ignore


def _svg(figure: Figure, name: str, title: str) -> str:
    """The drawing as markup for an HTML page: no header, no addresses, colours as variables, ids of
    its own.
    """
    buffer = io.StringIO()
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": f"rlpt-{name}"}):
        figure.savefig(
            buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None}
        )
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<(metadata|style).*?</\1>", "", text, flags=re.DOTALL)
    text = re.sub(
        r'<svg[^>]*?viewBox="([^"]+)"[^>]*>',
        r'<svg class="chart" viewBox="\1" role="img">',
        text,
        count=1,
    )
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', text))
    text = re.sub(r' id="([^"]+)"', lambda m: m.group(0) if m.group(1) in used else "", text)
    # matplotlib 3.10 writes `font: bold 9px 'DejaVu Sans', ...`, 3.11 one property for each.
    text = re.sub(r"font: (?:bold )?([\d.]+px) [^;\"]*", r"font-size: \1", text)
    text = re.sub(r"font-family: [^;\"]*;? ?", "", text)
    for placeholder, variable in _VARIABLES.items():
        text = text.replace(placeholder, f"var(--{variable})")
    return text.replace('role="img">', f'role="img" aria-label="{visible(title)}">', 1)
