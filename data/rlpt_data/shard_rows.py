"""The row of a shard: one document, and what must hold of it before anybody uses its positions."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, UInt8, UInt32

CUT_KINDS = ("supplied", "sentence", "paragraph", "random", "every", "annotated")


@dataclass(frozen=True, eq=False)
class Thought:
    """A thought from the corpus, at token position ``cut``; its markers are not in ``ids``."""

    cut: int
    ids: UInt32[np.ndarray, " L"]
    source: str


@dataclass(frozen=True, eq=False)
class Document:
    """One row. Arrays are read-only views of the mapped file."""

    document_id: str
    """blake2b-128 of the text's bytes, hex."""
    url: str | None
    domain: str
    """"" when unknown."""
    text: str
    ids: UInt32[np.ndarray, " T"]
    offsets: UInt32[np.ndarray, " T+1"]
    """Byte offset of each token's start in the UTF-8 text, and its total length."""
    cuts: UInt32[np.ndarray, " K"]
    """Token positions, increasing: context = ids[:t]."""
    cut_kinds: UInt8[np.ndarray, " K"]
    """Index into CUT_KINDS, one for each cut."""
    thoughts: tuple[Thought, ...] = ()
    target_spans: tuple[tuple[int, int], ...] | None = None
    """Token spans [start, stop) the next-token stage trains on; None: every token."""
    cut_entropy: Float32[np.ndarray, " K"] | None = None
    """Nats, of annotated cuts: the proxy's, over the horizon of the query; None: of other cuts."""

    @property
    def num_tokens(self) -> int:
        return len(self.ids)


def misplaced(document: Document, vocab_size: int | None) -> list[str]:
    """What points outside the document or the vocabulary (None: unknown), in words: cheap, for every row read."""
    num, offsets, cuts = document.num_tokens, document.offsets, document.cuts
    kinds, spans = document.cut_kinds, document.target_spans or ()
    edges = [edge for span in spans for edge in span]
    rules = {
        "it has no tokens": num > 0,
        "an id lies outside the vocabulary": vocab_size is None
        or all(_most(ids) < vocab_size for ids in (document.ids, *_ids_of(document.thoughts))),
        "offsets do not run from 0 to the text's length": len(offsets) == num + 1
        and offsets[0] == 0
        and offsets[-1] == len(document.text.encode())
        and bool((offsets[1:] > offsets[:-1]).all()),
        "cuts do not increase inside the document": not len(cuts)
        or (cuts[0] > 0 and cuts[-1] < num and bool((cuts[1:] > cuts[:-1]).all())),
        "cut kinds do not match the cuts": len(kinds) == len(cuts)
        and _most(kinds) < len(CUT_KINDS),
        "a thought lies outside the document": all(0 < t.cut < num for t in document.thoughts),
        "target spans overlap or lie outside": edges == sorted(edges)
        and (not edges or edges[-1] <= num),
    }
    return [rule for rule, holds in rules.items() if not holds]


def _ids_of(thoughts: tuple[Thought, ...]) -> list[np.ndarray]:
    return [thought.ids for thought in thoughts]


def _most(values: np.ndarray) -> int:
    return int(values.max()) if len(values) else -1
