"""Which documents stay: a visible list of stages, each of which counts what it takes out.

A stage maps one document to itself or to a ``Drop``; drops of earlier stages pass through. Exact
duplicates need to see the whole corpus and come last. Quality filters, near-duplicates and
decontamination belong here.
"""

import heapq
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from rlpt_data.documents import Drop, SourceDocument
from rlpt_data.manifest import digest

Stage = Callable[[SourceDocument], SourceDocument | Drop]
NUM_SAMPLES = 20


def document_id(text: str) -> str:
    """blake2b-128 of the text's UTF-8 bytes."""
    return digest(text.encode())


def where(document: SourceDocument) -> str:
    return document.url or "(no url)"


def drop(document: SourceDocument, reason: str, detail: str = "") -> Drop:
    shown = document.text[:160].encode(errors="replace").decode()
    return Drop(reason, where(document), detail or shown)


def valid_unicode(document: SourceDocument) -> SourceDocument | Drop:
    """A lone surrogate (JSON can spell one) has no UTF-8 bytes."""
    try:
        document.text.encode()
    except UnicodeEncodeError as error:
        return drop(document, "not_unicode", str(error))
    return document


def not_empty(document: SourceDocument) -> SourceDocument | Drop:
    return document if document.text.strip() else drop(document, "empty")


STAGES: tuple[Stage, ...] = (valid_unicode, not_empty)


@dataclass
class Drops:
    """Counts by reason, and of each the samples that sort first: input order is no factor."""

    counts: Counter[str] = field(default_factory=Counter)
    _samples: dict[str, list[tuple[str, str]]] = field(default_factory=dict)

    def add(self, dropped: Drop) -> None:
        self.counts[dropped.reason] += 1
        kept = self._samples.get(dropped.reason, [])
        self._samples[dropped.reason] = heapq.nsmallest(
            NUM_SAMPLES, [*kept, (dropped.where, dropped.detail)]
        )

    def samples(self) -> dict[str, list[dict[str, str]]]:
        """reason -> [{where, detail}], sorted."""
        return {
            reason: [{"where": where, "detail": detail} for where, detail in rows]
            for reason, rows in self._samples.items()
        }


def admitted(
    items: Iterable[SourceDocument | Drop], drops: Drops, stages: tuple[Stage, ...] = STAGES
) -> Iterator[SourceDocument]:
    """What passes every stage; what does not is counted in ``drops``."""
    for item in items:
        for stage in stages:
            if isinstance(item, Drop):
                break
            item = stage(item)
        if isinstance(item, Drop):
            drops.add(item)
        else:
            yield item


def unique(documents: Iterable[SourceDocument], drops: Drops) -> dict[str, SourceDocument]:
    """document id -> document. Of equal texts the one that sorts first stays."""
    kept: dict[str, SourceDocument] = {}
    for document in documents:
        key = document_id(document.text)
        if key in kept:
            first, second = sorted((kept[key], document), key=_preference)
            drops.add(drop(second, "duplicate"))
            document = first
        kept[key] = document
    return kept


def _preference(document: SourceDocument) -> tuple[str, ...]:
    annotations = repr((document.cuts, document.thoughts, document.target_spans))
    return (document.url or "\U0010ffff", document.domain or "", document.split or "", annotations)
