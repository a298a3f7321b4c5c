"""Several sources in one folder of shards: who reads what, and how much of each stays.

Weights are shares of the bytes of text that come through the stages. The largest total is kept for
which no source would have to repeat; which documents of a source that is, a hash of their ids says,
so files, units, workers and the order of the sources have no part in it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from pydantic import Field

from rlpt_data import sources
from rlpt_data.duplicates import tell
from rlpt_data.manifest import digest
from rlpt_data.sources.units import Unit
from rlpt_data.store import Store, padded
from rlpt_data.strict import Strict, UserError
from rlpt_data.tally import Tally

STAGE, REASON = "mixture", "over_weight"


class WeightedSource(Strict):
    """One `[[sources]]` table."""

    name: str = Field(pattern=r"^[^/]+$")
    """In the manifest, and in the names of its units; without a slash, which ends it there."""
    weight: float = Field(gt=0, allow_inf_nan=False)
    """Its part of the bytes of text, relative to the other weights."""
    source: sources.SourceConfig


@dataclass(frozen=True)
class Part:
    """A unit of a source; the source's name is empty where it is the only one."""

    source: str
    config: sources.SourceConfig
    unit: Unit

    @property
    def name(self) -> str:
        """In the ledger."""
        return "/".join(filter(None, (self.source, self.unit.name)))

    @property
    def input(self) -> str:
        """The file it is of, or the corpus where the source has no files."""
        own = "corpus" if self.unit.path is None else self.unit.file
        return "/".join(filter(None, (self.source, own)))


def parts_of(
    config: sources.SourceConfig, name: str, max_documents: int | None = None
) -> list[Part]:
    """What workers can read apart from one another; one piece where only so many are read."""
    units = sources.units(config) if max_documents is None else [Unit("all")]
    return [Part(name, config, unit) for unit in units]


def thinned(
    stores: Sequence[Store],
    kept: Sequence[np.ndarray],
    owners: Sequence[str],
    weights: Mapping[str, float],
    seed: int,
    tally: Tally,
) -> list[np.ndarray]:
    """Of the ``kept`` rows of every store those that its source's weight leaves, increasing.

    ``owners`` names the source of every store. Raises UserError when a source has no documents.
    """
    numbers = np.repeat(np.arange(len(stores)), [len(rows) for rows in kept])
    rows = np.concatenate(kept)
    index = np.concatenate([store.index[each] for store, each in zip(stores, kept, strict=True)])
    sizes = index["text_bytes"].astype(np.int64)
    names = np.array(owners)[numbers]
    budgets = bytes_left({name: int(sizes[names == name].sum()) for name in weights}, weights)
    # Not the order of the shards: its front would be all that is left of a source.
    ranks = np.array([digest(f"mixture/{seed}/{padded(k).hex()}".encode()) for k in index["id"]])
    stays = np.zeros(len(rows), bool)
    for name, budget in budgets.items():
        own = np.flatnonzero(names == name)
        own = own[np.argsort(ranks[own], kind="stable")]
        stays[own] = np.cumsum(sizes[own]) <= budget
    starts = np.cumsum([0, *(len(store) for store in stores)])
    places = starts[numbers] + rows
    tell(tally, STAGE, REASON, stores, starts, places, places[~stays], {})
    return [rows[stays & (numbers == number)] for number in range(len(stores))]


def bytes_left(sizes: Mapping[str, int], weights: Mapping[str, float]) -> dict[str, int]:
    """How many bytes of each source stay: exactly its share of the largest total, rounded down.

    Weights count as the decimals they are written as. Raises UserError for a source without bytes.
    """
    for name, size in sizes.items():
        if not size:
            raise UserError(
                f"[[sources]] {name}: none of its documents came through the stages; give it text or "
                "leave it out"
            )
    parts = {name: Fraction(repr(weight)) for name, weight in weights.items()}
    unit = min(sizes[name] / part for name, part in parts.items())
    return {name: int(unit * part) for name, part in parts.items()}
