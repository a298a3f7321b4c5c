"""Which documents repeat others, over the whole corpus. Who survives depends on contents alone.

Of equal texts the document whose source sorts first stays; of similar ones (MinHash) the one whose
text has the least hash. Files, units, workers and their order have no part in it.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Literal

import numpy as np
from pydantic import Field

from rlpt_data.documents import SourceDocument
from rlpt_data.filters import drop
from rlpt_data.minhash import clusters, signature
from rlpt_data.store import Store, padded
from rlpt_data.strict import Strict
from rlpt_data.tally import NUM_SAMPLES, Tally

EXACT, NEAR = "duplicates", "near-duplicates"
AGAIN = "duplicates-again"
"""Texts that later stages have made equal."""


class NearDuplicatesConfig(Strict):
    """Drop all but one of every group of similar documents."""

    kind: Literal["near-duplicates"]
    bands: int = Field(default=14, ge=1)
    """More bands find less similar pairs."""
    rows: int = Field(default=8, ge=1)
    """More rows a band tell better apart; 14 x 8 finds 92% of pairs with similarity 0.8, 56% with
    0.7 and 5% with 0.5."""
    words: int = Field(default=5, ge=1)
    """Length of the word n-grams that are compared."""

    def signature(self, text: str) -> np.ndarray:
        """One hash for each band."""
        return signature(text, self.bands, self.rows, self.words)


def survivors(
    stores: Sequence[Store],
    near: NearDuplicatesConfig | None,
    tally: Tally,
    stage: str = EXACT,
) -> list[np.ndarray]:
    """For every store the rows that stay, increasing; equal texts are counted under ``stage``."""
    index = np.concatenate([store.index["id"] for store in stores])
    starts = np.cumsum([0, *(len(store) for store in stores)])
    order = np.argsort(index, kind="stable")
    keys = index[order]
    kept = np.array(list(_first_of_equals(stores, starts, order, keys)), np.int64)
    tell(tally, stage, "duplicate", stores, starts, order, np.setdiff1d(order, kept), {})
    if near is not None:
        # In the order of their ids, so that the least number is the least id.
        kept = kept[np.argsort(index[kept], kind="stable")]
        label = clusters(_bands(stores, kept, near.bands), len(kept))
        own = label == np.arange(len(kept))
        of = {
            int(row): padded(bytes(index[kept[lead]])).hex()
            for row, lead in zip(kept, label, strict=True)
        }
        tell(tally, NEAR, "near_duplicate", stores, starts, kept, kept[~own], of)
        kept = kept[own]
    kept = np.sort(kept)
    return [
        kept[(kept >= start) & (kept < stop)] - start for start, stop in pairwise(starts.tolist())
    ]


def _first_of_equals(
    stores: Sequence[Store], starts: np.ndarray, order: np.ndarray, keys: np.ndarray
) -> Iterator[int]:
    edges = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1], [True]]))
    for start, stop in pairwise(edges.tolist()):
        rows = order[start:stop].tolist()
        if len(rows) == 1:
            yield rows[0]
        else:
            yield min(rows, key=lambda row: preference(_document(stores, starts, row)))


def _bands(stores: Sequence[Store], kept: np.ndarray, count: int) -> Iterator[np.ndarray]:
    """The bands of all kept documents, one in memory at a time."""
    for band in range(count):
        yield np.concatenate([_column(store, band) for store in stores])[kept]


def _column(store: Store, band: int) -> np.ndarray:
    found = store.signatures()
    return np.zeros(0, np.uint64) if found is None else np.array(found[:, band])


def tell(
    tally: Tally,
    stage: str,
    reason: str,
    stores: Sequence[Store],
    starts: np.ndarray,
    entered: np.ndarray,
    dropped: np.ndarray,
    of: dict[int, str],
) -> None:
    """Count everything; the samples are those with the least ids, which is a fair draw."""
    tally.enter(stage, len(entered))
    ids = np.concatenate([store.index["id"] for store in stores])[dropped]
    chosen = dropped[np.argsort(ids, kind="stable")[:NUM_SAMPLES]]
    for row in chosen.tolist():
        document = _document(stores, starts, row)
        detail = f"of document {of[row]}" if row in of else ""
        tally.drop(stage, drop(document, reason, detail))
    tally.count(stage, reason, len(dropped) - len(chosen))


def _document(stores: Sequence[Store], starts: np.ndarray, row: int) -> SourceDocument:
    number = int(np.searchsorted(starts, row, side="right")) - 1
    return stores[number][int(row - starts[number])]


def preference(document: SourceDocument) -> tuple[str, ...]:
    """Of equal texts the one that sorts first stays."""
    annotations = repr((document.cuts, document.thoughts, document.target_spans))
    return (document.url or "\U0010ffff", document.domain or "", document.split or "", annotations)
