"""Signs that a reward is being gamed rather than earned. They are diagnostics; none is a verdict."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from rlpt.alarms import PREFIX
from rlpt.report.curves import Curve, curves
from rlpt.report.drawing import canvas, finite, line_style, svg, whole_steps
from rlpt.report.rollouts import thought_tokens
from rlpt.report.run import Run
from rlpt.report.words import number

Row = dict[str, Any]


class Sign(NamedTuple):
    """One quantity, what its movement would mean, and its two ends in every run (None: not measured)."""

    title: str
    meaning: str
    ends: list[tuple[str, str] | None]


_OF_THOUGHTS = (
    ("named_answer_rate", "Thoughts that name the next token", "what a good thought does, too"),
    ("template_rate", "Thoughts that begin alike", "rising: one phrase pays everywhere"),
    ("distinct_rate", "Thoughts unlike every other", "falling: one phrase pays everywhere"),
    ("entropy", "Entropy of thoughts", "nats per token; falling alone is no fault"),
    ("empty_rate", "Empty thoughts", "rising: it learned not to think"),
    ("closer_rate", "Thoughts that end themselves", "falling: it pays to fill the budget"),
    ("opener_mass", "p(opener | context)", "above 0: the score without a thought is damaged"),
)  # fmt: skip
_OF_STEPS = (
    ("reward/mean", "Reward", "rising while the gain does not: the reward is being gamed"),
    ("gain/mean", "Gain while training", "nats per token; what the reward is to stand for"),
)
_RATES = ("leak", "named_answer", "template")


def signs(runs: Sequence[Run]) -> list[Sign]:
    """Everything of the kind that some run measured, first against last."""
    found = [
        Sign(title, says, [_of_steps(run, name) for run in runs]) for name, title, says in _OF_STEPS
    ]
    found += [
        Sign(title, says, [_of_thoughts(run, key) for run in runs])
        for key, title, says in _OF_THOUGHTS
    ]
    return [sign for sign in found if any(sign.ends)]


def rates(runs: Sequence[Run]) -> list[Curve]:
    """Curves for whatever rate of leaks, named answers and templates the trainer logged."""
    names = {name for run in runs for row in run.metrics for name in row}
    wanted = sorted(
        name
        for name in names
        # Means over the last steps are among the alarms.
        if any(rate in name for rate in _RATES) and not name.startswith(PREFIX)
    )
    return [Curve(name, "share", ((name, "share"),)) for name in wanted]


def charts(runs: Sequence[Run]) -> list[str]:
    """What has a course: logged rates, and of one run which lengths won."""
    lengths = length_chart(runs[0]) if len(runs) == 1 else None
    return curves(runs, rates(runs)) + ([lengths] if lengths else [])


def _of_steps(run: Run, name: str) -> tuple[str, str] | None:
    """Means of the first and last tenth of the steps that have it: one step is noise."""
    values = [value for _, value in finite(run.metrics, name)]
    tenth = max(1, len(values) // 10)
    if len(values) < 2:
        return None
    return number(sum(values[:tenth]) / tenth), number(sum(values[-tenth:]) / tenth)


def _of_thoughts(run: Run, key: str) -> tuple[str, str] | None:
    """Of held-out thoughts, at the first and the last evaluation."""
    of_thoughts = [row["summary"].get("thought") or {} for row in run.evaluations]
    values = [thought.get(key) for thought in of_thoughts]
    if not any(value is not None for value in values):
        return None
    return number(values[0]), number(values[-1])


def lengths_by_sign(groups: Sequence[Row]) -> list[tuple[int, float | None, float | None]]:
    """(step, tokens of thoughts that were rewarded above their group, and below it), from the dumps."""
    above: dict[int, list[int]] = {}
    below: dict[int, list[int]] = {}
    for group in groups:
        for rollout in group["rollouts"]:
            length, advantage = thought_tokens(rollout), rollout.get("advantage")
            if length is not None and advantage:
                side = above if advantage > 0 else below
                side.setdefault(group["step"], []).append(length)
    steps = sorted(above.keys() | below.keys())
    return [(step, _mean(above.get(step)), _mean(below.get(step))) for step in steps]


def _mean(values: Sequence[int] | None) -> float | None:
    return sum(values) / len(values) if values else None


def length_chart(run: Run) -> str | None:
    """Do longer thoughts win? None where no dump can say."""
    rows = lengths_by_sign(run.rollouts)
    if len(rows) < 2:
        return None
    with canvas() as (figure, axes):
        axes.set_title("Length by sign of the advantage", fontweight="bold")
        for index, label in ((1, "above the group"), (2, "below it")):
            points = [(row[0], row[index]) for row in rows if row[index] is not None]
            if points:
                axes.plot(
                    *zip(*points, strict=True), **line_style(index - 1), linewidth=1.3, label=label
                )
        axes.set_ylabel("tokens of a thought")
        whole_steps(axes)
        axes.legend()
        return svg(figure, f"signs-{run.name}", "Length by sign of the advantage")
