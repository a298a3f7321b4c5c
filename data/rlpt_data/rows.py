"""A source document and its ids -> the row of a shard: bytes become token positions."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt8, UInt32

from rlpt_data.cuts import CutsConfig, candidates, token_positions
from rlpt_data.documents import Drop, SourceDocument
from rlpt_data.filters import drop, where
from rlpt_data.places import word_ends
from rlpt_data.shards import CUT_KINDS, Document, Thought
from rlpt_data.split import domain_of
from rlpt_data.strict import UserError
from rlpt_data.tokenizer import PlainTokenizer

NO_LIMIT = 1 << 31
"""Of the number of cuts."""
WINDOW = 256
"""Tokens that are encoded again to see whether a cut between letters changes them, at most."""
WINDOWS = 4096
"""So many of them at once."""


@dataclass(frozen=True)
class RowMaker:
    """Turns documents into rows; every document it refuses is a drop with a reason."""

    tokenizer: PlainTokenizer
    cuts: CutsConfig
    seed: int

    def rows(
        self,
        batch: Sequence[tuple[str, SourceDocument]],
        limits: Sequence[int] | None = None,
    ) -> list[Document | Drop]:
        """(document id, document) pairs -> rows or drops, in the same order.

        ``limits``: how many cuts each document may have; one with none is a drop.
        """
        encoded = self.tokenizer.encode([document.text for _, document in batch])
        limits = [NO_LIMIT] * len(batch) if limits is None else limits
        return [
            self._row(key, document, ids, limit)
            for (key, document), ids, limit in zip(batch, encoded, limits, strict=True)
        ]

    def _row(
        self, key: str, document: SourceDocument, ids: UInt32[np.ndarray, " T"], limit: int
    ) -> Document | Drop:
        text = document.text.encode()
        if limit == 0:
            return drop(document, "domain_cap")
        if self.tokenizer.decode(ids) != text:
            return drop(document, "not_lossless")
        if not document.cuts and len(ids) < self.cuts.min_context + self.cuts.min_continuation:
            return drop(document, "too_short")
        offsets = self.tokenizer.offsets(ids)
        found = self._cuts(key, document, text, ids, offsets, limit)
        if isinstance(found, Drop):
            return found
        thoughts = self._thoughts(document, text, offsets)
        if isinstance(thoughts, Drop):
            return thoughts
        spans = _spans(document, text, offsets)
        if isinstance(spans, Drop):
            return spans
        return Document(
            document_id=key,
            url=document.url,
            domain=domain_of(document),
            text=document.text,
            ids=ids,
            offsets=offsets,
            cuts=found[0],
            cut_kinds=found[1],
            thoughts=thoughts,
            target_spans=spans,
        )

    def _cuts(
        self,
        key: str,
        document: SourceDocument,
        text: bytes,
        ids: np.ndarray,
        offsets: np.ndarray,
        limit: int,
    ) -> tuple[UInt32[np.ndarray, " K"], UInt8[np.ndarray, " K"]] | Drop:
        if not document.cuts:
            stable = functools.partial(self._stable, text, ids, offsets)
            found = candidates(text, offsets, key, self.cuts, self.seed, limit, stable)
            return found if len(found[0]) else drop(document, "no_cut")
        places = sorted(set(document.cuts))
        _check_inside(document, "cut", places, len(text))
        at = token_positions(places, offsets)
        if at is None:
            return drop(document, "cut_inside_token", f"cuts at bytes {places[:20]}")
        kind = CUT_KINDS.index("supplied")
        return np.array(at, np.uint32), np.full(len(at), kind, np.uint8)

    def _stable(
        self, text: bytes, ids: np.ndarray, offsets: np.ndarray, cuts: list[int]
    ) -> list[bool]:
        """Whether the end of each context is encoded to the document's own ids."""
        pairs = list(zip(_window_starts(text, offsets, cuts), cuts, strict=True))
        held: list[bool] = []
        # A part of them at a time: each is a window of text and its ids.
        for at in range(0, len(pairs), WINDOWS):
            part = pairs[at : at + WINDOWS]
            ends = [text[offsets[start] : offsets[cut]].decode() for start, cut in part]
            found = zip(part, self.tokenizer.encode(ends), strict=True)
            held += [np.array_equal(ids[start:cut], alone) for (start, cut), alone in found]
        return held

    def _thoughts(
        self, document: SourceDocument, text: bytes, offsets: np.ndarray
    ) -> tuple[Thought, ...] | Drop:
        if not document.thoughts:
            return ()
        places = [thought.cut for thought in document.thoughts]
        _check_inside(document, "thought", places, len(text))
        at = token_positions(places, offsets)
        if at is None:
            return drop(document, "cut_inside_token", f"thoughts at bytes {places[:20]}")
        ids = self.tokenizer.encode([thought.text for thought in document.thoughts])
        rows = zip(at, ids, document.thoughts, strict=True)
        return tuple(Thought(cut, piece, thought.source) for cut, piece, thought in rows)


def _window_starts(text: bytes, offsets: np.ndarray, cuts: Sequence[int]) -> list[int]:
    """For each cut a token before it: at the last whitespace, or about ``WINDOW`` tokens back."""
    begins = np.frombuffer(text, np.uint8)[offsets[:-1]] & 0xC0 != 0x80
    whole = np.flatnonzero(begins)  # tokens that do not begin inside a character
    far = whole[np.searchsorted(whole, np.maximum(0, np.array(cuts) - WINDOW))]
    words = word_ends(text)
    at = np.searchsorted(offsets, words)
    spaces = np.append(0, at[offsets[at] == words])
    return np.maximum(far, spaces[np.searchsorted(spaces, cuts) - 1]).tolist()


def _spans(
    document: SourceDocument, text: bytes, offsets: np.ndarray
) -> tuple[tuple[int, int], ...] | Drop | None:
    if document.target_spans is None:
        return None
    edges = [edge for span in document.target_spans for edge in span]
    increasing = all(start < stop for start, stop in document.target_spans)
    if not increasing or edges != sorted(edges) or (edges and not 0 <= edges[0] <= edges[-1]):
        raise UserError(
            f"{where(document)}: target_spans {document.target_spans} overlap; sort them"
        )
    if edges and edges[-1] > len(text):
        _too_far(document, "target span", edges[-1], len(text))
    at = token_positions(edges, offsets)
    if at is None:
        return drop(document, "span_inside_token", f"spans {document.target_spans[:20]}")
    return tuple(zip(at[::2], at[1::2], strict=True))


def _check_inside(
    document: SourceDocument, what: str, places: Sequence[int], num_bytes: int
) -> None:
    for place in places:
        if not 0 < place < num_bytes:
            _too_far(document, what, place, num_bytes)


def _too_far(document: SourceDocument, what: str, place: int, num_bytes: int) -> None:
    raise UserError(
        f"{where(document)}: {what} at byte {place} of a document with {num_bytes}; "
        "correct the source"
    )
