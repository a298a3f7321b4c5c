"""Pages of web archives, through an extractor named in the configuration.

Archives are read member by member, and what is damaged is a drop with file and offset; the text of
a page comes from the sandbox. Text records (WET) need no extractor.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field

from rlpt_data.documents import Drop, SourceDocument
from rlpt_data.extraction.sandbox import LimitsConfig, Sandbox
from rlpt_data.provenance import Source
from rlpt_data.sources import files
from rlpt_data.sources.http_payload import (
    PayloadError,
    Response,
    dechunked,
    decompressed,
    response,
    text_of_bytes,
)
from rlpt_data.sources.units import Unit, of_files
from rlpt_data.sources.warc_records import Record, broken_digest, records

SUFFIXES = (".warc", ".warc.gz", ".wet", ".wet.gz")
_HTML = ("html",)


class WarcConfig(Source):
    kind: Literal["warc"]
    path: Path
    """A file, or a folder of .warc, .warc.gz, .wet and .wet.gz files."""
    extractor: str = "plain"
    """trafilatura (best text), resiliparse (ten times faster), plain (keeps menus; needs nothing
    installed), or module:function, from the HTML of a page to its text."""
    limits: LimitsConfig = LimitsConfig()
    chunk_bytes: int | None = Field(default=None, ge=1 << 16)
    """Share a .gz file among workers in ranges of this many bytes; None: one worker a file."""


@dataclass(frozen=True)
class Page:
    """One HTML page of an archive, decoded and not yet extracted."""

    where: str
    url: str | None
    html: str


def documents(config: WarcConfig) -> Iterator[SourceDocument | Drop]:
    """The text of every page. Raises UserError when the extractor cannot be used."""
    for unit in units(config):
        yield from read(config, unit)


def units(config: WarcConfig) -> list[Unit]:
    """One for every archive; ``chunk_bytes`` divides compressed ones further."""
    paths = files.input_files(config.path, SUFFIXES)
    whole = [path for path in paths if path.suffix != ".gz"]
    parts = [path for path in paths if path.suffix == ".gz"]
    found = of_files(config.path, whole) + of_files(config.path, parts, config.chunk_bytes)
    return sorted(found, key=lambda unit: (str(unit.path), unit.start))


def read(config: WarcConfig, unit: Unit) -> Iterator[SourceDocument | Drop]:
    """The pages of the records that begin in a unit."""
    assert unit.path is not None
    found = pages(unit.path, config.limits.page_bytes, unit.start, unit.stop)
    yield from extracted(found, config)


def fingerprint(config: WarcConfig) -> str:
    return files.fingerprint(files.input_files(config.path, SUFFIXES))


def extracted(
    items: Iterator[Page | SourceDocument | Drop], config: WarcConfig
) -> Iterator[SourceDocument | Drop]:
    """Pages through the sandbox; documents and drops as they are."""
    with Sandbox(config.extractor, config.limits) as sandbox:
        for item in items:
            if not isinstance(item, Page):
                yield item
                continue
            outcome = sandbox.extract(item.html)
            if outcome.reason:
                detail = f"{item.url} {outcome.detail}".rstrip()
                yield Drop(outcome.reason, item.where, detail)
            else:
                yield SourceDocument(outcome.text, url=item.url)


def pages(
    path: Path, max_bytes: int, start: int = 0, stop: int | None = None
) -> Iterator[Page | SourceDocument | Drop]:
    """HTML pages of the records that begin in [start, stop); of WET files their texts."""
    for record in records(path, max_bytes, start, stop):
        if isinstance(record, Drop):
            yield record
        elif record.kind == "response":
            yield _page(record, max_bytes)
        elif record.kind == "conversion":
            text = record.block.decode("utf-8", errors="replace")
            yield SourceDocument(text, url=record.url)
        elif record.kind == "revisit":
            yield Drop("revisit", record.where, f"{record.url}: the page is in another archive")


def _page(record: Record, max_bytes: int) -> Page | Drop:
    try:
        found = response(record.block)
        if reason := _refused(found):
            return Drop(reason, record.where, f"{record.url} {found.status} {found.content_type}")
        body = _body(record, found)
        body = decompressed(body, found.headers.get("content-encoding", ""), max_bytes)
    except PayloadError as error:
        return Drop("bad_payload", record.where, f"{record.url}: {error}")
    return Page(record.where, record.url, text_of_bytes(body, found.content_type))


def _refused(found: Response) -> str:
    if found.status != 200:
        return "http_status"
    return "" if any(name in found.content_type.lower() for name in _HTML) else "not_html"


def _body(record: Record, found: Response) -> bytes:
    """The body without transfer coding. Raises PayloadError when neither form has its digest.

    Some crawlers take the payload's digest before they undo the transfer coding, some after.
    """
    chunked = "chunked" in found.headers.get("transfer-encoding", "").lower()
    stated = record.headers.get("warc-payload-digest")
    raw_broken = broken_digest(stated, found.body)
    if not chunked:
        if raw_broken:
            raise PayloadError(f"payload {raw_broken}")
        return found.body
    body = dechunked(found.body)
    if raw_broken and (broken := broken_digest(stated, body)):
        raise PayloadError(f"payload {broken}")
    return body
