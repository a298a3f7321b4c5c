"""Which documents stay: a visible list of stages, each of which counts what it takes out.

A stage maps one document to itself, to a changed one, or to a ``Drop``. What needs to see the whole
corpus (duplicates) is no stage of this kind and stands between two lists of them.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from rlpt_data.documents import Drop, SourceDocument, too_large
from rlpt_data.store import text_id
from rlpt_data.tally import Tally

READ, EXTRACT = "read", "extract"
_EXTRACTION = ("extract_", "nothing_extracted")


@dataclass(frozen=True)
class Stage:
    """One entry of the list."""

    name: str
    apply: Callable[[SourceDocument], SourceDocument | Drop]


def where(document: SourceDocument) -> str:
    """How a person finds it again: its URL, else its id."""
    return document.url or text_id(document.text).hex()


def drop(document: SourceDocument, reason: str, detail: str = "") -> Drop:
    return Drop(reason, where(document), detail or document.text[:160])


def valid_unicode(document: SourceDocument) -> SourceDocument | Drop:
    """A lone surrogate (JSON can spell one) has no UTF-8 bytes, in a text or in what is said of it."""
    said = (document.url, document.domain, document.language)
    try:
        "".join(filter(None, (document.text, *said))).encode()
    except UnicodeEncodeError as error:
        return drop(document, "not_unicode", str(error))
    return document


def not_empty(document: SourceDocument) -> SourceDocument | Drop:
    return document if document.text.strip() else drop(document, "empty")


ALWAYS = (Stage("unicode", valid_unicode), Stage("empty", not_empty))
"""What no shard can do without."""


def admitted(
    items: Iterable[SourceDocument | Drop], stages: Sequence[Stage], tally: Tally
) -> Iterator[SourceDocument]:
    """What passes every stage; what does not is counted in ``tally``."""
    for item in items:
        tally.enter(READ)
        if isinstance(item, Drop) and not item.reason.startswith(_EXTRACTION):
            tally.drop(READ, item)
            continue
        if isinstance(item, SourceDocument) and (detail := too_large(item)):
            tally.drop(READ, Drop("too_large", (item.url or "")[:80], detail))
            continue
        tally.enter(EXTRACT)
        if isinstance(item, Drop):
            tally.drop(EXTRACT, item)
        else:
            yield from passed(item, stages, tally)


def passed(
    document: SourceDocument, stages: Sequence[Stage], tally: Tally
) -> Iterator[SourceDocument]:
    """The document, if every stage lets it through."""
    for stage in stages:
        tally.enter(stage.name)
        item = stage.apply(document)
        if isinstance(item, Drop):
            tally.drop(stage.name, item)
            return
        document = item
    yield document
