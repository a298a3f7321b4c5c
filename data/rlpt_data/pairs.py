"""Documents -> pairs of context and continuation: one for every candidate cut, as a trainer sees it.

Both sides are whole characters: a window that would begin or end inside one is moved forward to the
next token that begins with a character, so that ids and text of a side are always the same bytes.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from jaxtyping import Bool

from rlpt_data.shards import CUT_KINDS, Document


@dataclass(frozen=True)
class Limits:
    """Which cuts become pairs and how much of each side is kept, in tokens."""

    min_context: int = 1
    max_context: int | None = None
    """Of the context the last so many; None: all of it, from the start of the document."""
    horizon: int | None = None
    """Of the continuation the first so many, and cuts with fewer after them are left out; None: all
    of it, to the end of the document."""


@dataclass(frozen=True)
class Pair:
    """context = tokens [start, cut), continuation = tokens [cut, stop)."""

    start: int
    cut: int
    stop: int
    kind: str
    """One of CUT_KINDS."""


def pairs_of(document: Document, limits: Limits) -> Iterator[Pair]:
    """A pair for every cut with enough on both sides, in order."""
    edges = np.flatnonzero(begins_character(document))
    for cut, kind in zip(document.cuts.tolist(), document.cut_kinds.tolist(), strict=True):
        start = 0 if limits.max_context is None else max(0, cut - limits.max_context)
        stop = document.num_tokens if limits.horizon is None else cut + limits.horizon
        if cut < limits.min_context or stop > document.num_tokens:
            continue
        first, middle, last = edges[np.searchsorted(edges, (start, cut, stop))].tolist()
        if middle == cut:  # a source may supply a cut inside a character
            yield Pair(first, cut, last, CUT_KINDS[kind])


def begins_character(document: Document) -> Bool[np.ndarray, " edges"]:
    """Of every token whether it begins with a character; the end of the text counts as one."""
    data = np.frombuffer(document.text.encode(), np.uint8)
    inside = (data[document.offsets[:-1]] & 0xC0) == 0x80
    return np.append(~inside, True)


def pieces(document: Document, start: int, stop: int) -> list[str]:
    """The tokens [start, stop) as text; those that share a character are one piece."""
    edges = start + np.flatnonzero(begins_character(document)[start : stop + 1])
    places = document.offsets[edges].tolist()
    data = document.text.encode()
    return [data[a:b].decode() for a, b in pairwise(places)]
