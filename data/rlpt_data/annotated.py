"""A split whose cuts are the answer to a query over annotations: same documents, other cuts.

Nothing is written: a band of entropies, a tier of difficulty, or "hard but inferable" is a choice at
training time. Documents without a selected position have no cuts.
"""

import functools
from dataclasses import replace

import numpy as np
from jaxtyping import Int64

from rlpt_data import annotations
from rlpt_data.annotations import Annotation
from rlpt_data.cuts import CutsConfig, word_cuts
from rlpt_data.queries import AnnotatedCuts
from rlpt_data.shards import CUT_KINDS, Document, ShardFolder, Split
from rlpt_data.strict import UserError

KIND = CUT_KINDS.index("annotated")


class AnnotatedSplit(Split):
    """As ``Split``, with the cuts that a query selects."""

    def __init__(self, folder: ShardFolder, name: str, query: AnnotatedCuts) -> None:
        entries = [e for e in folder.manifest.files if e.path.startswith(f"{name}/")]
        paths = [folder.local(entry.path) for entry in entries]
        super().__init__(name, paths, folder.manifest.vocab_size)
        found, facts = annotations.find(folder.path, query.proxy, folder.shard_files())
        annotations.check(found, facts)
        self._query = query
        rows = [row for e in entries for row in annotations.read(found / e.path)]
        self._check_same_documents(rows)
        self._cuts = self._selected(rows)
        self._entropies = [
            annotations.ahead(row.entropy, query.horizon)[cuts]
            for row, cuts in zip(rows, self._cuts, strict=True)
        ]
        if not sum(map(len, self._cuts)):
            raise UserError(
                f"{found}: the query selects no position of split {name}; widen its bounds"
            )

    def __getitem__(self, index: int) -> Document:
        cuts = self._cuts[index]
        kinds = np.full(len(cuts), KIND, np.uint8)
        return replace(
            super().__getitem__(index),
            cuts=cuts.astype(np.uint32),
            cut_kinds=kinds,
            cut_entropy=self._entropies[index],
        )

    @functools.cached_property
    def num_cuts(self) -> np.ndarray:
        """(documents,) int64."""
        return np.array([len(cuts) for cuts in self._cuts], np.int64)

    @functools.cached_property
    def flat_cuts(self) -> Int64[np.ndarray, " C"]:
        """The cuts of every document, one after the other."""
        return np.concatenate(self._cuts)

    @functools.cached_property
    def flat_cut_kinds(self) -> Int64[np.ndarray, " C"]:
        """All of them are `annotated`."""
        return np.full(len(self.flat_cuts), KIND, np.int64)

    def _check_same_documents(self, rows: list[Annotation]) -> None:
        same = [row.document_id for row in rows] == self.document_ids
        lengths = [len(row.loss) for row in rows]
        if not same or lengths != self.num_tokens.tolist():
            raise UserError(
                f"split {self.name}: its annotation is of other documents; "
                "run `rlpt data annotate` again"
            )

    def _selected(self, rows: list[Annotation]) -> list[np.ndarray]:
        query = self._query
        bounds = CutsConfig(
            min_context=query.min_context,
            min_continuation=max(query.min_continuation, query.horizon),
        )
        allowed = []
        for index in range(len(self)):
            document = super().__getitem__(index)
            allowed.append(word_cuts(document.text.encode(), document.offsets, bounds))
        tier = _tier(rows, allowed, query)
        pairs = zip(rows, allowed, strict=True)
        return [annotations.chosen(row, places, query, tier) for row, places in pairs]


def _tier(
    rows: list[Annotation], allowed: list[np.ndarray], query: AnnotatedCuts
) -> tuple[float, float] | None:
    """The bounds of the loss that belong to the quantiles."""
    if query.tier is None:
        return None
    pairs = zip(rows, allowed, strict=True)
    values = np.concatenate([annotations.ahead(r.loss, query.horizon)[at] for r, at in pairs])
    low, high = np.quantile(values[np.isfinite(values)], query.tier)
    return float(low), float(high)
