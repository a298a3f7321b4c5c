"""How far the engine's log-probabilities are from the trainer's, for the tokens that were sampled.

d = log pi_trainer - log pi_engine of every action. Rows in; sums that add and extremes that compare over micro-batches
and ranks; after both, the numbers of `metrics.jsonl` (`rlpt.guards` judges them). All rows together hold policy drift
(staleness, reuse) and the mismatch of the engine; ``current`` rows, which the very weights of the step sampled, the
latter alone.
"""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rlpt.guards import CURRENT, PREFIX
from rlpt.types import Sums

Extremes = dict[str, float]
"""Name -> largest value; a smallest is kept as the largest of its negative, so that all reduce by one maximum."""

BAND = math.log(2.0)
"""A ratio outside [1/2, 2] is no rounding: that is 15 times the rms of two bfloat16 paths (0.045 nats; algorithms,
section 3.1). It is also where verl's health rule and TRL's masking of tokens draw the line."""
BUCKETS = {"p00": (0.0, 0.01), "p01": (0.01, 0.1), "p10": (0.1, 0.5), "p50": (0.5, math.inf)}
"""Behaviour probability from, to; named by the lower edge in percent. Rounding sits on tokens below 10%. The last
has no upper edge: a log-probability may round to a little above 0."""
Masked = tuple[Float[Tensor, " R"], Bool[Tensor, " R"]]
"""Values, and the rows they count for."""


def measured(
    logp_R: Float[Tensor, " R"],
    behaviour_logp_R: Float[Tensor, " R"],
    used_R: Bool[Tensor, " R"],
    current_R: Bool[Tensor, " R"],
) -> tuple[Sums, Extremes]:
    """Sums and extremes over used rows, in float64. Other rows are padding and may hold anything."""
    d_R = torch.where(used_R, logp_R.detach().double() - behaviour_logp_R.double(), 0.0)
    behaviour_R = torch.where(used_R, behaviour_logp_R.double(), 0.0)
    current_R = used_R & current_R
    sums = _sums(d_R, behaviour_R, used_R, current_R)
    peaks = {
        f"{prefix}{name}": _largest(sign * d_R, mask_R)
        for prefix, mask_R in ((PREFIX, used_R), (CURRENT, current_R))
        for name, sign in (("above", 1.0), ("below", -1.0))
    }
    added = [torch.where(mask_R, value_R, 0.0).sum() for value_R, mask_R in sums.values()]
    counts = [mask_R.sum(dtype=torch.float64) for _, mask_R in sums.values()]
    # One transfer for all of them: each on its own would wait for the device.
    found = torch.stack([*added, *counts, *peaks.values()]).tolist()
    pairs = zip(found[: len(sums)], found[len(sums) : 2 * len(sums)], strict=True)
    return dict(zip(sums, pairs, strict=True)), dict(
        zip(peaks, found[2 * len(sums) :], strict=True)
    )


def _sums(
    d_R: Float[Tensor, " R"],
    behaviour_R: Float[Tensor, " R"],
    used_R: Bool[Tensor, " R"],
    current_R: Bool[Tensor, " R"],
) -> dict[str, Masked]:
    """k3 = rho - 1 - log rho estimates KL(behaviour || pi), and so does k1 = -log rho, with a sign and more noise."""
    ratio_R, change_R, abs_R = d_R.exp(), torch.expm1(d_R), d_R.abs()
    both = {
        "log_ratio": d_R,
        "log_ratio_square": d_R.square(),
        "abs_log_ratio": abs_R,
        "exp_abs_log_ratio": abs_R.exp(),
    }
    alone = {
        "ratio": ratio_R,
        "ratio_square": ratio_R.square(),
        "k3": change_R - d_R,
        "abs_probability": (behaviour_R.exp() * change_R).abs(),
        "out_of_band": (abs_R > BAND).double(),
        "current_share": current_R.double(),
    }
    sums = {f"{PREFIX}{name}": (value_R, used_R) for name, value_R in (both | alone).items()}
    sums |= {f"{CURRENT}{name}": (value_R, current_R) for name, value_R in both.items()}
    for name, (low, high) in BUCKETS.items():
        inside_R = (behaviour_R.exp() >= low) & (behaviour_R.exp() < high)
        sums[f"{PREFIX}{name}_share"] = (inside_R.double(), used_R)
        sums[f"{PREFIX}{name}_abs_log_ratio"] = (abs_R, used_R & inside_R)
    return sums


def _largest(value_R: Float[Tensor, " R"], mask_R: Bool[Tensor, " R"]) -> Float[Tensor, ""]:
    """-inf over no row."""
    chosen_R = torch.where(mask_R, value_R, -torch.inf)
    return torch.cat([chosen_R, chosen_R.new_full((1,), -torch.inf)]).max()


def raise_to(into: Extremes, more: Extremes) -> None:
    """Keep the larger value, name by name."""
    for name, value in more.items():
        into[name] = max(into.get(name, -math.inf), value)


def finished(totals: Sums, extremes: Extremes) -> dict[str, float]:
    """Sums and extremes over all ranks -> metrics; empty where nothing was measured.

    ess = (sum rho)^2 / (n sum rho^2), chi2 = E[rho^2] - 1. A mean over no row is left out.
    """
    means = {
        name: value / count
        for name, (value, count) in totals.items()
        if name.startswith(PREFIX) and count
    }
    if f"{PREFIX}ratio" not in means:
        return means
    square = means.pop(f"{PREFIX}ratio_square")
    for prefix in (PREFIX, CURRENT):
        if f"{prefix}log_ratio" in means:
            means[f"{prefix}k1"] = -means.pop(f"{prefix}log_ratio")
            means[f"{prefix}rms_log_ratio"] = math.sqrt(means.pop(f"{prefix}log_ratio_square"))
            means[f"{prefix}max_abs_log_ratio"] = max(
                extremes[f"{prefix}above"], extremes[f"{prefix}below"]
            )
    return means | {
        f"{PREFIX}rows": totals[f"{PREFIX}ratio"][1],
        f"{PREFIX}ratio_min": _exp(-extremes[f"{PREFIX}below"]),
        f"{PREFIX}ratio_max": _exp(extremes[f"{PREFIX}above"]),
        f"{PREFIX}ess": means[f"{PREFIX}ratio"] ** 2 / square,
        f"{PREFIX}chi2": square - 1.0,
    }


def _exp(x: float) -> float:
    """math.exp that says inf where it would overflow."""
    return math.exp(x) if x < 709.0 else math.inf
