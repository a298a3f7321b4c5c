"""Two evaluations of the same prompts -> how far they differ, record by record. Pure.

Pairs are by (epoch, document, cut, sample), so that what prompts have in common drops out of the interval.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from rlpt.evaluate.bits_per_byte import WindowRecord
from rlpt.evaluate.quantities import Resampling, Sums, sums_of
from rlpt.evaluate.records import Record
from rlpt.statistics import Interval, pair, ratio_intervals, seed_interval

NAMES = (
    *("gain", "first_gain", "marginal", "logp_no_think", "logp_own", "first_own"),
    *("accuracy_no_think", "accuracy_thought", "accuracy_majority", "accuracy_greedy"),
    *("gain_greedy", "prediction", "prediction_greedy"),
)
"""Quantities that are compared, of those that both evaluations have (`rlpt.evaluate.quantities`)."""


def change(
    before: Sequence[Record], after: Sequence[Record], resampling: Resampling
) -> dict[str, Interval]:
    """Paired change between two evaluations of the same prompts. Raises ValueError when the keys differ."""
    return resampling.intervals(after, _differences(before, after))


def _differences(before: Sequence[Record], after: Sequence[Record]) -> Sums:
    """In the order of ``after``."""
    order = pair([record.key for record in before], [record.key for record in after])
    earlier, later = sums_of([before[i] for i in order]), sums_of(after)
    common = [name for name in NAMES if name in earlier and name in later]
    return {name: (later[name][0] - earlier[name][0], later[name][1]) for name in common}


def change_over_seeds(
    before: Sequence[Sequence[Record]], after: Sequence[Sequence[Record]], resampling: Resampling
) -> dict[str, Any]:
    """As `change` for two models at several seeds each, of training or of evaluation: the i-th of one with the i-th of
    the other.

    Of every quantity the pooled ratio of sums, whose interval resamples the unit with all its records of all seeds and
    takes the seeds as given; and of several, under ``over_seeds``, the mean over seeds with Student's interval over
    them, None below three. Raises ValueError where the seeds are not as many, or the keys of a pair differ.
    """
    if len(before) != len(after):
        raise ValueError(
            f"paired change: {len(before)} seeds before, {len(after)} after; give each as many"
        )
    parts = [_differences(*both) for both in zip(before, after, strict=True)]
    names = [name for name in parts[0] if all(name in part for part in parts)]
    pooled: Sums = {name: (_joined(parts, name, 0), _joined(parts, name, 1)) for name in names}
    measured = resampling.intervals([record for one in after for record in one], pooled)
    table: dict[str, Any] = {name: measured[name].as_dict() for name in names}
    if len(parts) > 1:
        ratios = {name: [_ratio(*part[name]) for part in parts] for name in names}
        table["over_seeds"] = {name: seed_interval(values) for name, values in ratios.items()}
    return table


def _joined(parts: Sequence[Sums], name: str, side: int) -> Float[np.ndarray, " M"]:
    return np.concatenate([part[name][side] for part in parts])


def _ratio(value_N: Float[np.ndarray, " N"], count_N: Float[np.ndarray, " N"]) -> float:
    return float(value_N.sum() / count_N.sum())


def bits_change(
    before: Sequence[WindowRecord], after: Sequence[WindowRecord], resampling: Resampling
) -> Interval:
    """Paired change of bits per byte; negative is better. Raises ValueError when the windows
    differ.
    """
    order = pair([w.key for w in before], [w.key for w in after])
    nats_N = np.array([w.nats - before[i].nats for i, w in zip(order, after, strict=True)])
    bytes_N = np.array([w.num_bytes for w in after], dtype=np.float64)
    unit_N = np.array([getattr(w, resampling.unit) for w in after])
    sums = {"change": (nats_N / math.log(2), bytes_N)}
    return ratio_intervals(sums, unit_N, draws=resampling.draws, seed=resampling.seed)["change"]
