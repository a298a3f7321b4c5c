"""Where every document goes: its side, its place in the one global shuffle, its shard.

All from hashes of contents, so that files, units and workers have no part in it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Int64

from rlpt_data.documents import SourceDocument
from rlpt_data.manifest import SPLITS, digest
from rlpt_data.rows import NO_LIMIT
from rlpt_data.split import SplitConfig, check_sides, unit_of
from rlpt_data.store import Store, padded

DISK_BYTES = 4
"""On disk a byte of text takes about so many: itself, its ids and its offsets."""


@dataclass(frozen=True)
class Order:
    """The documents of one side, in their final order."""

    split: str
    places: np.ndarray
    """(documents, 2): the number of the store, the row in it."""
    text_bytes: np.ndarray
    limits: np.ndarray
    """Cuts that each document may have."""

    def documents(self, stores: Sequence[Store]) -> Iterator[SourceDocument]:
        return (stores[number][row] for number, row in self.places.tolist())

    def save(self, folder: Path) -> Path:
        """(documents, 3): store, row, limit of cuts."""
        path = folder / f"order-{self.split}.npy"
        np.save(path, np.column_stack([self.places, self.limits]))
        return path

    def shards(self, shard_bytes: int, num_shards: int | None) -> list[tuple[int, int]]:
        """[start, stop) of every shard: consecutive documents, about equal in bytes."""
        ends = np.cumsum(self.text_bytes, dtype=np.int64)
        total = int(ends[-1]) if len(ends) else 0
        count = num_shards or -(-total * DISK_BYTES // shard_bytes)
        # A shard begins with the document that holds its share's first byte.
        number = (ends - self.text_bytes) * max(1, count) // max(1, total)
        edges = np.flatnonzero(np.diff(number, prepend=-1, append=count))
        return list(pairwise(edges.tolist()))


def ordered(
    stores: Sequence[Store],
    kept: Sequence[np.ndarray],
    config: SplitConfig,
    seed: int,
    per_domain: int | None = None,
) -> tuple[list[Order], Literal["domain", "document", "source"]]:
    """The order of every side, and the unit of the split.

    Raises UserError when a side that was asked for is empty.
    """
    index = np.concatenate([store.index[rows] for store, rows in zip(stores, kept, strict=True)])
    numbers = np.repeat(np.arange(len(stores)), [len(rows) for rows in kept])
    places = np.stack([numbers, np.concatenate(kept)], axis=1)
    unit = unit_of(np.unique(index["domain"], return_counts=True)[1].tolist(), config)
    sides = index["by_domain" if unit == "domain" else "by_document"]
    counted = np.bincount(sides, minlength=len(SPLITS)).tolist()
    sizes: dict[str, int] = dict(zip(SPLITS, counted, strict=True))
    check_sides(sizes, config, "source" if index["given"].all() else unit)
    ranks = np.array([rank(seed, padded(key).hex()) for key in index["id"]], "S32")
    limits = domain_limits(index["domain"], ranks, per_domain)
    found = []
    for number, split in enumerate(SPLITS):
        here = np.flatnonzero(sides == number)
        here = here[np.argsort(ranks[here], kind="stable")]
        sizes_here = index["text_bytes"][here].astype(np.int64)
        found.append(Order(split, places[here], sizes_here, limits[here]))
    return found, "source" if index["given"].all() else unit


def domain_limits(
    domains: np.ndarray, ranks: np.ndarray, per_domain: int | None
) -> Int64[np.ndarray, " N"]:
    """How many cuts each document may have so that its domain has ``per_domain``.

    A domain's documents, by rank, get equal shares, the first of them one more; documents whose
    domain is unknown are not limited.
    """
    if per_domain is None:
        return np.full(len(domains), NO_LIMIT, np.int64)
    order = np.lexsort((ranks, domains))
    _, starts, counts = np.unique(domains[order], return_index=True, return_counts=True)
    place = np.arange(len(order)) - np.repeat(starts, counts)
    share, rest = np.divmod(per_domain, np.repeat(counts, counts))
    limits = np.empty(len(order), np.int64)
    limits[order] = share + (place < rest)
    limits[domains == 0] = NO_LIMIT
    return limits


def rank(seed: int, key: str) -> str:
    """Documents are sorted by it; ``key`` is the document's id."""
    return digest(f"order/{seed}/{key}".encode())
