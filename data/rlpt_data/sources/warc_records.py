"""Streams of a web archive -> its records, each whole and checked, or the reason why it is none.

A record's length and digests are verified before anybody sees its payload. A reader that has lost
its place inside a stream goes on at the next ``WARC/`` line.
"""

import base64
import binascii
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from rlpt_data.documents import Drop
from rlpt_data.sources.warc_members import (
    VERSION,
    Damage,
    DamagedError,
    Stream,
    streams,
)

MAX_LINE = 1 << 16
MAX_HEADERS = 1000
MAX_HEADER_BYTES = 1 << 20
MAX_GAP = 64 << 20
"""How far the next record of a stream is looked for before the stream is given up."""
MAX_SKIP = 4 << 30
"""A record that claims more than this ends its stream: nobody inflates a bomb to its end."""
_MOST_DIGITS = 18
_ALGORITHMS = {"sha1", "sha256", "md5", "sha512"}


@dataclass(frozen=True)
class Record:
    """One record of an archive; its header names are in lower case."""

    where: str
    """file@offset of the member that holds it, and #n from its second record on."""
    headers: Mapping[str, str]
    block: bytes

    @property
    def kind(self) -> str:
        return self.headers.get("warc-type", "").lower()

    @property
    def url(self) -> str | None:
        """Some writers put it between angle brackets."""
        return self.headers.get("warc-target-uri", "").strip("<>") or None


def records(
    path: Path, max_bytes: int, start: int = 0, stop: int | None = None
) -> Iterator[Record | Drop]:
    """Every record whose member begins in [start, stop); drops for what cannot be one."""
    size = path.stat().st_size
    if size == 0:
        yield Drop("damaged_file", str(path), "the file is empty")
    for stream in streams(path, start, stop):
        where = f"{path}@{stream.offset}"
        if isinstance(stream, Damage):
            yield Drop("damaged_file", where, stream.error)
        else:
            yield from _of_stream(stream, where, max_bytes)


def _of_stream(stream: Stream, where: str, max_bytes: int) -> Iterator[Record | Drop]:
    number = 0
    try:
        while version := _next_line(stream):
            here = where if number == 0 else f"{where}#{number}"
            number += 1
            if version.startswith(VERSION):
                yield from _record(stream, here, max_bytes)
            else:
                yield Drop("damaged_record", here, f"{version[:80]!r} is no WARC header")
            if stream.abandoned or not _resynchronised(stream):
                return
    except DamagedError:
        # The reader of members reports it, with the place where reading goes on.
        return


def _next_line(stream: Stream) -> bytes:
    """The next line that is not empty; b"" at the end."""
    while line := stream.line(MAX_LINE):
        if line.strip():
            return line
    return b""


def _resynchronised(stream: Stream) -> bool:
    """Whether another record follows; what lies before it is passed over."""
    return stream.find(VERSION, MAX_GAP)


def _record(stream: Stream, where: str, max_bytes: int) -> Iterator[Record | Drop]:
    headers = _headers(stream)
    if headers is None:
        most = f"{MAX_HEADERS} lines or {MAX_HEADER_BYTES} bytes"
        yield Drop("damaged_record", where, f"headers of more than {most}")
        return
    url = headers.get("warc-target-uri", "")
    length = headers.get("content-length", "")
    # A number of thousands of digits is none that Python reads.
    if not length.isdecimal() or len(length) > _MOST_DIGITS:
        yield Drop("damaged_record", where, f"{url}: Content-Length {length[:40]!r}")
    elif int(length) > max_bytes:
        yield Drop("too_large", where, f"{url}: {length} bytes, the limit is {max_bytes}")
        _pass_over(stream, int(length))
    else:
        block = stream.read(int(length))
        missing = int(length) - len(block)
        if missing:
            yield Drop("short_record", where, f"{url}: {missing} bytes are missing")
            return
        record = Record(where, headers, block)
        broken = broken_digest(headers.get("warc-block-digest"), block)
        yield Drop("bad_digest", where, f"{url}: block {broken}") if broken else record


def _pass_over(stream: Stream, size: int) -> None:
    if size > MAX_SKIP:
        stream.abandoned = f"a record of {size} bytes is not read to its end"
    else:
        stream.skip(size)


def _headers(stream: Stream) -> dict[str, str] | None:
    """Up to the empty line; a line that begins with a space continues the one before. None where there are too many."""
    found: dict[str, str] = {}
    name, size = "", 0
    for _ in range(MAX_HEADERS):
        line = stream.line(MAX_LINE)
        size += len(line)
        if not line.strip() or size > MAX_HEADER_BYTES:
            break
        text = line.decode("utf-8", errors="replace")
        if text[0] in " \t" and name:
            found[name] = f"{found[name]} {text}".strip()
            continue
        name, _, value = text.partition(":")
        name = name.strip().lower()
        found.setdefault(name, value.strip())
    else:
        return None
    return None if size > MAX_HEADER_BYTES else found


def broken_digest(stated: str | None, data: bytes) -> str:
    """What is wrong with a labelled digest (algorithm:value, hex or base 32); "" when it holds.

    An algorithm nobody here knows is no statement about the bytes.
    """
    algorithm, _, value = (stated or "").partition(":")
    algorithm = algorithm.strip().lower().replace("-", "")
    if algorithm not in _ALGORITHMS or not value.strip():
        return ""
    found = hashlib.new(algorithm, data).digest()
    expected = _decoded(value.strip(), len(found))
    return "" if expected == found else f"digest {value.strip()} is not that of its bytes"


def _decoded(value: str, size: int) -> bytes:
    """Hex, base 32 or base 64, told apart by length; padding is optional."""
    value = value.rstrip("=")
    padding = "=" * 8
    try:
        if len(value) == 2 * size:
            return bytes.fromhex(value)
        if len(value) == -(-8 * size // 5):
            return base64.b32decode(value.upper() + padding[: -len(value) % 8])
        return base64.b64decode(value + padding[: -len(value) % 4])
    except (ValueError, binascii.Error):
        return b""
