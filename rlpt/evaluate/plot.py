"""The figure of a ladder: gain against log compute, along both of its axes. The one door to matplotlib here.

Left: training FLOPs of the checkpoints, a line for every thinking budget. Right: FLOPs of one thought, its context
read, a line for every policy. Bars are the 95% intervals of the table.
"""

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rlpt_data.strict import UserError

Rows = Sequence[Mapping[str, Any]]


class Line(NamedTuple):
    """Points of one line of a panel, in the order of their compute."""

    label: str
    flops: list[float]
    rows: list[Mapping[str, Any]]


def check_installed(figure: str) -> None:
    """Raises UserError where the figure cannot be drawn: before the evaluation, not after."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError(
            f'figure = {figure!r}: matplotlib is not installed; run `pip install -c constraints.txt -e ".[report]"`, '
            "or set figure = 'none'"
        )


def lines(rows: Rows, of: Callable[[Any], str], flops: Callable[[Any], float | None]) -> list[Line]:
    """Rows that share a label, where there are two; one without known compute, or none spent, fits no log axis."""
    found: dict[str, list[tuple[float, Mapping[str, Any]]]] = {}
    for row in rows:
        spent = flops(row)
        if spent:
            found.setdefault(of(row), []).append((spent, row))
    ordered = {label: sorted(points, key=lambda p: p[0]) for label, points in found.items()}
    return [
        Line(label, [x for x, _ in points], [row for _, row in points])
        for label, points in ordered.items()
        if len(points) > 1
    ]


def training_lines(table: Mapping[str, Any]) -> list[Line]:
    """Checkpoints at a fixed thinking budget."""
    return lines(table["rungs"], _budget, lambda row: row["training"].get("flops"))


def thinking_lines(table: Mapping[str, Any]) -> list[Line]:
    """Thinking budgets at a fixed checkpoint; a budget of 0 costs what reading the context does."""
    swept = [row for row in table["rungs"] if row["budget_tokens"] is not None]
    return lines(swept, _policy, lambda row: row["thinking"]["flops_per_thought"])


def _policy(row: Mapping[str, Any]) -> str:
    return row["name"].removesuffix(f"-budget_{row['budget_tokens']}")


def _budget(row: Mapping[str, Any]) -> str:
    budget = row["budget_tokens"]
    return "budget of the run" if budget is None else f"{budget} tokens to think"


def draw(table: Mapping[str, Any], path: Path) -> Path | None:
    """Write the figure; None where neither axis has two points."""
    panels = [
        ("training FLOPs, decoding included", training_lines(table)),
        ("FLOPs of one thought, its context read", thinking_lines(table)),
    ]
    panels = [(title, found) for title, found in panels if found]
    if not panels:
        return None
    import matplotlib as mpl
    from matplotlib.figure import Figure

    # The same numbers give the same bytes.
    with mpl.rc_context({"svg.hashsalt": "rlpt", "font.size": 9, "text.parse_math": False}):
        figure = Figure(figsize=(5.2 * len(panels), 3.8), layout="constrained")
        axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axis, (title, found) in zip(axes, panels, strict=True):
            _panel(axis, title, found)
        axes[0].set_ylabel("held-out gain, nats per token")
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    return path


def _panel(axis: Any, title: str, found: Sequence[Line]) -> None:
    import matplotlib as mpl
    from matplotlib.ticker import EngFormatter, MaxNLocator, NullFormatter

    colours = mpl.colormaps["viridis"]
    for place, line in enumerate(found):
        gains = [row["gain_heldout"] for row in line.rows]
        axis.errorbar(
            *(line.flops, [gain["mean"] for gain in gains]),
            yerr=[[_reach(gain, end) for gain in gains] for end in ("ci_low", "ci_high")],
            **{"marker": "o", "markersize": 4, "linewidth": 1.3, "capsize": 2},
            color=colours(0.85 * place / max(1, len(found) - 1)),
            label=line.label,
        )
    axis.axhline(0.0, color="grey", linewidth=0.8, linestyle=":")
    axis.set_xscale("log")
    axis.xaxis.set_minor_formatter(NullFormatter())
    flops = [x for line in found for x in line.flops]
    if max(flops) < 20 * min(flops):
        # Powers of ten would be one tick or none.
        axis.xaxis.set_major_locator(MaxNLocator(5))
    axis.xaxis.set_major_formatter(EngFormatter())
    axis.set_xlabel(title)
    axis.legend(fontsize=7, frameon=False)


def _reach(gain: Mapping[str, Any], end: str) -> float:
    """From the mean to one end of its interval; 0 where there is none."""
    return 0.0 if gain[end] is None else abs(gain[end] - gain["mean"])
