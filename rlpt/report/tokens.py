"""Rollouts side by side: each token of the held-out text with the log-probability a thought gave or
took.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rlpt.report.words import visible

Row = dict[str, Any]

CONTEXT_SHOWN = 360
"""Characters of the context before the cut, and at most CONTEXT_LINES of its lines."""
CONTEXT_LINES = 6
ROLLOUTS_SHOWN = 4
SMALLEST_SCALE = 0.25
"""Nats at which a token has its full colour, at the least: noise must not look like signal."""


@dataclass(frozen=True)
class Token:
    """One token of the held-out text. ``strength`` is 0 to 1 of the full colour; ``gain`` is in
    nats.
    """

    text: str
    gain: float
    strength: float
    note: str

    @property
    def helps(self) -> bool:
        return self.gain >= 0


@dataclass(frozen=True)
class Shown:
    """One thought beside the held-out text."""

    thought: str
    tokens: list[Token]
    gain: float | None
    reward: float | None
    advantage: float | None
    finish: str


@dataclass(frozen=True)
class Card:
    """One prompt: the end of its context, the text that really follows, and the thoughts from best
    to worst.
    """

    step: int
    document: str
    domain: str
    context: str
    truncated: bool
    continuation: str
    no_think: float | None
    """Mean log-probability of the held-out text without a thought, nats per token, if scored."""
    shown: list[Shown]
    left_out: int


def scale_of(groups: Sequence[Row]) -> float:
    """Nats at full colour: nine tenths of all tokens shown lie below it."""
    gains = [_gains(group, rollout) or [] for group in groups for rollout in group["rollouts"]]
    sizes = sorted(abs(gain) for of_rollout in gains for gain in of_rollout)
    tenth = sizes[int(0.9 * (len(sizes) - 1))] if sizes else 0.0
    return max(SMALLEST_SCALE, tenth)


def card(group: Row, scale: float) -> Card:
    """A dumped group, ready to draw: the best and the worst thoughts, the middle only counted."""
    ordered = sorted(group["rollouts"], key=lambda rollout: -_rank(group, rollout))
    half = ROLLOUTS_SHOWN // 2
    kept = ordered if len(ordered) <= ROLLOUTS_SHOWN else ordered[:half] + ordered[-half:]
    context = group["context"]
    tail = "\n".join(context[-CONTEXT_SHOWN:].split("\n")[-CONTEXT_LINES:])
    without = group.get("no_think_logp")
    return Card(
        step=group["step"],
        document=visible(str(group["document"])),
        domain=visible(str(group.get("domain") or "")),
        context=visible(tail),
        truncated=len(tail) < len(context),
        continuation=visible("".join(group["continuation_tokens"])),
        no_think=_mean(without) if without else None,
        shown=[_shown(group, rollout, scale) for rollout in kept],
        left_out=len(ordered) - len(kept),
    )


def _rank(group: Row, rollout: Row) -> float:
    gains = _gains(group, rollout)
    return _mean(gains) if gains else rollout.get("reward") or 0.0


def _shown(group: Row, rollout: Row, scale: float) -> Shown:
    return Shown(
        thought=visible(rollout["thought"]),
        tokens=_tokens(group, rollout, scale),
        gain=rollout.get("gain"),
        reward=rollout.get("reward"),
        advantage=rollout.get("advantage"),
        finish=str(rollout.get("finish", "")),
    )


def _tokens(group: Row, rollout: Row, scale: float) -> list[Token]:
    gains = _gains(group, rollout)
    if gains is None:
        return [
            Token(visible(text), 0.0, 0.0, "not scored") for text in group["continuation_tokens"]
        ]
    scored = zip(group["continuation_tokens"], gains, group["no_think_logp"], strict=True)
    return [_token(text, gain, without, scale) for text, gain, without in scored]


def _token(text: str, gain: float, without: float, scale: float) -> Token:
    # The square root: the eye should find a quarter of the full gain, not only the peaks.
    strength = math.sqrt(min(1.0, abs(gain) / scale))
    before, after = math.exp(without), math.exp(without + gain)
    note = f"p {before:.3f} \N{RIGHTWARDS ARROW} {after:.3f} ({gain:+.3f} nats)"
    return Token(visible(text), gain, round(strength, 2), note)


def _gains(group: Row, rollout: Row) -> list[float] | None:
    """Per-token gains; None where the reward scored no tokens."""
    own, without = rollout.get("logp"), group.get("no_think_logp")
    if own is None or without is None:
        return None
    return [a - b for a, b in zip(own, without, strict=True)]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
