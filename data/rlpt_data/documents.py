"""What every source yields: a document, or the reason why there is none.

Positions in a source document are byte offsets into ``text.encode("utf-8")``; token positions exist
only after the tokenizer, in ``rlpt_data.shards``.
"""

from dataclasses import dataclass

MAX_TEXT = 16 << 20
"""A longer text is no document, in bytes: a token takes up to 300 bytes of memory while it is made."""
MAX_NAME = 8 << 10
"""The same for what is said of a text, in characters: it is repeated in tables."""


@dataclass(frozen=True)
class SourceThought:
    """A thought that came with the corpus, written at ``cut``."""

    cut: int
    """Byte offset in the document's text where the thought belongs."""
    text: str
    source: str
    """Who wrote it: free text, kept in the shard."""


@dataclass(frozen=True)
class SourceDocument:
    """One text, with what its source knows about it."""

    text: str
    url: str | None = None
    domain: str | None = None
    """The unit that must not straddle train and test; None: the host of ``url``."""
    split: str | None = None
    """train, dev or test when the source decides; None: hashed."""
    language: str | None = None
    """As the source calls it; None: it does not say."""
    cuts: tuple[int, ...] = ()
    """Byte offsets; when given they are the only candidates."""
    thoughts: tuple[SourceThought, ...] = ()
    target_spans: tuple[tuple[int, int], ...] | None = None
    """Byte spans [start, stop) the next-token stage trains on; None: every token."""


@dataclass(frozen=True)
class Drop:
    """Something that could not become a document. Counted and sampled, never silent."""

    reason: str
    """Short and stable: it names a file, ``dropped/<reason>.jsonl``."""
    where: str
    """File and line, or the URL."""
    detail: str
    """What was wrong, or the start of the text."""


def too_large(document: SourceDocument) -> str:
    """What of a document is longer than anything may be; "" where nothing is."""
    names = {"URL": document.url, "domain": document.domain, "language": document.language}
    said = [(name, len(it or "")) for name, it in names.items()]
    found = [f"a {name} of {size} characters" for name, size in said if size > MAX_NAME]
    # No character has more than four bytes.
    if 4 * len(document.text) > MAX_TEXT:
        size = len(document.text.encode(errors="surrogatepass"))
        found += [f"a text of {size} bytes"] if size > MAX_TEXT else []
    return ", ".join(found)
