"""Records -> numerator and denominator, record by record, of everything an evaluation averages. Pure numpy.

What belongs to a prompt and not to one of its thoughts (no thought, greedy, majority) stands in each of its records, so
that every sum is over records and everything is paired.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float, Int

from rlpt.evaluate.attempts import majority
from rlpt.evaluate.records import GREEDY, NO_THINK, OWN, Record, frames
from rlpt.statistics import Interval, log_mean_exp, ratio_intervals

RIVALS = ("empty", "filler", "context_copy", "other_document", "shuffled")
"""Controls that score the prompt's own text after something else than its thought."""

Unit = Literal["document", "domain"]
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


def sums_of(records: Sequence[Record]) -> Sums:
    """Everything of a set of records that holds all thoughts of its prompts."""
    return {
        **likelihoods(records),
        **_marginals(records),
        **accuracies(records),
        **_rivals(records),
    }


@dataclass(frozen=True)
class Sheet:
    """Whole prompts' records and beside them, row by row, all that is averaged: computed once, then cut into parts."""

    records: Sequence[Record]
    sums: Sums

    @classmethod
    def of(cls, records: Sequence[Record]) -> "Sheet":
        return cls(records, sums_of(records))

    def part(self, index_M: Int[np.ndarray, " M"]) -> "Sheet":
        """Some of the rows. Of what is said of prompts, only whole ones make sense."""
        sums = {name: (over[index_M], under[index_M]) for name, (over, under) in self.sums.items()}
        return Sheet([self.records[index] for index in index_M], sums)

    def intervals(self, resampling: Resampling) -> dict[str, Interval]:
        return resampling.intervals(self.records, self.sums)


def totals(records: Sequence[Record], frame: str) -> Float[np.ndarray, " N"]:
    """log p of the whole continuation, nats."""
    return np.array([record.total(frame) for record in records])


def places(records: Sequence[Record]) -> Int[np.ndarray, "P G"]:
    """Where the thoughts of each prompt stand."""
    members: dict[tuple, list[int]] = {}
    for index, record in enumerate(records):
        members.setdefault(record.key[:3], []).append(index)
    return np.array(list(members.values()))


def likelihoods(records: Sequence[Record]) -> Sums:
    """Nats of text with and without the thought, whole and first token."""
    tokens_N = np.array([record.num_tokens for record in records], dtype=np.float64)
    bytes_N = np.array([record.num_bytes for record in records], dtype=np.float64)
    ones_N = np.ones(len(records))
    base_N, own_N = totals(records, NO_THINK), totals(records, OWN)
    first_base_N, first_own_N = (_first(records, frame) for frame in (NO_THINK, OWN))
    found: Sums = {
        "gain": (own_N - base_N, tokens_N),
        "gain_per_byte": (own_N - base_N, bytes_N),
        "logp_no_think": (base_N, tokens_N),
        "logp_own": (own_N, tokens_N),
        "first_gain": (first_own_N - first_base_N, ones_N),
        "first_no_think": (first_base_N, ones_N),
        "first_own": (first_own_N, ones_N),
    }
    if all(GREEDY in record.logp for record in records):
        found["gain_greedy"] = (totals(records, GREEDY) - base_N, tokens_N)
    return found


def accuracies(records: Sequence[Record]) -> Sums:
    """Shares that are right: the first token in every way of reading it, and predictions where there are any."""
    ones_N = np.ones(len(records))
    right = {
        "accuracy_no_think": _right(records, NO_THINK),
        "accuracy_thought": _right(records, OWN),
    }
    if all(GREEDY in record.firsts for record in records):
        right["accuracy_greedy"] = _right(records, GREEDY)
    matches = [record.prediction.match for record in records if record.prediction is not None]
    if len(matches) == len(records):
        right["prediction"] = np.array(matches)
    said = [r.greedy.prediction for r in records if r.greedy is not None]
    greedy = [prediction.match for prediction in said if prediction is not None]
    if len(greedy) == len(records):
        right["prediction_greedy"] = np.array(greedy)
    found: Sums = {name: (right_N, ones_N) for name, right_N in right.items()}
    for name in ("accuracy_thought", "accuracy_greedy"):
        if name in right:
            found[f"{name}_change"] = (right[name] - right["accuracy_no_think"], ones_N)
    return found


def _marginals(records: Sequence[Record]) -> Sums:
    """What a prompt's thoughts amount to together: log of their mean probability, and their majority."""
    places_PG = places(records)
    tokens_N = np.array([record.num_tokens for record in records], dtype=np.float64)
    base_N, own_N = totals(records, NO_THINK), totals(records, OWN)
    marginal_N, right_N = np.empty_like(own_N), np.empty_like(own_N)
    marginal_N[places_PG] = log_mean_exp(own_N[places_PG])[:, None]
    for members in places_PG:
        said = majority([records[index].vote for index in members])
        right_N[members] = said == int(records[members[0]].continuation_ids[0])
    ones_N = np.ones(len(records))
    return {
        "marginal": (marginal_N - base_N, tokens_N),
        "marginal_minus_mean": (marginal_N - own_N, tokens_N),
        "accuracy_majority": (right_N, ones_N),
        "accuracy_majority_change": (right_N - _right(records, NO_THINK), ones_N),
    }


def _rivals(records: Sequence[Record]) -> Sums:
    """Every control against no thought, and the thought against every control."""
    tokens_N = np.array([record.num_tokens for record in records], dtype=np.float64)
    base_N, own_N, present = totals(records, NO_THINK), totals(records, OWN), frames(records)
    found: Sums = {}
    for name in (rival for rival in RIVALS if rival in present):
        control_N = totals(records, name)
        found[name] = (control_N - base_N, tokens_N)
        found[f"own_minus_{name}"] = (own_N - control_N, tokens_N)
    return found


def _first(records: Sequence[Record], frame: str) -> Float[np.ndarray, " N"]:
    return np.array([record.logp[frame][0] for record in records], dtype=np.float64)


def _right(records: Sequence[Record], frame: str) -> Float[np.ndarray, " N"]:
    return np.array([record.first_correct(frame) for record in records], dtype=np.float64)
