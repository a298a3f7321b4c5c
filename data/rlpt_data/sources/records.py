"""A table's row -> a document. Shared by every source whose rows have named fields."""

from collections.abc import Mapping
from typing import Any, ClassVar

from rlpt_data.documents import Drop, SourceDocument
from rlpt_data.manifest import SPLITS
from rlpt_data.strict import Grown


class Fields(Grown):
    """Which field of a row holds what."""

    LATER: ClassVar[tuple[str, ...]] = ("language",)
    text: str = "text"
    url: str | None = "url"
    """Absent from a row: the document has no URL."""
    domain: str | None = None
    """None: the host of the URL."""
    split: str | None = None
    """Holds train, dev or test; None: the split is hashed."""
    language: str | None = None
    """Holds the language, which the stage `language` then takes at its word; None: it detects."""

    def names(self) -> list[str]:
        named = (self.text, self.url, self.domain, self.split, self.language)
        return [name for name in named if name]


def document(row: Any, fields: Fields, where: str) -> SourceDocument | Drop:
    """One row as a document, or why not."""
    if not isinstance(row, Mapping):
        return Drop("not_an_object", where, str(row)[:200])
    text = row.get(fields.text)
    if not isinstance(text, str):
        found = f"{fields.text} = {text!r}; fields: {', '.join(map(str, row))}"
        return Drop("no_text", where, found[:200])
    split = _string(row, fields.split)
    if fields.split and split not in SPLITS:
        return Drop("unknown_split", where, f"{fields.split} = {split!r}")
    return SourceDocument(
        text,
        url=_string(row, fields.url),
        domain=_string(row, fields.domain),
        split=split,
        language=_string(row, fields.language),
    )


def _string(row: Mapping[str, Any], name: str | None) -> str | None:
    value = row.get(name) if name else None
    return None if value is None else str(value)
