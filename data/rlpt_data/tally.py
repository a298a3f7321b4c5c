"""What became of every document: counts by stage and reason, and samples of what was left out.

Tallies of parts add up to the tally of the whole, in any order: counts are sums, and the samples of
a reason are the first by place.
"""

import heapq
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from rlpt_data.documents import Drop

NUM_SAMPLES = 20
LONGEST_SAMPLE = 4096
"""Characters of a place or a detail."""
REPORTED = ("contaminated", "failed_unit")
"""Reasons of which every drop is kept, and no sample only."""


@dataclass
class Tally:
    """Counts and samples of one part of the work."""

    entered: Counter[str] = field(default_factory=Counter)
    """stage -> documents that reached it."""
    dropped: dict[str, Counter[str]] = field(default_factory=dict)
    """stage -> reason -> documents it left out."""
    _samples: dict[str, list[tuple[str, str]]] = field(default_factory=dict)

    def enter(self, stage: str, count: int = 1) -> None:
        self.entered[stage] += count

    def drop(self, stage: str, dropped: Drop) -> None:
        self.dropped.setdefault(stage, Counter())[dropped.reason] += 1
        self._keep(dropped.reason, [(_writable(dropped.where), _writable(dropped.detail))])

    def count(self, stage: str, reason: str, number: int) -> None:
        """Drops beyond those that are samples."""
        if number:
            self.dropped.setdefault(stage, Counter())[reason] += number

    def add(self, other: "Tally") -> None:
        self.entered += other.entered
        for stage, reasons in other.dropped.items():
            self.dropped.setdefault(stage, Counter()).update(reasons)
        for reason, rows in other._samples.items():
            self._keep(reason, rows)

    @property
    def reasons(self) -> Counter[str]:
        """reason -> documents left out for it, at any stage."""
        return sum(self.dropped.values(), Counter())

    def samples(self) -> dict[str, list[dict[str, str]]]:
        """reason -> [{where, detail}], sorted."""
        return {
            reason: [{"where": where, "detail": detail} for where, detail in rows]
            for reason, rows in sorted(self._samples.items())
        }

    def table(self, order: Iterable[str]) -> list[dict[str, Any]]:
        """One row a stage: its name, documents in and out, drops by reason."""
        rows = []
        for stage in order:
            reasons = dict(sorted(self.dropped.get(stage, Counter()).items()))
            entered = self.entered[stage]
            left = entered - sum(reasons.values())
            rows.append({"stage": stage, "in": entered, "out": left, "dropped": reasons})
        return rows

    def to_json(self) -> dict[str, Any]:
        return {
            "entered": dict(sorted(self.entered.items())),
            "dropped": {
                stage: dict(sorted(c.items())) for stage, c in sorted(self.dropped.items())
            },
            "samples": dict(sorted(self._samples.items())),
        }

    @classmethod
    def from_json(cls, table: Mapping[str, Any]) -> "Tally":
        samples = {
            reason: [(where, detail) for where, detail in rows]
            for reason, rows in table["samples"].items()
        }
        dropped = {stage: Counter(counts) for stage, counts in table["dropped"].items()}
        return cls(Counter(table["entered"]), dropped, samples)

    def _keep(self, reason: str, rows: Iterable[tuple[str, str]]) -> None:
        kept = [*self._samples.get(reason, ()), *rows]
        whole = reason in REPORTED
        self._samples[reason] = sorted(kept) if whole else heapq.nsmallest(NUM_SAMPLES, kept)


def _writable(text: str) -> str:
    """It may quote what is no Unicode, or has no end."""
    return text[:LONGEST_SAMPLE].encode(errors="replace").decode()
