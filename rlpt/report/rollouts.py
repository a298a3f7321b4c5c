"""Rollouts as the page's own data: all groups of all runs, compressed, and inert until a reader asks.

Text from the web stays data all the way: JSON, gzip, base64; the page sets it as text, never as
markup.
"""

import base64
import gzip
import json
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from rlpt.report.run import Run
from rlpt_data.visible import visible

Row = dict[str, Any]

SMALLEST_SCALE = 0.25
"""Nats at which a token has its full colour, at the least: noise must not look like signal."""
_DIGITS = 4


class Embedded(NamedTuple):
    """What the page carries."""

    text: str
    """base64 of gzip of JSON; "" where no run has a rollout."""
    scale: float
    """Nats at full colour."""


def embedded(runs: Sequence[Run]) -> Embedded:
    """Everything the browser of rollouts shows.

    Gains of tokens are in nats, log p(token | thought) - log p(token), rounded to 4 decimals.
    """
    groups = [group(index, row) for index, run in enumerate(runs) for row in run.rollouts]
    scale = scale_of(groups)
    if not groups:
        return Embedded("", scale)
    table = {"runs": [visible(run.name) for run in runs], "scale": scale}
    text = json.dumps(table | {"groups": groups}, allow_nan=False, separators=(",", ":"))
    # A level above 6 halves nothing and doubles the time; no date: equal runs, equal pages.
    packed = base64.b64encode(gzip.compress(text.encode(), 6, mtime=0))
    return Embedded(packed.decode(), scale)


def group(run: int, row: Row) -> Row:
    """One prompt of run number ``run`` and its thoughts, best first, as the page reads them."""
    without = row.get("no_think_logp")
    thoughts = [_thought(rollout, without) for rollout in row["rollouts"]]
    return {
        "run": run,
        "step": row["step"],
        "document": visible(str(row["document"])),
        "domain": visible(str(row.get("domain") or "")),
        "cut": row.get("cut"),
        "context": visible(row["context"]),
        "tokens": [visible(token) for token in row["continuation_tokens"]],
        "without": None if without is None else [_short(logp) for logp in without],
        "thoughts": sorted(thoughts, key=rank, reverse=True),
    }


def rank(thought: Row) -> float:
    """What best and worst are by: the gain, else the reward."""
    values = (thought["gain"], thought["reward"])
    return next((value for value in values if value is not None), -math.inf)


def scale_of(groups: Sequence[Row]) -> float:
    """Nats at full colour: nine tenths of all tokens shown lie below it."""
    sizes = sorted(abs(gain) for gain in _token_gains(groups))
    tenth = sizes[int(0.9 * (len(sizes) - 1))] if sizes else 0.0
    return max(SMALLEST_SCALE, tenth)


def _token_gains(groups: Sequence[Row]) -> Iterator[float]:
    for each in groups:
        for thought in each["thoughts"]:
            yield from (gain for gain in thought["gains"] or () if gain is not None)


def _thought(rollout: Row, without: Sequence[float] | None) -> Row:
    return {
        "text": visible(rollout["thought"]),
        "prediction": visible(rollout.get("prediction") or ""),
        "gains": _gains(rollout.get("logp"), without),
        "gain": _short(rollout.get("gain")),
        "reward": _short(rollout.get("reward")),
        "advantage": _short(rollout.get("advantage")),
        "finish": str(rollout.get("finish", "")),
        "length": thought_tokens(rollout),
    }


def thought_tokens(rollout: Row) -> int | None:
    """Tokens of the thought; None where the dump cannot tell them from a prediction's."""
    if "thought_tokens" in rollout:
        return rollout["thought_tokens"]
    known = "ids" in rollout and not rollout.get("prediction")
    # What is left is the closer.
    return len(rollout["ids"]) - 1 if known else None


def _gains(
    own: Sequence[float] | None, without: Sequence[float] | None
) -> list[float | None] | None:
    """Per token; None where the reward scored no tokens."""
    if own is None or without is None:
        return None
    return [_short(a - b) for a, b in zip(own, without, strict=False)]


def _short(value: float | None) -> float | None:
    """Rounded for the eye; None where there is no finite number."""
    if value is None or not math.isfinite(value):
        return None
    # Rewards may be products of probabilities: digits count, not decimals.
    return round(value, _DIGITS) if abs(value) >= 1e-3 else float(f"{value:.2e}")
