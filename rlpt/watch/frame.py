"""What is known of a run -> one picture of the terminal. Text of the web is text: it moves no cursor and makes no
markup.
"""

import math
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from rlpt.alarms import MEMORY
from rlpt.alarms import verdict as judged
from rlpt.guards import verdict
from rlpt.report.readings import PARTS, dtype_of, guards_of, limits_of, time_parts
from rlpt.report.words import duration, interval, signed
from rlpt.watch.following import Known
from rlpt_data.visible import visible

Row = dict[str, Any]
BLOCKS = "▁▂▃▄▅▆▇█"
SHOWN = (
    "loss/next_token",
    "loss/policy",
    "reward/mean",
    "reward/group_std",
    "gain/mean",
    "thought/length",
    "thought/closer_rate",
    "thought/nll",
    "loss/grad_norm",
    "mismatch/ess",
)
"""Metrics with a line of their own, where the run has them."""
TONES = {"useful": "green", "harmless": "green", "harmful": "red"}
COLOURS = ("blue", "yellow", "cyan", "magenta")
_SILENT = 120.0
"""Seconds without a line, beside ten steps, after which a run is called silent."""


def frame(known: Known) -> RenderableType:
    """The whole picture."""
    panels = [_head(known), *_rows(known)]
    if known.damaged:
        panels.append(Text(f"{known.damaged} damaged lines are left out", style="yellow"))
    return Group(*panels)


def _rows(known: Known) -> list[RenderableType]:
    if known.state == "not started":
        return [Text("  no step and no evaluation yet; this view follows the folder", style="dim")]
    grid = Table.grid(expand=True)
    grid.add_column(ratio=1)
    grid.add_column(ratio=1)
    grid.add_row(
        _panel("metrics", _metrics(known)),
        Group(_panel("evaluation", _evaluation(known)), _time(known)),
    )
    return [
        grid,
        _panel("engine against trainer", _mismatch(known)),
        _panel("alarms", _guards(known)),
        *_rollout(known),
    ]


def _panel(title: str, body: RenderableType) -> Panel:
    return Panel(body, title=title, title_align="left", box=box.ROUNDED, border_style="dim")


def _head(known: Known) -> RenderableType:
    state, steps = known.state, known.stage.get("steps")
    line = Text.assemble((visible(known.name), "bold"), "  ", (state, "bold"))
    if known.last:
        of = f"/{steps}" if steps else ""
        line.append(f"  stage {visible(str(known.last.get('stage')))} {known.stage_step}{of}")
        line.append(f"  step {known.last['step']}")
    if state == "running" and known.seconds_left is not None:
        line.append(f"  about {duration(known.seconds_left)} left in this stage")
    if state == "running" and (silence := _silence(known)):
        line.append(f"  {silence}", style="yellow")
    if not steps:
        return line
    done = steps if state == "finished" else known.stage_step
    # In a cell: by itself a bar does not end its line.
    bar = Table.grid(expand=True)
    bar.add_row(ProgressBar(total=steps, completed=done))
    return Group(line, bar)


def _silence(known: Known) -> str:
    """Said where nothing was written for longer than a run takes as a rule."""
    pace = known.last.get("time/step") or 0.0
    silent = known.silent_seconds or 0.0
    return f"no new line for {duration(silent)}" if silent > max(_SILENT, 10 * pace) else ""


def sparkline(values: Sequence[float], width: int = 24) -> str:
    """The last values as blocks from the least to the largest; a gap where a value is none."""
    tail = list(values)[-width:]
    known = [value for value in tail if math.isfinite(value)]
    low, span = min(known, default=0.0), max(known, default=0.0) - min(known, default=0.0)
    top = len(BLOCKS) - 1
    return "".join(
        BLOCKS[round(top * (value - low) / span) if span else 0] if math.isfinite(value) else " "
        for value in tail
    )


def _metrics(known: Known) -> RenderableType:
    table = Table.grid(padding=(0, 2), expand=True)
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(no_wrap=True, overflow="crop")
    for name in SHOWN:
        values = [
            float(row[name]) for row in known.metrics if isinstance(row.get(name), (int, float))
        ]
        if values:
            style = "" if math.isfinite(values[-1]) else "bold red"
            line = Text(sparkline(values), style="blue")
            table.add_row(Text(name), Text(f"{values[-1]:.4g}", style=style), line)
    return table


def _evaluation(known: Known) -> RenderableType:
    if not known.evaluations:
        return Text("none yet", style="dim")
    last = known.evaluations[-1]
    summary, label = last["summary"], str(last["summary"].get("verdict", "no verdict"))
    gain = interval(summary.get("gain_heldout"))
    lines = [
        Text.assemble(
            (visible(label), f"bold {TONES.get(label, 'yellow')}"), f"  at step {last['step']}"
        ),
        Text(f"held-out gain {gain} nats per token"),
    ]
    for name, found in (summary.get("controls") or {}).items():
        text = interval(found.get("own_minus_control"))
        lines.append(Text(f"own - {visible(str(name))} {text}", style="dim"))
    return Group(*lines)


def _time(known: Known) -> RenderableType:
    timed = [parts for row in known.recent() if (parts := time_parts(row))]
    if not timed:
        return _panel("time of a step", Text("not measured", style="dim"))
    means = {part: sum(each[part] for each in timed) / len(timed) for part in PARTS}
    whole = sum(means.values()) or 1.0
    bar, legend = Text(), Text()
    for (part, seconds), colour in zip(means.items(), COLOURS, strict=True):
        bar.append("█" * round(40 * seconds / whole), style=colour)
        legend.append(f"■ {part} {seconds:.2f}  ", style=colour)
    return _panel(f"seconds a step: {whole:.2f}, mean of the last {len(timed)}", Group(bar, legend))


def alarms(known: Known) -> list[str]:
    """What the trainer says of the last step: a line for every limit that it exceeds."""
    return _of_engine(known) + _of_course(known)


def _of_course(known: Known) -> list[str]:
    cfg = guards_of(known.config)
    if cfg is None or not known.metrics:
        return []
    warnings, halts = judged(known.metrics[-MEMORY:], cfg)
    return list((warnings | halts).values())


def _guards(known: Known) -> RenderableType:
    """Steps that were skipped or gave a warning, and what the last one says."""
    counted = [row for row in known.metrics if "watch/warnings" in row]
    if not counted:
        return Text("no step was judged", style="dim")
    skipped = sum(bool(row.get("update/skipped")) for row in counted)
    warned = sum(row["watch/warnings"] > 0 for row in counted)
    tone, sign = ("yellow", "▲") if warned or skipped else ("green", "✓")
    line = f"{sign} {warned} of {len(counted)} steps with a warning, {skipped} skipped"
    lines = [Text(line, style=tone)]
    return Group(*lines, *(Text(each, style="bold red") for each in _of_course(known)))


def _of_engine(known: Known) -> list[str]:
    numbers = {k: v for k, v in known.last.items() if isinstance(v, (int, float))}
    if (limits := limits_of(known.config)) is None:
        return []
    try:
        warnings, halts = verdict(numbers, limits, dtype_of(known.config))
    except KeyError:
        # A line that lacks what the limit of a mean is computed from cannot be judged.
        return []
    return list((warnings | halts).values())


def _mismatch(known: Known) -> RenderableType:
    counted = [row["mismatch/warnings"] for row in known.metrics if "mismatch/warnings" in row]
    if not counted:
        return Text("no step was judged", style="dim")
    warned = sum(value > 0 for value in counted)
    tone = "yellow" if warned else "green"
    sign = "▲" if warned else "✓"
    lines = [Text(f"{sign} {warned} of {len(counted)} steps with a warning", style=tone)]
    lines += [Text(line, style="bold red") for line in _of_engine(known)]
    return Group(*lines)


def _rollout(known: Known) -> list[RenderableType]:
    group = known.group
    if not group or not group["rollouts"]:
        return []
    value = "gain" if group["rollouts"][0].get("gain") is not None else "reward"
    ordered = sorted(group["rollouts"], key=lambda each: each.get(value) or 0.0, reverse=True)
    lines = [
        Text.assemble(
            (_tail(group["context"], 160), "dim"),
            (_flat("".join(group["continuation_tokens"])), "bold"),
        )
    ]
    for title, each in (("best ", ordered[0]), ("worst", ordered[-1])):
        text = _flat(each["thought"])[:240] or "(empty)"
        lines.append(Text(f"{title} {value} {signed(each.get(value))}  {text}"))
    where = f"{group.get('domain') or 'no domain'}, step {group['step']}"
    return [_panel(f"last rollout: {visible(where)}", Group(*lines))]


def _flat(text: str) -> str:
    return visible(text).replace("\n", "↵").replace("\t", " ")


def _tail(text: str, length: int) -> str:
    return "…" + _flat(text)[-length:] if len(text) > length else _flat(text)
