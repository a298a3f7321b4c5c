"""What is to be said of a run's own course: numbers over its last steps, limits, what exceeds them, and the remedy.

Lines of metrics.jsonl in, `watch/*` and words out. Nothing else is remembered: a resumed run, the report and the
terminal view judge from the same lines by this one table; it imports no torch.
"""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, median
from typing import Any, NamedTuple

from rlpt.limits import GuardsConfig
from rlpt.statistics import USEFUL_AGAINST

Row = Mapping[str, Any]
"""A line of metrics.jsonl."""

MEMORY = 100
"""Steps that any of this looks back."""
WINDOW = 50
"""Steps that a share is a mean of."""
LEAST_NORMS = 20
"""Fewer gradient norms have no median worth the name."""
PREFIX = "watch/"


class Alarm(NamedTuple):
    """A number over the last steps and its two limits; ``sign`` -1 where it must not fall below them."""

    metric: str
    warn: str | None
    halt: str | None
    remedy: str
    hold: int = 1
    """Steps in a row that must be beyond the limit to end the run."""
    sign: int = 1

    @property
    def name(self) -> str:
        """Of the number in metrics.jsonl."""
        return f"{PREFIX}{self.metric}"

    def beyond(self, row: Row, limit: float) -> bool:
        """Whether a line has the number, and beyond the limit."""
        value = row.get(self.name)
        return value is not None and not self.sign * value <= self.sign * limit


_NUMBERS = (
    "the lines above name what was not finite; start another run from the last checkpoint (init_from) with a lower "
    "optimizer.lr or clip_norm, or raise the limit and repeat the command"
)
ALARMS = (
    Alarm("skipped_in_a_row", None, "nonfinite_in_a_row", _NUMBERS),
    Alarm("skipped_share", None, "nonfinite_share", _NUMBERS),
    Alarm(
        *("grad_norm", "grad_norm_warn", "grad_norm_halt"),
        "gradients are no longer what they were: lower optimizer.lr, lengthen its warm-up, or see whether a reward "
        "jumped in the newest rollouts",
        hold=5,
    ),
    Alarm(
        *("truncated", "truncation_warn", "truncation_halt"),
        "the budget ends thoughts, and runs rarely recover from that: start another with a higher "
        "thought.budget_tokens or a gate against thoughts without a closer; or set guards.truncation_halt = 1.0 and "
        "repeat the command",
        # A stage that begins with a policy that has yet to learn its closer gets the time.
        hold=2 * WINDOW,
    ),
    Alarm(
        *("leak_rate", "leak_warn", None),
        "thoughts say the held-out text: a page that repeats itself, a policy that knows it by heart, or a leak (`rlpt "
        "eval` tests for one with leak_prompts)",
    ),
    Alarm(
        *("length_gap", "length_gap_warn", None),
        "thoughts of one length win and the gain does not rise: look at the rollouts, weigh the length in a gate",
    ),
    Alarm(
        *("control_margin", "control_margin_warn", None),
        "a thought without meaning may gain as much as the policy's own: what was learned is the format, not thinking",
        sign=-1,
    ),
)
"""In the order in which page and terminal show them."""


def watched(before: Sequence[Row], row: Row) -> dict[str, float]:
    """`watch/*` of a step after the lines ``before`` it, of whatever stage; of its own, the last `MEMORY` count.

    skipped_in_a_row and skipped_share (of 100 steps, however few there were) count steps that were not finite;
    grad_norm is the norm over the median of those before; truncated and leak_rate are means over the last 50 steps;
    length_gap is |a - b| / max(m, 1), a and b the mean lengths in tokens of thoughts above and below their group and m
    of all, and 0 while the gain rises: while it is higher in the newer half of the 50 steps than in the older.
    What has too few steps behind it is left out.
    """
    own = [each for each in before if each.get("stage") == row.get("stage")][-MEMORY:]
    rows = [*own, row]
    skipped = [bool(each.get("update/skipped")) for each in rows]
    found: dict[str, float | None] = {
        "skipped_in_a_row": float([*skipped[::-1], False].index(False)),
        "skipped_share": sum(skipped[-MEMORY:]) / MEMORY,
        "grad_norm": _over_median(_finite(own, "loss/grad_norm"), row),
        "truncated": _mean([1.0 - rate for rate in _finite(rows, "thought/closer_rate")]),
        "leak_rate": _mean(_finite(rows, "thought/leak_rate")),
        "length_gap": _length_gap(rows[-WINDOW:]),
    }
    return {f"{PREFIX}{name}": value for name, value in found.items() if value is not None}


def of_evaluation(summary: Mapping[str, Any]) -> dict[str, float]:
    """`watch/*` of a held-out evaluation, over the controls that a verdict of useful rests on, in nats per token.

    control_gain is the gain of the control that gains most; control_margin, known where the policy gains (the lower end
    of its interval is above 0), the least of the lower ends of own thought minus control.
    """
    known = summary.get("controls") or {}
    controls = [known[name] for name in USEFUL_AGAINST if name in known]
    if not controls:
        return {}
    found = {f"{PREFIX}control_gain": max(each["gain"]["mean"] for each in controls)}
    low = (summary.get("gain_heldout") or {}).get("ci_low")
    margins = [each["own_minus_control"]["ci_low"] for each in controls]
    if low is not None and low > 0 and None not in margins:
        found[f"{PREFIX}control_margin"] = min(margins)
    return found


def verdict(rows: Sequence[Row], cfg: GuardsConfig) -> tuple[dict[str, str], dict[str, str]]:
    """What the newest of the lines warns of, and what must end the run: metric -> one line."""
    row = rows[-1]
    own = [each for each in rows if each.get("stage") == row.get("stage")]
    warnings, halts = {}, {}
    for alarm in ALARMS:
        if alarm.warn is not None and alarm.beyond(row, getattr(cfg, alarm.warn)):
            warnings[alarm.name] = _line(alarm, row, alarm.warn, cfg)
        if alarm.halt is not None and len(own) >= alarm.hold:
            limit = getattr(cfg, alarm.halt)
            if all(alarm.beyond(each, limit) for each in own[-alarm.hold :]):
                halts[alarm.name] = _line(alarm, row, alarm.halt, cfg)
    return warnings, halts


def _line(alarm: Alarm, row: Row, key: str, cfg: GuardsConfig) -> str:
    word = "exceeds" if alarm.sign > 0 else "is below"
    value, limit = row[alarm.name], getattr(cfg, key)
    return f"{alarm.name} = {value:.4g} {word} guards.{key} = {limit:.4g}; {alarm.remedy}"


def _finite(rows: Sequence[Row], name: str) -> list[float]:
    return [row[name] for row in rows if name in row and math.isfinite(row[name])]


def _mean(values: Sequence[float]) -> float | None:
    """Of the last `WINDOW`; None where they are fewer."""
    return fmean(values[-WINDOW:]) if len(values) >= WINDOW else None


def _over_median(norms: Sequence[float], row: Row) -> float | None:
    """A norm of 0 is no gradient: a batch that teaches nothing, or a step that float16 skipped."""
    known = [norm for norm in norms if norm > 0]
    norm = row.get("loss/grad_norm")
    if len(known) < LEAST_NORMS or not norm or not math.isfinite(norm):
        return None
    return norm / median(known)


def _length_gap(rows: Sequence[Row]) -> float | None:
    names = ("thought/length_positive", "thought/length_negative", "thought/length", "gain/mean")
    above, below, lengths, gains = (_finite(rows, name) for name in names)
    if len(rows) < WINDOW or not (above and below and len(gains) >= 2):
        return None
    half = len(gains) // 2
    if fmean(gains[half:]) > fmean(gains[:half]):
        return 0.0
    return abs(fmean(above) - fmean(below)) / max(fmean(lengths), 1.0)
