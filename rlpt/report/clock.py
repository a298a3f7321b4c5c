"""Where the time of a step goes: sampling, scoring, training and what no clock took."""

from collections.abc import Sequence

from rlpt.report.drawing import SERIES, canvas, stages, svg, thin, whole_steps
from rlpt.report.readings import PARTS, time_parts
from rlpt.report.run import Run


def time_totals(run: Run) -> dict[str, float]:
    """Seconds by part over all timed steps; empty where none was."""
    timed = [parts for row in run.metrics if (parts := time_parts(row))]
    return {part: sum(each[part] for each in timed) for part in PARTS} if timed else {}


def step_time(run: Run, small: bool = False) -> str | None:
    """Seconds of every step, its parts on top of each other; ``small`` with the run's name, as one of several."""
    timed = [(row["step"], parts) for row in run.metrics if (parts := time_parts(row))]
    if not timed:
        return None
    layers = [thin([(step, each[part]) for step, each in timed]) for part in PARTS]
    at = [step for step, _ in layers[0]]
    heights = [[seconds for _, seconds in layer] for layer in layers]
    with canvas(3.7 if small else 7.6, 2.4) as (figure, axes):
        if small:
            axes.set_title(run.name, fontweight="bold")
        axes.stackplot(at, *heights, colors=SERIES[:4], labels=PARTS, linewidth=0, alpha=0.85)
        axes.set_ylabel("seconds a step")
        axes.set_xlim(at[0], max(at[-1], at[0] + 1))
        axes.set_ylim(0, _ceiling([sum(column) for column in zip(*heights, strict=True)]))
        stages(axes, run.metrics)
        whole_steps(axes)
        axes.legend(ncols=4, loc="upper right", columnspacing=1.0, handlelength=1.0)
        return svg(figure, f"time-{run.name}", "Seconds of a step by part")


def _ceiling(seconds: Sequence[float]) -> float:
    """One slow step, as a rule the first, must not press all others flat."""
    usual = sorted(seconds)[int(0.98 * (len(seconds) - 1))]
    return 1.3 * min(max(seconds), 1.5 * usual) or 1.0
