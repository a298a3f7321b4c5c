"""HTML responses of web archives, through an extractor named in the configuration.

Kept small on purpose: one reader, one extractor call. A record that is shorter than its header
says, or an archive that ends half way, is a counted drop.
"""

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from rlpt_data.documents import Drop, SourceDocument
from rlpt_data.sources import files
from rlpt_data.strict import Strict, UserError

SUFFIXES = (".warc", ".warc.gz")
Extractor = Callable[[str], str]


class WarcConfig(Strict):
    kind: Literal["warc"]
    path: Path
    """A file, or a folder of .warc and .warc.gz files."""
    extractor: str = "rlpt_data.sources.html_text:text_of"
    """module:function, from the HTML of a page to its text."""


def documents(config: WarcConfig) -> Iterator[SourceDocument | Drop]:
    """Raises UserError when warcio or the extractor cannot be imported."""
    extract = _extractor(config.extractor)
    for path in files.input_files(config.path, SUFFIXES):
        yield from _archive(path, extract)


def fingerprint(config: WarcConfig) -> str:
    return files.fingerprint(files.input_files(config.path, SUFFIXES))


def _extractor(name: str) -> Extractor:
    module, _, function = name.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"[source] extractor = {name}: {error}; give module:function") from error


def _archive(path: Path, extract: Extractor) -> Iterator[SourceDocument | Drop]:
    try:
        from warcio.archiveiterator import ArchiveIterator
        from warcio.exceptions import ArchiveLoadFailed
    except ImportError as error:
        raise UserError("[source] kind = warc needs warcio; pip install 'rlpt[data]'") from error
    number = 0
    with path.open("rb") as file:
        try:
            for number, record in enumerate(ArchiveIterator(file), 1):
                if record.rec_type == "response":
                    yield _page(record, extract, f"{path}:{number}")
        except (ArchiveLoadFailed, OSError, EOFError, ValueError) as error:
            yield Drop("damaged_file", f"{path}:{number}", f"{type(error).__name__}: {error}")


def _page(record: Any, extract: Extractor, where: str) -> SourceDocument | Drop:
    url = record.rec_headers.get_header("WARC-Target-URI")
    kind = (record.http_headers and record.http_headers.get_header("Content-Type")) or ""
    if "html" not in kind.lower():
        return Drop("not_html", where, f"{url} {kind}")
    payload = record.content_stream().read()
    if missing := getattr(record.raw_stream, "limit", 0):
        return Drop("short_record", where, f"{url}: {missing} bytes are missing")
    return SourceDocument(extract(_decode(payload, kind)), url=url)


def _decode(payload: bytes, content_type: str) -> str:
    """By the charset of the header, else UTF-8; undecodable bytes become U+FFFD."""
    charset = content_type.lower().partition("charset=")[2].split(";")[0].strip(" \"'")
    try:
        return payload.decode(charset or "utf-8", errors="replace")
    except LookupError:
        return payload.decode("utf-8", errors="replace")
