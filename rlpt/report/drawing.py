"""Charts as inline SVG by matplotlib: real axes, the page's own fonts and colours, light and dark
alike.

Colours are written as placeholders that become CSS variables, so that one drawing serves both
themes. Nothing in a drawing refers to anything outside it.
"""

import io
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from html import escape
from itertools import pairwise
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from rlpt_data.visible import visible

Row = dict[str, Any]
Points = Sequence[tuple[float, float]]
INK, GRID, BAND, BAD = (f"#1000{n:02d}" for n in range(1, 5))
SERIES = tuple(f"#1000{n:02d}" for n in range(10, 16))
"""Of runs, and of the lines of one chart; the first is blue and the second orange."""
_VARIABLES = {INK: "ink-2", GRID: "rule", BAND: "band", BAD: "bad"} | {
    placeholder: f"c{number}" for number, placeholder in enumerate(SERIES, start=1)
}
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1.2, 1.6)), (0, (6, 2, 1.2, 2)))
"""Beside the colour, for eyes that do not tell colours: six colours and four dashes name 12 runs."""
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


@contextmanager
def canvas(width: float = 3.7, height: float = 2.2) -> Iterator[tuple[Figure, Axes]]:
    """An empty chart in the page's style, inches wide and high."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure, figure.subplots()


@contextmanager
def two_columns(height: float) -> Iterator[tuple[Figure, Axes, Axes]]:
    """Two charts beside each other, over one list of names."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(7.6, height), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        yield figure, left, right


def line_style(index: int) -> dict[str, Any]:
    """Colour and dash of line number ``index``."""
    return {"color": SERIES[index % len(SERIES)], "linestyle": DASHES[index % len(DASHES)]}


def finite(metrics: Sequence[Row], name: str) -> list[tuple[int, float]]:
    """(step, value) wherever the metric is a finite number."""
    pairs = ((row.get("step", 0), row.get(name)) for row in metrics)
    return [
        (step, float(value))
        for step, value in pairs
        if isinstance(value, (int, float)) and math.isfinite(value)
    ]


def thin(points: Points, limit: int = _POINTS) -> list[tuple[float, float]]:
    """At most about ``limit`` points: means of neighbours where there are more."""
    width = max(1, math.ceil(len(points) / limit))
    chunks = [points[i : i + width] for i in range(0, len(points), width)]
    return [tuple(sum(part) / len(chunk) for part in zip(*chunk, strict=True)) for chunk in chunks]  # pyright: ignore


def whole_steps(axes: Axes) -> None:
    """The horizontal axis counts steps."""
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.grid(visible=False, axis="x")


def powers(axes: Axes) -> None:
    """Powers of ten in plain figures: matplotlib's own are mathematics, which is not parsed here."""
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def stages(axes: Axes, metrics: Sequence[Row]) -> None:
    """A thin line where one stage ends and the next begins."""
    for before, after in pairwise(metrics):
        if before.get("stage") != after.get("stage"):
            axes.axvline(after.get("step", 0), color=INK, linewidth=0.8, linestyle=(0, (2, 3)))


def sparkline(values: Sequence[float]) -> str:
    """A line of 100 by 20 without axes: the shape of a metric, nothing else."""
    thinned = [value for _, value in thin(list(enumerate(values)), 60)]
    low, high = min(thinned), max(thinned)
    span = (high - low) or 1.0
    step = 100 / max(1, len(thinned) - 1)
    points = " ".join(
        f"{i * step:.1f},{18 - 16 * (v - low) / span:.1f}" for i, v in enumerate(thinned)
    )
    line = f'<polyline points="{points}"/>'
    return f'<svg class="spark" viewBox="0 0 100 20" aria-hidden="true">{line}</svg>'


def svg(figure: Figure, name: str, title: str) -> str:
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
    return text.replace('role="img">', f'role="img" aria-label="{escape(visible(title))}">', 1)
