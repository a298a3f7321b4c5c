"""A web archive's bytes -> streams of plain bytes, one for each gzip member.

Common Crawl compresses record by record, so damage costs one member: the reader starts again at the
next place that is the start of a member and inflates to a WARC header. Nothing is skipped unsaid:
every gap is a ``Damage`` with its offset. At most one piece is in memory, however much inflates.
"""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from rlpt_data.sources.files import most_bytes

MAGIC = b"\x1f\x8b\x08"
VERSION = b"WARC/"
PIECE = 1 << 18
_PROBE = 512


@dataclass(frozen=True)
class Damage:
    """Bytes that could not be read, from ``offset`` of the file."""

    offset: int
    error: str


class DamagedError(Exception):
    """A stream ended before its member did."""


class Stream:
    """Plain bytes of one member (or of a whole uncompressed file), read forwards once."""

    def __init__(self, offset: int, pieces: Iterator[bytes]) -> None:
        self.offset = offset
        """Where it starts in the file, compressed bytes counted."""
        self.abandoned = ""
        """Set by a reader that will not have the rest inflated, with its reason."""
        self._pieces = pieces
        self._buffer = b""
        self._at = 0

    def read(self, size: int) -> bytes:
        """Exactly ``size`` bytes, or fewer at the end. Raises DamagedError."""
        parts: list[bytes] = []
        left = size
        while left:
            part = self._buffer[self._at : self._at + left]
            parts.append(part)
            self._at += len(part)
            left -= len(part)
            if left and not self._more():
                break
        return b"".join(parts)

    def skip(self, size: int) -> int:
        """Pass over ``size`` bytes in constant memory; how many there were."""
        left = size
        while left:
            passed = min(left, len(self._buffer) - self._at)
            self._at += passed
            left -= passed
            if left and not self._more():
                break
        return size - left

    def line(self, limit: int) -> bytes:
        """Up to and including the next newline, at most ``limit`` bytes; b"" at the end."""
        while (end := self._buffer.find(b"\n", self._at, self._at + limit)) < 0:
            if len(self._buffer) - self._at >= limit or not self._more():
                end = min(len(self._buffer), self._at + limit) - 1
                break
        found = self._buffer[self._at : end + 1]
        self._at = end + 1
        return found

    def find(self, mark: bytes, limit: int) -> bool:
        """Go to the next ``mark`` within ``limit`` bytes; False when there is none."""
        passed = 0
        while passed < limit:
            place = self._buffer.find(mark, self._at)
            if place >= 0:
                self._at = place
                return True
            kept = max(self._at, len(self._buffer) - len(mark) + 1)
            passed += kept - self._at
            self._at = kept
            if not self._more():
                self._at = len(self._buffer)
                return False
        return False

    def drain(self) -> None:
        """Pass over the rest. Raises DamagedError."""
        while self._more():
            self._at = len(self._buffer)

    def _more(self) -> bool:
        piece = next(self._pieces, b"")
        self._buffer = self._buffer[self._at :] + piece
        self._at = 0
        return bool(piece)


def streams(path: Path, start: int = 0, stop: int | None = None) -> Iterator[Stream | Damage]:
    """The members that begin in [start, stop) of the file. An uncompressed file is one stream.

    A consumer may stop reading a stream half way: the rest is passed over. A member that turns out
    damaged is followed by a ``Damage``.
    """
    with path.open("rb") as file:
        head = file.read(len(MAGIC))
        if head != MAGIC and not _compressed_name(path):
            if start == 0 and head:
                yield Stream(0, _plain(file))
            return
        end = path.stat().st_size if stop is None else stop
        yield from _members(file, start, end, most_bytes(path))


def _compressed_name(path: Path) -> bool:
    return path.suffix == ".gz"


def _plain(file: BinaryIO) -> Iterator[bytes]:
    file.seek(0)
    while piece := file.read(PIECE):
        yield piece


def _members(file: BinaryIO, start: int, stop: int, most: int) -> Iterator[Stream | Damage]:
    """Members may overlap, and each of an enemy's inflate all that follows: damaged ones may take ``most`` bytes."""
    offset, wasted = start, 0
    if start and not _begins_member(file, start):
        # What comes before the first member belongs to the range before.
        offset = _next_member(file, start, stop)
    while offset < stop:
        file.seek(offset)
        if file.read(len(MAGIC)) != MAGIC:
            found = _next_member(file, offset, stop)
            if not _padding(file, offset, found):
                yield Damage(offset, f"no gzip member: {found - offset} bytes passed over")
            offset = found
            continue
        inflated = _Inflated(file, offset)
        stream = Stream(offset, inflated.pieces())
        yield stream
        error = inflated.finish(stream)
        if error is None:
            offset = inflated.end
            continue
        wasted += inflated.work
        enough = wasted > most
        found = stop if enough else _next_member(file, offset + 1, stop)
        error = DamagedError("too much of this file is damaged") if enough else error
        yield Damage(offset, f"{error}: {found - offset} bytes passed over")
        offset = found


class _Inflated:
    """One gzip member, inflated piece by piece."""

    def __init__(self, file: BinaryIO, offset: int) -> None:
        self._file = file
        self._offset = offset
        self._error: DamagedError | None = None
        self.end = offset
        """After the member, once it is finished."""
        self.work = 0
        """Bytes read and inflated so far."""

    def pieces(self) -> Iterator[bytes]:
        at, data = self._offset, b""
        decoder = zlib.decompressobj(wbits=31)
        while not decoder.eof:
            if not data:
                self._file.seek(at)
                data = self._file.read(PIECE)
                at += len(data)
                self.work += len(data)
                if not data:
                    raise self._fail("the file ends inside a gzip member")
            try:
                piece = decoder.decompress(data, PIECE)
            except zlib.error as error:
                raise self._fail(f"damaged gzip member ({error})") from error
            data = decoder.unconsumed_tail
            self.work += len(piece)
            if piece:
                yield piece
        self.end = at - len(decoder.unused_data)

    def finish(self, stream: Stream) -> DamagedError | None:
        """Inflate what nobody read; what was wrong with the member, if anything was."""
        if stream.abandoned:
            return DamagedError(stream.abandoned)
        try:
            stream.drain()
        except DamagedError:
            assert self._error is not None
        return self._error

    def _fail(self, what: str) -> DamagedError:
        self._error = DamagedError(what)
        return self._error


def _begins_member(file: BinaryIO, offset: int) -> bool:
    """Whether a member begins here that inflates to a WARC header."""
    file.seek(offset)
    data = file.read(_PROBE)
    if not data.startswith(MAGIC):
        return False
    try:
        head = zlib.decompressobj(wbits=31).decompress(data, len(VERSION))
    except zlib.error:
        return False
    return head == VERSION


def _next_member(file: BinaryIO, offset: int, stop: int) -> int:
    """The next place at or after ``offset`` where a member begins; ``stop`` when there is none."""
    while offset < stop:
        file.seek(offset)
        data = file.read(PIECE)
        place = data.find(MAGIC)
        while place >= 0:
            if offset + place >= stop:
                return stop
            if _begins_member(file, offset + place):
                return offset + place
            place = data.find(MAGIC, place + 1)
        if len(data) < PIECE:
            return stop
        offset += len(data) - len(MAGIC) + 1
    return stop


def _padding(file: BinaryIO, start: int, stop: int) -> bool:
    """Whether there is nothing but zeros: blocks of tapes and of preallocated files."""
    file.seek(start)
    left = stop - start
    while left > 0:
        data = file.read(min(left, PIECE))
        if not data or data.strip(b"\0"):
            return False
        left -= len(data)
    return True
