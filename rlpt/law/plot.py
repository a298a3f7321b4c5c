"""The drawing of a fit: points and curves over the logarithm of compute, and beside them the intervals of ceilings."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullFormatter

from rlpt.law.ceiling import Shared
from rlpt.law.findings import Found
from rlpt.law.points import Points
from rlpt.law.profile import Bounds

_COLOURS = ("#2563eb", "#d9480f", "#2b8a3e", "#862e9c", "#c2255c", "#0b7285", "#846358", "#495057")
_GREY = "#868e96"
_BEYOND = 4.0
"""Curves go on to this multiple of the last point."""
_STYLE: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e9ecef",
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "rlpt-fit",
    # A run may be called $x$.
    "text.parse_math": False,
}


def draw(found: Sequence[Found], together: Shared | None, x: str, y: str, folder: Path) -> None:
    """Write fit.svg and fit.png; ``x`` and ``y`` name the axes."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(8.4, 4.6), layout="constrained")
        main, side = figure.subplots(1, 2, sharey=True, width_ratios=(8, 1))
        for each, colour in zip(found, _colours(len(found)), strict=True):
            _curve(main, each, colour)
        _axes(main, side, found, x, y)
        bars = [(each.fitted.theta_Q[0], next(iter(each.bounds.values()))) for each in found]
        if together is not None:
            main.axhline(together.ceiling, color=_GREY, linewidth=1, linestyle=(0, (1, 2)))
            bars.append((together.ceiling, together.bounds))
        for place, (value, bounds) in enumerate(bars):
            _bar(side, place, float(value), bounds, [*_colours(len(found)), _GREY][place])
        _legend(main, found, together)
        figure.savefig(folder / "fit.svg", metadata={"Date": None, "Creator": None})
        figure.savefig(folder / "fit.png", dpi=150)


def _colours(count: int) -> list[str]:
    return [_COLOURS[i % len(_COLOURS)] for i in range(count)]


def _curve(axes: Axes, each: Found, colour: str) -> None:
    fitted, points = each.fitted, each.fitted.points
    first, last = float(points.compute_N.min()), float(points.compute_N.max())
    near, far = np.geomspace(first, last, 200), np.geomspace(last, last * _BEYOND, 60)
    axes.plot(near, fitted.predict(near), color=colour, linewidth=1.6)
    axes.plot(far, fitted.predict(far), color=colour, linewidth=1.2, linestyle=(0, (1, 1.5)))
    _dots(axes, each.window.early, colour, marker="x", alpha=0.5)
    if each.miss is None:
        _dots(axes, points, colour, marker="o")
    else:
        _dots(axes, each.miss.fitted.points, colour, marker="o")
        _dots(axes, each.miss.points, colour, marker="o", markerfacecolor="white")
        later = np.geomspace(each.miss.until, last * _BEYOND, 100)
        axes.plot(
            later, each.miss.fitted.predict(later), color=colour, linewidth=1, linestyle=(0, (5, 3))
        )
    if each.window.start is not None:
        # Nothing is at the left end of a logarithmic axis: R0 is a mark on its edge.
        axes.plot(
            [0.0],
            [each.window.start],
            color=colour,
            marker=5,
            transform=axes.get_yaxis_transform(),
            clip_on=False,
        )


def _dots(axes: Axes, points: Points, colour: str, **style: Any) -> None:
    axes.plot(
        points.compute_N, points.value_N, color=colour, linestyle="none", markersize=4, **style
    )


def _bar(axes: Axes, place: int, value: float, bounds: Bounds, colour: str) -> None:
    """An interval; to the end of the axes, with an arrow, where it has no end."""
    ends = [
        end if end is not None else edge for end, edge in zip(bounds, axes.get_ylim(), strict=True)
    ]
    axes.plot([place, place], ends, color=colour, linewidth=2)
    axes.plot([place], [value], color=colour, marker="o", markersize=5)
    for end, height, marker in zip(bounds, (0.01, 0.99), ("v", "^"), strict=True):
        if end is None:
            arrow = {"color": colour, "marker": marker, "transform": axes.get_xaxis_transform()}
            axes.plot([place], [height], clip_on=False, **arrow)


def _axes(main: Axes, side: Axes, found: Sequence[Found], x: str, y: str) -> None:
    main.set_xscale("log")
    main.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    main.xaxis.set_minor_formatter(NullFormatter())
    main.set(xlabel=f"{x} (log)", ylabel=y)
    main.set_ylim(*_limits(found))
    side.set_xticks([])
    side.set_xlabel(f"ceiling {found[0].fitted.law.names[0]},\n95%")
    side.margins(x=0.6)
    side.tick_params(labelleft=False, left=False)


def _limits(found: Sequence[Found]) -> tuple[float, float]:
    """All points, and ceilings that are no further away than the points are wide."""
    values = np.concatenate([each.curve.value_N for each in found])
    low, high = float(values.min()), float(values.max())
    wide = high - low
    ends = [
        end
        for each in found
        for end in (each.fitted.theta_Q[0], *next(iter(each.bounds.values())))
        if end is not None
    ]
    near = [float(end) for end in ends if low - wide <= end <= high + wide]
    low, high = min([low, *near]), max([high, *near])
    return low - 0.06 * (high - low), high + 0.06 * (high - low)


def _legend(axes: Axes, found: Sequence[Found], together: Shared | None) -> None:
    first = _COLOURS[0] if len(found) == 1 else _GREY
    plain = {"color": first, "linestyle": "none", "marker": "o", "markersize": 4}
    handles = [
        Line2D([], [], color=colour, label=each.curve.name)
        for each, colour in zip(found, _colours(len(found)), strict=True)
    ]
    handles.append(Line2D([], [], **plain, label="fitted"))
    if any(each.miss for each in found):
        handles.append(
            Line2D([], [], **plain, markerfacecolor="white", label="later points, to be predicted")
        )
        handles.append(
            Line2D(
                [],
                [],
                color=first,
                linewidth=1,
                linestyle=(0, (5, 3)),
                label="law of the first points",
            )
        )
    if any(len(each.window.early) for each in found):
        handles.append(
            Line2D(
                [],
                [],
                color=first,
                linestyle="none",
                marker="x",
                markersize=4,
                label="dropped, early",
            )
        )
    if together is not None:
        handles.append(Line2D([], [], color=_GREY, linestyle=(0, (1, 2)), label="one ceiling"))
    axes.legend(handles=handles, fontsize=8)
