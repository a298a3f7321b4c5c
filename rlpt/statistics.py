"""Intervals and verdicts: sums per record in, means with 95% bootstrap intervals out. Pure numpy.

Every average is a ratio of sums, and what is resampled is the unit of the split (a document or a
domain), never a token: tokens of one document are not independent. Differences are taken record by
record before anything is resampled, so everything is paired. Percentile intervals (Efron and Tibshirani 1993, "An
Introduction to the Bootstrap", ch. 13), expanded for few clusters (Hesterberg 2014, arXiv 1411.5279).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float, Int, Shaped

MIN_CLUSTERS = 30
"""Below this many clusters a percentile interval is too narrow to be believed, so none is given."""
HARMLESS_BAND = 0.005
"""Nats per continuation token within which a gain counts as nothing."""
USEFUL_AGAINST = ("empty", "filler", "other_document")
"""Controls that a thought must beat, besides no thought at all, to be called useful."""
_NORMAL = 1.959963984540054
"""97.5% of a normal distribution lies below."""
_CHUNK = 1 << 22

Verdict = Literal["useful", "harmless", "harmful", "inconclusive"]


@dataclass(frozen=True)
class Interval:
    """A ratio of sums and its 95% interval; None where clusters are too few for bounds."""

    mean: float
    ci_low: float | None
    ci_high: float | None
    clusters: int

    @property
    def reason(self) -> str | None:
        """Why there is no interval; None where there is one."""
        if self.ci_low is not None:
            return None
        return f"{self.clusters} clusters, fewer than the {MIN_CLUSTERS} an interval needs"

    def as_dict(self) -> dict[str, float | int | str | None]:
        """Plain values for JSON; ``reason`` only where there is no interval."""
        table = {
            "mean": self.mean,
            "ci_low": self.ci_low,
            "ci_high": self.ci_high,
            "clusters": self.clusters,
        }
        return table if self.reason is None else {**table, "reason": self.reason}


def ratio_intervals(
    sums: Mapping[str, tuple[Float[np.ndarray, " N"], Float[np.ndarray, " N"]]],
    cluster_N: Shaped[np.ndarray, " N"],
    *,
    draws: int,
    seed: int,
) -> dict[str, Interval]:
    """For every name: sum(numerator) / sum(denominator) and its interval, all from the same
    resampled clusters.

    Denominators must be positive. Deterministic in ``seed``; the memory limit does not change a
    number.
    """
    names, index_N = np.unique(cluster_N, return_inverse=True)
    columns = [np.asarray(column, np.float64) for pair in sums.values() for column in pair]
    sums_KQ = np.stack([np.bincount(index_N, column, len(names)) for column in columns], axis=1)
    total_Q = sums_KQ.sum(axis=0)
    assert (total_Q[1::2] > 0).all(), "a denominator is not positive"
    mean = total_Q[::2] / total_Q[1::2]
    low, high = _bounds(sums_KQ, draws, seed) if len(names) >= MIN_CLUSTERS else (None, None)
    return {
        name: Interval(
            mean=float(mean[q]),
            ci_low=None if low is None else float(low[q]),
            ci_high=None if high is None else float(high[q]),
            clusters=len(names),
        )
        for q, name in enumerate(sums)
    }


def _bounds(
    sums_KQ: Float[np.ndarray, "K Q"], draws: int, seed: int
) -> tuple[Float[np.ndarray, " R"], Float[np.ndarray, " R"]]:
    """Percentiles of each ratio (even columns over odd ones) when clusters are drawn with
    replacement.
    """
    count = len(sums_KQ)
    random = np.random.Generator(np.random.Philox(key=seed & (2**64 - 1)))
    ratios = []
    for start in range(0, draws, max(1, _CHUNK // count)):
        size = min(max(1, _CHUNK // count), draws - start)
        times_BK = random.multinomial(count, np.full(count, 1.0 / count), size=size)
        resampled_BQ = times_BK.astype(np.float64) @ sums_KQ
        ratios.append(resampled_BQ[:, ::2] / resampled_BQ[:, 1::2])
    low, high = np.quantile(np.concatenate(ratios), expanded(count), axis=0)
    return low, high


def expanded(clusters: int) -> tuple[float, float]:
    """Percentiles for an interval of 95%: Phi(-+ sqrt(n / (n - 1)) t), with t that of n - 1 degrees of freedom.

    Plain percentiles of few clusters are too narrow, as a normal interval with the variance over n is beside Student's.
    t by its expansion in 1 / (n - 1) (Abramowitz and Stegun 1964, 26.7.5), exact to 1e-4 from 30 clusters on.
    """
    z, free = _NORMAL, clusters - 1
    t = z + (z**3 + z) / (4 * free) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * free**2)
    below = 0.5 * math.erfc(t * math.sqrt(clusters / free) / math.sqrt(2))
    return below, 1 - below


def log_mean_exp(logp_PG: Float[np.ndarray, "P G"]) -> Float[np.ndarray, " P"]:
    """log of the mean probability over a prompt's thoughts: a lower bound, on average, of log E_z
    p(y | x, z).
    """
    top_P1 = logp_PG.max(axis=1, keepdims=True)
    return np.log(np.exp(logp_PG - top_P1).mean(axis=1)) + top_P1[:, 0]


def verdict(gain: Interval, own_minus: Mapping[str, Interval]) -> tuple[Verdict, list[str]]:
    """The computed verdict and one reason per criterion it rests on.

    useful: own beats no_think, empty, filler and other_document, each with ci_low > 0. harmless:
    the gain's interval lies within the band. harmful: ci_high < 0. Otherwise inconclusive. The
    first that holds, in this order.
    """
    if gain.ci_low is None or gain.ci_high is None:
        return "inconclusive", [f"no interval: {gain.reason}"]
    rivals = {
        "no_think": gain,
        **{name: own_minus[name] for name in USEFUL_AGAINST if name in own_minus},
    }
    missing = [name for name in USEFUL_AGAINST if name not in own_minus]
    reasons = [_against(name, interval) for name, interval in rivals.items()]
    reasons += [f"control {name} was not measured, so useful cannot be claimed" for name in missing]
    if not missing and all(_beats(interval) for interval in rivals.values()):
        return "useful", reasons
    if gain.ci_low >= -HARMLESS_BAND and gain.ci_high <= HARMLESS_BAND:
        return "harmless", [
            f"{_against('no_think', gain)}, within +-{HARMLESS_BAND} nats per token"
        ]
    if gain.ci_high < 0:
        return "harmful", [_against("no_think", gain)]
    return "inconclusive", reasons


def _beats(interval: Interval) -> bool:
    return interval.ci_low is not None and interval.ci_low > 0


def _against(name: str, interval: Interval) -> str:
    if interval.ci_low is None or interval.ci_high is None:
        return f"own - {name} = {interval.mean:+.4f}, no interval ({interval.reason})"
    return f"own - {name} = {interval.mean:+.4f} [{interval.ci_low:+.4f}, {interval.ci_high:+.4f}]"


def positions(keys: Sequence[tuple]) -> dict[tuple, int]:
    """Where each key stands. Keys must differ: pairing two records by one key is arbitrary."""
    places = {key: place for place, key in enumerate(keys)}
    assert len(places) == len(keys), "two records share a key"
    return places


def pair(before: Sequence[tuple], after: Sequence[tuple]) -> Int[np.ndarray, " N"]:
    """For every key of ``after`` its position in ``before``. Raises ValueError when the two sets of
    keys differ.
    """
    places = positions(before)
    if places.keys() != positions(after).keys():
        common = len(places.keys() & set(after))
        raise ValueError(
            f"paired change: {len(before)} records before, {len(after)} after, {common} in common; "
            "evaluate both on the same prompts with the same seed"
        )
    return np.array([places[key] for key in after], dtype=np.int64)


def seed_interval(values: Sequence[float | None]) -> dict[str, float | None]:
    """Mean and 95% interval over seeds, by Student's t; no interval below three, no mean where one is missing."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    if len(known) < len(values) or not known:
        return {"mean": None, "ci_low": None, "ci_high": None}
    mean = float(np.mean(known))
    if len(known) < 3:
        return {"mean": mean, "ci_low": None, "ci_high": None}
    from scipy.stats import t

    half = float(t.ppf(0.975, len(known) - 1) * np.std(known, ddof=1) / math.sqrt(len(known)))
    return {"mean": mean, "ci_low": mean - half, "ci_high": mean + half}
