"""Records -> the block of figures that every table of an evaluation repeats: of all prompts, a domain, a tier."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from rlpt.evaluate.attempts import best_at_k, pass_at_k, powers
from rlpt.evaluate.calibration import calibration
from rlpt.evaluate.quantities import RIVALS, Resampling, Sheet, Sums, places, totals
from rlpt.evaluate.records import GREEDY, NO_THINK, NULL, OWN, WRONG, WRONG_NO_THINK, Record
from rlpt.statistics import Interval, verdict

Table = dict[str, Any]


def block(sheet: Sheet, resampling: Resampling) -> Table:
    """Gain, controls, first token, accuracies and verdict of any set of whole prompts. All intervals of one block come
    from the same resampled clusters.
    """
    records, measured = sheet.records, sheet.intervals(resampling)
    own_minus = {
        name: measured[f"own_minus_{name}"] for name in RIVALS if f"own_minus_{name}" in measured
    }
    label, reasons = verdict(measured["gain"], own_minus)
    return {
        "verdict": label,
        "verdict_reasons": reasons,
        "gain_heldout": {
            **measured["gain"].as_dict(),
            "per_byte": measured["gain_per_byte"].mean,
            "marginal_n": measured["marginal"].mean,
            "num_thoughts": 1 + max(record.sample for record in records),
            "marginal_minus_mean": measured["marginal_minus_mean"].as_dict(),
        },
        "controls": {
            name: {"gain": measured[name].as_dict(), "own_minus_control": minus.as_dict()}
            for name, minus in own_minus.items()
        },
        **_wrong_target(records, resampling),
        "logp_no_think": measured["logp_no_think"].as_dict(),
        "logp_thought": measured["logp_own"].as_dict(),
        "first_token": {
            "gain": measured["first_gain"].as_dict(),
            "logp_no_think": measured["first_no_think"].as_dict(),
            "logp_thought": measured["first_own"].as_dict(),
        },
        **_accuracies(measured),
        "prompts": len({record.key[:3] for record in records}),
    }


def brief(sheet: Sheet, resampling: Resampling) -> Table:
    """The figures that need no whole prompts: of thoughts that have something in common."""
    records, measured = sheet.records, sheet.intervals(resampling)
    return {
        "gain_heldout": measured["gain"].as_dict(),
        "logp_no_think": measured["logp_no_think"].as_dict(),
        "next_token_accuracy_no_think": measured["accuracy_no_think"].mean,
        "next_token_accuracy_thought": measured["accuracy_thought"].mean,
        "next_token_accuracy_change": measured["accuracy_thought_change"].as_dict(),
        "prompts": len({record.key[:3] for record in records}),
        "thoughts": len(records),
    }


_OPTIONAL = {
    "gain_greedy": "gain_greedy",
    "next_token_accuracy_greedy": "accuracy_greedy",
    "next_token_accuracy_greedy_change": "accuracy_greedy_change",
    "prediction_match": "prediction",
    "prediction_match_greedy": "prediction_greedy",
}


def _accuracies(measured: Mapping[str, Interval]) -> Table:
    """Bare means where the contract has them so; everything newer with its interval."""
    table: Table = {
        "next_token_accuracy_no_think": measured["accuracy_no_think"].mean,
        "next_token_accuracy_thought": measured["accuracy_thought"].mean,
        "next_token_accuracy_change": measured["accuracy_thought_change"].as_dict(),
        "next_token_accuracy_majority": measured["accuracy_majority"].as_dict(),
        "next_token_accuracy_majority_change": measured["accuracy_majority_change"].as_dict(),
    }
    return table | {
        key: measured[name].as_dict() for key, name in _OPTIONAL.items() if name in measured
    }


def at_k(sheet: Sheet, resampling: Resampling) -> dict[str, Table]:
    """By k = 1, 2, 4, ... n: mean, best and passing of k thoughts, see `rlpt.evaluate.attempts`.

    mean@k is the mean over all n whatever k is; it stands beside the others to be compared with.
    """
    found, places_PG = {}, places(sheet.records)
    for k in powers(places_PG.shape[1]):
        measured = resampling.intervals(sheet.records, _attempts(sheet.sums, places_PG, k))
        found[str(k)] = {name: interval.as_dict() for name, interval in measured.items()}
    return found


def _attempts(sums: Sums, places_PG: Int[np.ndarray, "P G"], k: int) -> Sums:
    # What is subtracted is the same for all thoughts of a prompt: the best gain is that of the best thought.
    found: Sums = {
        "mean_gain": sums["gain"],
        "best_gain": _over_choices(best_at_k, sums["gain"], places_PG, k),
    }
    right = {"next_token": "accuracy_thought", "prediction": "prediction"}
    for name, quantity in right.items():
        if quantity in sums:
            found[f"mean_{name}"] = sums[quantity]
            found[f"pass_{name}"] = _over_choices(pass_at_k, sums[quantity], places_PG, k)
    return found


def _over_choices(
    arithmetic: Callable[[Float[np.ndarray, "P G"], int], Float[np.ndarray, " P"]],
    sums: tuple[Float[np.ndarray, " N"], Float[np.ndarray, " N"]],
    places_PG: Int[np.ndarray, "P G"],
    k: int,
) -> tuple[Float[np.ndarray, " N"], Float[np.ndarray, " N"]]:
    """A figure of every prompt, in each of its rows."""
    value_N = np.empty_like(sums[0])
    value_N[places_PG] = arithmetic(sums[0][places_PG], k)[:, None]
    return value_N, sums[1]


def calibrations(records: Sequence[Record]) -> dict[str, Table]:
    """Of the likeliest first token: without a thought and greedily once a prompt, with a thought for every thought."""
    once = [record for record in records if record.sample == 0]
    chosen = {"no_think": (NO_THINK, once), "thought": (OWN, records), "greedy": (GREEDY, once)}
    found = {}
    for name, (frame, some) in chosen.items():
        firsts = [record.firsts[frame] for record in some if frame in record.firsts]
        known = [first.confidence for first in firsts if first.confidence is not None]
        if known and len(known) == len(some):
            right_N = np.array([record.first_correct(frame) for record in some], dtype=bool)
            found[name] = calibration(np.exp(np.array(known)), right_N)
    return found


def _wrong_target(records: Sequence[Record], resampling: Resampling) -> Table:
    """Own thought, another continuation: a thought that raises that too is not about this prompt's
    text.
    """
    asked = [record for record in records if WRONG in record.logp]
    if not asked:
        return {}
    difference = totals(asked, WRONG) - totals(asked, WRONG_NO_THINK)
    tokens = np.array([len(record.logp[WRONG]) for record in asked], dtype=np.float64)
    measured = resampling.intervals(asked, {"wrong": (difference, tokens)})["wrong"]
    bound = measured.mean if measured.ci_low is None else measured.ci_low
    skipped = len(records) - len(asked)
    return {
        "wrong_target": {**measured.as_dict(), "passes": bound <= 0, "records_without": skipped}
    }


def null(records: Sequence[Record], limit: float) -> Table:
    """The same number along two paths, trunk and marker-less branch: their difference is the noise
    of the seam.
    """
    differences = [
        record.logp[NULL].astype(np.float64) - record.logp[NO_THINK] for record in records
    ]
    flat = np.concatenate(differences)
    mean = float(flat.mean())
    largest = float(np.abs(flat).max())
    return {"mean": mean, "max_abs": largest, "limit": limit, "passes": abs(mean) <= limit}
