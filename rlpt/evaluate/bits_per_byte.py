"""Held-out compression without thought: the anchor that no reward can game.

bits per byte = -sum(log p) / ln 2 / bytes, a ratio of sums over windows; the first token of a
window has no context and is left out of both sums.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rlpt import dist
from rlpt.evaluate.continuation import Scorer
from rlpt.statistics import Interval, ratio_intervals
from rlpt.types import Trunk


@dataclass(frozen=True)
class WindowRecord:
    """The beginning of one document, read without a thought."""

    document: str
    domain: str
    start: int
    """Token offset of the window in its document."""
    nats: float
    """-log p of the tokens after the first."""
    num_tokens: int
    num_bytes: int

    @property
    def key(self) -> tuple[str, int, int]:
        return (self.document, self.start, self.num_tokens)


def measure_windows(
    scorer: Scorer, trunks: Sequence[Trunk], world: dist.World, batch: int = 32
) -> list[WindowRecord]:
    """One record per window (the same global list on every rank), on every rank."""
    mine = dist.share(trunks, world)
    share = -(-len(trunks) // world.size)
    records: list[WindowRecord] = []
    for start in range(0, share, batch):
        chosen = mine[start : start + batch]
        scores = scorer.trunks([(trunk, 1, len(trunk.ids)) for trunk in chosen])
        records += [_record(trunk, s.total) for trunk, s in zip(chosen, scores, strict=True)]
    return dist.unshare(records, world)


def _record(trunk: Trunk, total: float) -> WindowRecord:
    size = len(trunk.ids)
    return WindowRecord(
        trunk.document, trunk.domain, trunk.start, -total, size - 1, trunk.num_bytes(1, size)
    )


def bits_per_byte(windows: Sequence[WindowRecord], unit: str, *, draws: int, seed: int) -> Interval:
    """Bits per byte with its interval; ``unit`` is the resampled attribute, document or domain."""
    bits_N = np.array([window.nats for window in windows]) / math.log(2)
    bytes_N = np.array([window.num_bytes for window in windows], dtype=np.float64)
    unit_N = np.array([getattr(window, unit) for window in windows])
    return ratio_intervals({"bits": (bits_N, bytes_N)}, unit_N, draws=draws, seed=seed)["bits"]
