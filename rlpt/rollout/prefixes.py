"""How many prompt tokens a prefix cache could have saved: what its hit rate is held against."""

from collections.abc import Iterable, Iterator

from rlpt.rollout.wire import Job

BLOCK = 32
"""Tokens of one block of the engine's cache, the smallest that its CPU attention takes. Whole blocks are shared."""


class PrefixCount:
    """Tokens of prompts that were asked for, and those an endless cache would have found, engine by engine."""

    def __init__(self) -> None:
        self._seen: dict[str, set[int]] = {}
        self.asked = self.possible = 0

    def add(self, engine: str, jobs: Iterable[Job]) -> None:
        """Jobs in the order in which the engine gets them.

        The last token of a prompt is always computed, and a group's first rollout computes what no earlier prompt has.
        """
        seen = self._seen.setdefault(engine, set())
        for job in jobs:
            most = (len(job.ids) - 1) // BLOCK
            blocks = list(_chained(job.ids))
            first = next((k for k in range(most) if blocks[k] not in seen), most)
            self.asked += job.count * len(job.ids)
            self.possible += BLOCK * (first + (job.count - 1) * most)
            seen.update(blocks)

    def forget(self) -> None:
        """New weights: the cache is empty."""
        self._seen.clear()

    def take(self) -> tuple[int, int]:
        """(asked, possible) since the last call."""
        counted = (self.asked, self.possible)
        self.asked = self.possible = 0
        return counted


def _chained(ids: tuple[int, ...]) -> Iterator[int]:
    """A hash for every whole block and all before it, as the engine's cache names them: each token is read once."""
    before = 0
    for start in range(0, len(ids) - BLOCK + 1, BLOCK):
        before = hash((before, ids[start : start + BLOCK]))
        yield before
