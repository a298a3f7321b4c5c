"""Records -> plain numbers: gain, controls, accuracies, thoughts, per domain, and the computed
verdict.

All averages are ratios of sums over records and all intervals of one block come from the same
resampled clusters. Units are nats per continuation token unless a name says otherwise.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from rlpt.evaluate.bits_per_byte import WindowRecord, bits_per_byte
from rlpt.evaluate.records import NO_THINK, NULL, OWN, WRONG, WRONG_NO_THINK, Record, frames
from rlpt.statistics import Interval, log_mean_exp, pair, ratio_intervals, verdict

NULL_LIMIT = {"float32": 1e-5, "bfloat16": 1e-3}
"""Largest |mean| in nats per token by which the two paths to one number may differ."""
MAX_DOMAINS = 24
_RIVALS = ("empty", "filler", "context_copy", "other_document", "shuffled")

Unit = Literal["document", "domain"]
Table = dict[str, Any]
Sums = dict[str, tuple[Float[np.ndarray, " N"], Float[np.ndarray, " N"]]]


@dataclass(frozen=True)
class Resampling:
    """What is resampled and how often."""

    unit: Unit
    """The unit of the split: never less than what was held out together."""
    draws: int
    seed: int

    def intervals(self, records: Sequence[Record], sums: Sums) -> dict[str, Interval]:
        unit_N = np.array([getattr(record, self.unit) for record in records])
        return ratio_intervals(sums, unit_N, draws=self.draws, seed=self.seed)


def summarise(
    records: Sequence[Record],
    windows: Sequence[WindowRecord],
    resampling: Resampling,
    compute_dtype: Literal["float32", "bfloat16"] = "float32",
) -> Table:
    """The summary of one evaluation, ready for JSON. Its keys are those of `eval.json` and of the
    report.
    """
    table = block(records, resampling)
    if any(NULL in record.logp for record in records):
        table["null"] = _null(records, NULL_LIMIT[compute_dtype])
    table["bits_per_byte"] = _bits(windows, resampling)
    table["thought"] = thought_statistics(records)
    table["per_domain"] = _per_domain(records, resampling)
    table["evaluation"] = {
        "prompts": len({record.key[:3] for record in records}),
        "documents": len({record.document for record in records}),
        "domains": len({record.domain for record in records}),
        "thoughts_per_prompt": 1 + max(record.sample for record in records),
        "continuation_tokens": int(np.mean([record.num_tokens for record in records])),
        "unit": resampling.unit,
        "bootstrap_draws": resampling.draws,
        "seed": resampling.seed,
        "compute_dtype": compute_dtype,
    }
    table["verdict_reasons"] += _warnings(table)
    return table


def block(records: Sequence[Record], resampling: Resampling) -> Table:
    """Gain, controls, first token, accuracies and verdict of any set of records: all of them, or
    one domain's.
    """
    measured = resampling.intervals(records, _sums(records))
    own_minus = {
        name: measured[f"own_minus_{name}"] for name in _RIVALS if f"own_minus_{name}" in measured
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
        "next_token_accuracy_no_think": measured["accuracy_no_think"].mean,
        "next_token_accuracy_thought": measured["accuracy_thought"].mean,
        "next_token_accuracy_change": measured["accuracy_change"].as_dict(),
        "prompts": len({record.key[:3] for record in records}),
    }


def _totals(records: Sequence[Record], frame: str) -> Float[np.ndarray, " N"]:
    return np.array([record.total(frame) for record in records])


def _first(records: Sequence[Record], frame: str) -> Float[np.ndarray, " N"]:
    return np.array([record.logp[frame][0] for record in records], dtype=np.float64)


def _sums(records: Sequence[Record]) -> Sums:
    """Numerator and denominator, per record, of every quantity of a block."""
    tokens = np.array([record.num_tokens for record in records], dtype=np.float64)
    num_bytes = np.array([record.num_bytes for record in records], dtype=np.float64)
    ones = np.ones(len(records))
    base, own = _totals(records, NO_THINK), _totals(records, OWN)
    first_base, first_own = _first(records, NO_THINK), _first(records, OWN)
    right_base = np.array([record.first_correct_no_think for record in records], dtype=np.float64)
    right_own = np.array([record.first_correct_thought for record in records], dtype=np.float64)
    marginal = _marginal(records, own)
    present = frames(records)
    sums: Sums = {
        "gain": (own - base, tokens),
        "gain_per_byte": (own - base, num_bytes),
        "marginal": (marginal - base, tokens),
        "marginal_minus_mean": (marginal - own, tokens),
        "logp_no_think": (base, tokens),
        "logp_own": (own, tokens),
        "first_gain": (first_own - first_base, ones),
        "first_no_think": (first_base, ones),
        "first_own": (first_own, ones),
        "accuracy_no_think": (right_base, ones),
        "accuracy_thought": (right_own, ones),
        "accuracy_change": (right_own - right_base, ones),
    }
    for name in (rival for rival in _RIVALS if rival in present):
        control = _totals(records, name)
        sums[name] = (control - base, tokens)
        sums[f"own_minus_{name}"] = (own - control, tokens)
    return sums


def _marginal(records: Sequence[Record], own_N: Float[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
    """log of the mean probability over a prompt's thoughts, repeated for each of them."""
    members: dict[tuple, list[int]] = {}
    for index, record in enumerate(records):
        members.setdefault(record.key[:3], []).append(index)
    places_PG = np.array(list(members.values()))
    marginal_N = np.empty_like(own_N)
    marginal_N[places_PG] = log_mean_exp(own_N[places_PG])[:, None]
    return marginal_N


def _wrong_target(records: Sequence[Record], resampling: Resampling) -> Table:
    """Own thought, another continuation: a thought that raises that too is not about this prompt's
    text.
    """
    asked = [record for record in records if WRONG in record.logp]
    if not asked:
        return {}
    difference = _totals(asked, WRONG) - _totals(asked, WRONG_NO_THINK)
    tokens = np.array([len(record.logp[WRONG]) for record in asked], dtype=np.float64)
    measured = resampling.intervals(asked, {"wrong": (difference, tokens)})["wrong"]
    bound = measured.mean if measured.ci_low is None else measured.ci_low
    skipped = len(records) - len(asked)
    return {
        "wrong_target": {**measured.as_dict(), "passes": bound <= 0, "records_without": skipped}
    }


def _null(records: Sequence[Record], limit: float) -> Table:
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


def _bits(windows: Sequence[WindowRecord], resampling: Resampling) -> Table | None:
    if not windows:
        return None
    measured = bits_per_byte(windows, resampling.unit, draws=resampling.draws, seed=resampling.seed)
    return {
        **measured.as_dict(),
        "documents": len(windows),
        "bytes": sum(w.num_bytes for w in windows),
    }


def thought_statistics(records: Sequence[Record]) -> Table:
    """Lengths (tokens), how thoughts end, and how often they name the text: diagnostics, never a
    gate.
    """
    length_N = np.array([len(record.thought_ids) for record in records])
    named_N = np.array([record.named_prefix for record in records])
    masses = [record.opener_mass for record in records if record.opener_mass is not None]
    different = {tuple(record.thought_ids.tolist()) for record in records}
    return {
        "mean_len": float(length_N.mean()),
        "std_len": float(length_N.std()),
        "max_len": int(length_N.max()),
        "len_histogram": np.bincount(length_N).tolist(),
        "closer_rate": float(np.mean([record.finish == "closer" for record in records])),
        "empty_rate": float((length_N == 0).mean()),
        "distinct_rate": len(different) / len(records),
        "named_answer_rate": float((named_N >= 1).mean()),
        "named_prefix_mean": float(named_N.mean()),
        "opener_mass": float(np.mean(masses)) if masses else None,
    }


def _per_domain(records: Sequence[Record], resampling: Resampling) -> Table:
    """Blocks of the largest domains. Inside one, documents are resampled: it is a single domain."""
    inside = Resampling("document", resampling.draws, resampling.seed)
    counts = Counter(record.domain for record in records)
    largest = sorted(counts, key=lambda name: (-counts[name], name))[:MAX_DOMAINS]
    return {name: block([r for r in records if r.domain == name], inside) for name in largest}


def _warnings(table: Table) -> list[str]:
    """What a reader of the verdict must know although the verdict does not depend on it."""
    found = []
    null, wrong = table.get("null"), table.get("wrong_target")
    if null is not None and not null["passes"]:
        found.append(
            f"warning: null control |mean| = {abs(null['mean']):.1e} exceeds {null['limit']:.0e}"
        )
    if wrong is not None and not wrong["passes"]:
        found.append(
            f"warning: wrong_target = {wrong['mean']:+.4f}, above 0: thoughts help any continuation"
        )
    return found


def change(
    before: Sequence[Record], after: Sequence[Record], resampling: Resampling
) -> dict[str, Interval]:
    """Paired change between two evaluations of the same prompts.

    Pairs by (epoch, document, cut, sample); raises ValueError when the keys differ.
    """
    order = pair([record.key for record in before], [record.key for record in after])
    earlier, later = _sums([before[i] for i in order]), _sums(after)
    names = (
        "gain",
        "first_gain",
        "logp_no_think",
        "logp_own",
        "first_own",
        "accuracy_no_think",
        "accuracy_thought",
    )
    sums = {name: (later[name][0] - earlier[name][0], later[name][1]) for name in names}
    return resampling.intervals(after, sums)


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
