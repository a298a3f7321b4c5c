"""The block of a response record -> its page: headers off, codings undone, bytes to text.

Every coding is undone within a limit of bytes, so that a compressed bomb costs its limit. What a
server says of its own encoding is often wrong: valid UTF-8 is UTF-8, then the header counts, then
the page's own ``meta``, then a detector.
"""

import codecs
import re
import zlib
from dataclasses import dataclass

import zstandard

from rlpt_data.strict import UserError

_STATUS = re.compile("[0-9]{3}")
_META = re.compile(
    rb"<(?:meta|\?xml)[^>]{0,400}?(?:charset|encoding)\s*=\s*[\"']?\s*([\w:.-]+)", re.I
)
_BOMS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_STATEFUL = re.compile(r"utf-?16|utf-?32|utf-?7|iso-2022|hz-gb", re.I)
"""Their bytes can be valid UTF-8 by accident, so here the label is believed."""
_WIDER = {
    **dict.fromkeys(("iso-8859-1", "latin-1", "latin1", "ascii", "us-ascii"), "cp1252"),
    **dict.fromkeys(("gb2312", "gbk", "x-gbk"), "gb18030"),
    **dict.fromkeys(("shift_jis", "shift-jis", "x-sjis", "sjis"), "cp932"),
    **dict.fromkeys(("euc-kr", "ks_c_5601-1987"), "cp949"),
    **dict.fromkeys(("iso-8859-9", "latin5"), "cp1254"),
    **dict.fromkeys(("x-user-defined", "unicode"), "utf-8"),
}
"""What browsers read under a label: the superset that pages are really written in."""
_META_WINDOW = 4096
_MOST_CODINGS = 8
_NO_CHARSETS = {"idna", "punycode", "undefined", "unicode-escape", "raw-unicode-escape", "palmos"}
"""Python's own: no page is written in one, and some raise whatever they are told of errors."""


class PayloadError(ValueError):
    """The body is not what its headers say."""


@dataclass(frozen=True)
class Response:
    """One HTTP response, as its server sent it."""

    status: int
    headers: dict[str, str]
    """Names in lower case; of repeated ones the first."""
    body: bytes

    @property
    def content_type(self) -> str:
        return self.headers.get("content-type", "")


def response(block: bytes) -> Response:
    """Split status line, headers and body. Raises PayloadError when there is no status line."""
    head, _, body = _split(block)
    first, *lines = head.decode("latin-1").splitlines() or [""]
    parts = first.split(None, 2)
    if not first.startswith("HTTP/") or len(parts) < 2 or not _STATUS.fullmatch(parts[1]):
        raise PayloadError(f"no HTTP status line: {first[:80]!r}")
    headers: dict[str, str] = {}
    for line in lines:
        name, colon, value = line.partition(":")
        if colon:
            headers.setdefault(name.strip().lower(), value.strip())
    return Response(int(parts[1]), headers, body)


def _split(block: bytes) -> tuple[bytes, bytes, bytes]:
    """At the first empty line, with or without carriage returns."""
    ends = [(block.find(mark), mark) for mark in (b"\r\n\r\n", b"\n\n")]
    found = [(place, mark) for place, mark in ends if place >= 0]
    if not found:
        return block, b"", b""
    place, mark = min(found)
    return block[:place], mark, block[place + len(mark) :]


def dechunked(body: bytes) -> bytes:
    """Undo chunked transfer coding; a body that is not chunked after all is returned as it is.

    Crawlers often undo the coding and keep the header. Raises PayloadError for a body that begins
    chunked and does not end so.
    """
    parts: list[bytes] = []
    at = 0
    while True:
        end = body.find(b"\n", at, at + 64)
        size = _chunk_size(body[at:end]) if end >= 0 else None
        if size is None:
            if at == 0:
                return body
            raise PayloadError(f"no chunk size at byte {at} of the body")
        if size == 0:
            return b"".join(parts)
        start = end + 1
        if start + size > len(body):
            raise PayloadError(
                f"a chunk of {size} bytes at byte {at}, {len(body) - start} are left"
            )
        parts.append(body[start : start + size])
        at = start + size
        at += 2 if body[at : at + 2] == b"\r\n" else 1


def _chunk_size(line: bytes) -> int | None:
    digits = line.split(b";")[0].strip()
    return int(digits, 16) if re.fullmatch(rb"[0-9A-Fa-f]{1,8}", digits) else None


def decompressed(body: bytes, codings: str, limit: int) -> bytes:
    """Undo the content codings, last first. Raises PayloadError beyond ``limit`` bytes."""
    names = [name.strip().lower() for name in codings.split(",")]
    if len(names) > _MOST_CODINGS:
        raise PayloadError(f"{len(names)} content codings")
    for coding in reversed(names):
        body = _undone(body, coding, limit)
        if len(body) > limit:
            raise PayloadError(f"{coding}: more than {limit} bytes")
    return body


def _undone(body: bytes, coding: str, limit: int) -> bytes:
    if coding in ("gzip", "x-gzip"):
        # The header outlives the coding as often as not; the magic number tells.
        return _inflated(body, 31, limit) if body.startswith(b"\x1f\x8b") else body
    if coding == "deflate":
        return _deflated(body, limit)
    if coding == "br":
        return _brotli(body, limit)
    if coding == "zstd":
        return _zstd(body, limit)
    if coding in ("", "identity", "none", "utf-8"):
        return body
    raise PayloadError(f"content coding {coding[:40]!r} is unknown")


def _inflated(body: bytes, wbits: int, limit: int) -> bytes:
    decoder = zlib.decompressobj(wbits=wbits)
    try:
        found = decoder.decompress(body, limit + 1)
    except zlib.error as error:
        raise PayloadError(f"damaged body ({error})") from error
    if not decoder.eof and len(found) <= limit:
        raise PayloadError("the compressed body ends early")
    return found


def _deflated(body: bytes, limit: int) -> bytes:
    """With the zlib header the standard asks for, or without, as many servers send it."""
    try:
        return _inflated(body, 15, limit)
    except PayloadError:
        return _inflated(body, -15, limit)


def _brotli(body: bytes, limit: int) -> bytes:
    try:
        import brotli
    except ImportError as error:
        raise UserError("[source] kind = warc needs brotli; pip install 'rlpt[data]'") from error
    decoder = brotli.Decompressor()
    parts, size = [], 0
    try:
        piece = decoder.process(body, output_buffer_limit=limit + 1)
        while piece and size <= limit:
            parts.append(piece)
            size += len(piece)
            piece = decoder.process(b"", output_buffer_limit=limit + 1)
    except brotli.error as error:
        raise PayloadError(f"damaged brotli body ({error})") from error
    if not decoder.is_finished() and size <= limit:
        raise PayloadError("the compressed body ends early")
    return b"".join(parts)


def _zstd(body: bytes, limit: int) -> bytes:
    try:
        with zstandard.ZstdDecompressor().stream_reader(body) as reader:
            return reader.read(limit + 1)
    except zstandard.ZstdError as error:
        raise PayloadError(f"damaged zstd body ({error})") from error


def text_of_bytes(body: bytes, content_type: str) -> str:
    """The characters of a page; bytes that are none become U+FFFD."""
    for mark, name in _BOMS:
        if body.startswith(mark):
            return body[len(mark) :].decode(name, errors="replace")
    header = content_type.lower().partition("charset=")[2].split(";")[0].strip(" \"'")
    meta = _META.search(body, 0, _META_WINDOW)
    labels = [header, _legible(meta[1]) if meta else ""]
    if not _STATEFUL.match(labels[0] or labels[1]):
        try:
            return body.decode("utf-8")
        except UnicodeDecodeError:
            pass
    return body.decode(_codec([*labels, _detected(body)]), errors="replace")


def _legible(label: bytes) -> str:
    """A ``meta`` that could be read byte by byte is not in a wide encoding, whatever it says."""
    name = label.decode("latin-1").lower()
    return "" if name.startswith(("utf-16", "utf16", "utf-32")) else name


def _detected(body: bytes) -> str:
    try:
        import cchardet
    except ImportError as error:
        raise UserError(
            "[source] kind = warc needs faust-cchardet; pip install 'rlpt[data]'"
        ) from error
    return str(cchardet.detect(body)["encoding"] or "").lower()


def _codec(labels: list[str]) -> str:
    """The first label that names a codec for text; UTF-8 when none does."""
    for label in labels:
        name = _WIDER.get(label, label)
        try:
            if name and _is_charset(codecs.lookup(name)):
                return name
        except (LookupError, ValueError):
            continue
    return "utf-8"


def _is_charset(found: codecs.CodecInfo) -> bool:
    of_pages = found.name.replace("_", "-") not in _NO_CHARSETS
    return of_pages and found._is_text_encoding  # pyright: ignore
