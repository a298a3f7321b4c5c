"""The alarms of a run: what was watched, between which limits, where it fired, and its course."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from rlpt.alarms import ALARMS, MEMORY, Alarm, of_evaluation, verdict
from rlpt.limits import GuardsConfig
from rlpt.report.drawing import BAD, INK, canvas, finite, line_style, powers, svg, whole_steps
from rlpt.report.readings import guards_of
from rlpt.report.run import Run

Row = dict[str, Any]
TITLES = {
    "skipped_in_a_row": ("Skipped steps in a row", "steps that were not finite"),
    "skipped_share": ("Skipped steps", "share of the last 100"),
    "grad_norm": ("Gradient norm", "over its running median"),
    "truncated": ("Thoughts that the budget ended", "share of 50 steps"),
    "leak_rate": ("Thoughts that say the held-out text", "share of 50 steps"),
    "length_gap": ("Length gap while the gain does not rise", "share of the mean length"),
    "control_margin": ("Own thought over the best control", "nats per token, lower end"),
}
_POINTS = 240
_NAMED = 6
"""Skipped steps that are named; the others are counted."""


class Watch(NamedTuple):
    """One alarm: its limits in words, and a sentence a run (None: not measured)."""

    title: str
    unit: str
    limits: str
    found: list[tuple[bool, str] | None]
    """Whether it fired, and where."""


def watches(runs: Sequence[Run]) -> list[Watch]:
    """Every alarm that some run measured."""
    made = []
    for alarm in ALARMS:
        title, unit = TITLES[alarm.metric]
        found = [_found(run, alarm) for run in runs]
        if any(found):
            made.append(Watch(title, unit, _limits(runs, alarm), found))
    return made


def skipped(run: Run) -> str | None:
    """Which steps nothing was trained on, in words; None where there are none."""
    steps = [step for step, value in finite(run.metrics, "update/skipped") if value]
    if not steps:
        return None
    named = ", ".join(map(str, steps[:_NAMED]))
    more = f" and {len(steps) - _NAMED} more" if len(steps) > _NAMED else ""
    return f"nothing was trained on at step {named}{more}: a reward, a loss or the gradient was not finite"


def charts(runs: Sequence[Run]) -> list[str]:
    """A small chart for every alarm that has a course; of counts of skipped steps only where there were some."""
    return [
        svg(_chart(runs, alarm), f"guarded-{alarm.metric}", TITLES[alarm.metric][0])
        for alarm in ALARMS
        if any(_has_course(_points(run, alarm), alarm) for run in runs)
    ]


def _has_course(points: Sequence[tuple[int, float]], alarm: Alarm) -> bool:
    return any(value for _, value in points) or (bool(points) and alarm.warn is not None)


def _rows(run: Run, alarm: Alarm) -> list[Row]:
    """The lines that have the alarm's number. An evaluation's stands in all lines until the next one."""
    if alarm.metric != "control_margin":
        return run.metrics
    return [{"step": row["step"], **of_evaluation(row["summary"])} for row in run.evaluations]


def _points(run: Run, alarm: Alarm) -> list[tuple[int, float]]:
    return finite(_rows(run, alarm), alarm.name)


def _found(run: Run, alarm: Alarm) -> tuple[bool, str] | None:
    rows = [row for row in _rows(run, alarm) if alarm.name in row]
    cfg = guards_of(run.config)
    if not rows or cfg is None:
        return None
    limit = getattr(cfg, alarm.warn or alarm.halt or "")
    steps = [row["step"] for row in rows if alarm.beyond(row, limit)]
    of = f"{len(rows)} {'evaluations' if alarm.metric == 'control_margin' else 'steps'}"
    if not steps:
        return False, f"none of {of}"
    _, halts = verdict(run.metrics[-MEMORY:], cfg) if run.metrics else ({}, {})
    ended = "; it ended the run" if alarm.name in halts else ""
    return True, f"{len(steps)} of {of}, first at {steps[0]}{ended}"


def _limits(runs: Sequence[Run], alarm: Alarm) -> str:
    """Of the first run; what differs stands among the settings."""
    cfg = next((found for run in runs if (found := guards_of(run.config)) is not None), None)
    if cfg is None:
        return ""
    word = "above" if alarm.sign > 0 else "below"
    return ", ".join(f"{level} {word} {limit:g}" for level, limit in _drawn_limits(cfg, alarm))


def _drawn_limits(cfg: GuardsConfig, alarm: Alarm) -> list[tuple[str, float]]:
    """Those that exist: an infinite limit is none."""
    named = (("warns", alarm.warn), ("ends the run", alarm.halt))
    found = [(level, float(getattr(cfg, key))) for level, key in named if key is not None]
    return [(level, limit) for level, limit in found if math.isfinite(limit)]


def _peaks(points: Sequence[tuple[int, float]], alarm: Alarm) -> list[tuple[int, float]]:
    """Of neighbours, where there are too many to draw, the worst: a mean would hide what fired."""
    width = max(1, math.ceil(len(points) / _POINTS))
    chunks = (points[i : i + width] for i in range(0, len(points), width))
    return [max(chunk, key=lambda point: alarm.sign * point[1]) for chunk in chunks]


def _chart(runs: Sequence[Run], alarm: Alarm) -> Figure:
    title, unit = TITLES[alarm.metric]
    with canvas() as (figure, axes):
        axes.set_title(title, fontweight="bold")
        for index, run in enumerate(runs):
            if points := _points(run, alarm):
                mark: Any = {"marker": "o", "markersize": 4} if len(points) < 20 else {}
                axes.plot(*zip(*_peaks(points, alarm), strict=True), **line_style(index), **mark)
        cfg = guards_of(runs[0].config)
        for level, limit in [] if cfg is None else _drawn_limits(cfg, alarm):
            style: Any = "-" if level == "ends the run" else (0, (1.2, 1.6))
            colour = BAD if level == "ends the run" else INK
            axes.axhline(limit, color=colour, linestyle=style, linewidth=1)
        axes.set_ylabel(unit)
        if alarm.metric == "grad_norm":
            powers(axes)
        whole_steps(axes)
        return figure
