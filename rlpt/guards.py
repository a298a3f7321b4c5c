"""What is to be said of a step's `mismatch/*`: limits, what exceeds them, and the remedy. Numbers in, words out.

Trainer, report and terminal view judge by this one table; it imports no torch.
"""

import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from rlpt.limits import MismatchConfig, MismatchLimits

PREFIX, CURRENT = "mismatch/", "mismatch/current_"
ROUNDING = {"float32": 0.005, "float16": 0.01, "bfloat16": 0.06}
"""Largest rms of d, in nats, that rounding explains where the coarser side computes in this dtype. Measured elsewhere:
0.0024, 0.0056, 0.045 (algorithms, sections 3.1 and 7)."""
STANDARD_ERRORS = 4.0
"""A mean is held against its limit and as many standard errors: by chance alone it leaves that once in 16,000 steps."""

LEAST_ROWS = 32
"""Fewer current tokens in a step (asynchronous ones may have few) are not judged: one rare token would decide."""


def mean_bound(limit: float, rms: float, count: float) -> float:
    """Up to where a mean over ``count`` tokens may lie: few tokens prove little."""
    return limit + STANDARD_ERRORS * rms / math.sqrt(count)


def coarser(*dtypes: str) -> str:
    """The dtype whose rounding is the largest."""
    return max(dtypes, key=lambda dtype: ROUNDING[dtype])


class Guard(NamedTuple):
    """A limit on a metric; ``sign`` -1 where the metric must not fall below it."""

    metric: str
    limit: str
    sign: int
    remedy: str

    @property
    def name(self) -> str:
        """Of the metric in metrics.jsonl."""
        return f"{PREFIX}{self.metric}"

    def of(self, means: Mapping[str, float]) -> float:
        """What is held against the limit: of a mean difference its size."""
        value = means[self.name]
        return abs(value) if self.metric.endswith("k1") else value


_ENGINE = (
    "the engine does not compute what the trainer computes with the same weights: compare their dtypes and heads, and "
    "what was published"
)
_DRIFT = (
    "the weights have moved away from those that sampled: lower max_staleness, max_reuse or optimizer.lr; where "
    "mismatch/current_* is large, too, the engine is at fault"
)
GUARDS = (
    Guard("current_exp_abs_log_ratio", "current_exp_abs_log_ratio", 1, _ENGINE),
    Guard("current_rms_log_ratio", "current_rms_log_ratio", 1, _ENGINE),
    Guard("current_k1", "current_k1", 1, _ENGINE),
    Guard("k1", "k1", 1, _DRIFT),
    Guard("chi2", "chi2", 1, _DRIFT),
    Guard("ess", "ess", -1, _DRIFT),
    Guard("ratio", "ratio_high", 1, _DRIFT),
    Guard("ratio", "ratio_low", -1, _DRIFT),
)


def verdict(
    means: Mapping[str, float], cfg: MismatchConfig, dtype: str
) -> tuple[dict[str, str], dict[str, str]]:
    """What a step's metrics warn of, and what must end the run: metric -> one line. ``dtype``: the coarser side's."""
    return _exceeded(means, cfg.warn, "warn", dtype), _exceeded(means, cfg.halt, "halt", dtype)


def _exceeded(
    means: Mapping[str, float], limits: MismatchLimits, level: str, dtype: str
) -> dict[str, str]:
    lines = {}
    for guard, limit in bounds(means, limits, dtype):
        value = guard.of(means)
        # Written so that NaN is outside, too.
        if not guard.sign * value <= guard.sign * limit:
            word = "exceeds" if guard.sign > 0 else "is below"
            key = f"mismatch.{level}.{guard.limit}"
            found = means[guard.name]
            lines[guard.name] = (
                f"{guard.name} = {found:.4g} {word} {key} = {limit:.4g}; {guard.remedy}"
            )
    return lines


def bounds(
    means: Mapping[str, float], limits: MismatchLimits, dtype: str
) -> Iterator[tuple[Guard, float]]:
    """Every guard that can judge this step, and its limit there."""
    for guard in GUARDS:
        if guard.name not in means:
            continue
        if not (guard.name.startswith(CURRENT) and _current_rows(means) < LEAST_ROWS):
            yield guard, _limit(means, limits, guard, dtype)


def _limit(means: Mapping[str, float], limits: MismatchLimits, guard: Guard, dtype: str) -> float:
    limit = getattr(limits, guard.limit)
    if limit is None:
        return ROUNDING[dtype]
    if guard.metric != "current_k1":
        return limit
    return mean_bound(limit, means[f"{CURRENT}rms_log_ratio"], _current_rows(means))


def _current_rows(means: Mapping[str, float]) -> float:
    return means[f"{PREFIX}rows"] * means[f"{PREFIX}current_share"]
