"""What a datasheet shows of the text itself: cuts with both of their sides, and documents that stayed."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from rlpt_data.datasheet.figures import present
from rlpt_data.pairs import Limits, Pair, pairs_of, pieces
from rlpt_data.shards import Document, ShardFolder

CUTS_PER_KIND = 3
SEARCHED = 500
"""Documents of a split among which samples of every kind of cut are looked for."""
LIMITS = Limits(max_context=120)
CONTINUATION_TOKENS = 60
KEPT_PER_SPLIT = 3
KEPT_CHARACTERS = 600


@dataclass(frozen=True)
class CutSample:
    """A cut with the text on both sides, a piece a token."""

    split: str
    kind: str
    where: str
    byte: int
    tokens_before: int
    tokens_after: int
    context: list[str]
    continuation: list[str]
    begins: bool
    """The context shown is all there is before the cut."""
    ends: bool


@dataclass(frozen=True)
class Kept:
    """The start of a document that is in the shards."""

    split: str
    where: str
    tokens: int
    cuts: int
    text: str
    whole: bool


def cuts(folder: ShardFolder) -> list[CutSample]:
    """A few cuts of every kind, each in another document; the same ones every time."""
    found: dict[str, list[CutSample]] = {}
    for split in present(folder):
        for document in islice(split, SEARCHED):
            sides = list(pairs_of(document, LIMITS))
            for kind in sorted({pair.kind for pair in sides}):
                those = [pair for pair in sides if pair.kind == kind]
                if len(found.setdefault(kind, [])) < CUTS_PER_KIND:
                    found[kind].append(_sample(split.name, document, those[len(those) // 2]))
                    break
    return [sample for kind in sorted(found) for sample in found[kind]]


def _sample(split: str, document: Document, pair: Pair) -> CutSample:
    stop = min(pair.stop, pair.cut + CONTINUATION_TOKENS)
    return CutSample(
        split=split,
        kind=pair.kind,
        where=where(document),
        byte=int(document.offsets[pair.cut]),
        tokens_before=pair.cut,
        tokens_after=document.num_tokens - pair.cut,
        context=pieces(document, pair.start, pair.cut),
        continuation=pieces(document, pair.cut, stop),
        begins=pair.start == 0,
        ends=stop == document.num_tokens,
    )


def kept(folder: ShardFolder) -> list[Kept]:
    """The first documents of every split; their order is random."""
    return list(_kept(folder))


def _kept(folder: ShardFolder) -> Iterator[Kept]:
    for split in present(folder):
        for document in islice(split, KEPT_PER_SPLIT):
            text = document.text[:KEPT_CHARACTERS]
            whole = len(text) == len(document.text)
            counts = (document.num_tokens, len(document.cuts))
            yield Kept(split.name, where(document), *counts, text, whole)


def where(document: Document) -> str:
    """How a person finds it again."""
    return document.url or document.document_id
