"""Web archives whose bytes are few and whose reading would not end, or would end everything."""

import struct
import time
import zlib
from pathlib import Path

import pytest
from archives import member, page

from rlpt_data.documents import Drop
from rlpt_data.sources.http_payload import PayloadError, decompressed, text_of_bytes
from rlpt_data.sources.warc_members import MAGIC, VERSION
from rlpt_data.sources.warc_records import MAX_HEADER_BYTES, Record, records

HEAD = MAGIC + bytes(7)
WINDOW = 60_000


def stored(size: int) -> bytes:
    """The header of a deflate block of so many bytes that stand as they are."""
    return b"\0" + struct.pack("<HH", size, size ^ 0xFFFF)


def overlapping(bomb: int) -> bytes:
    """Thousands of gzip members in 60 kB, each of which goes on as one bomb whose checksum is wrong."""
    entries = bytearray()
    while (left := WINDOW - len(entries) - len(HEAD) - 15) >= 0:
        entries += HEAD + stored(5) + VERSION + stored(left)
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    tail = packer.compress(bytes(bomb)) + packer.flush()
    return bytes(entries) + bytes(WINDOW - len(entries)) + tail + b"no check"


def test_members_that_overlap_take_the_time_of_the_file_not_of_its_square(tmp_path: Path) -> None:
    path = tmp_path / "in.warc.gz"
    path.write_bytes(member(page(0)) + overlapping(20 << 20))
    started = time.process_time()
    found = list(records(path, 1 << 20))
    assert time.process_time() - started < 5
    assert [item.url for item in found if isinstance(item, Record)] == ["https://a.org/0"]
    last = found[-1]
    assert isinstance(last, Drop)
    assert last.reason == "damaged_file"
    assert "too much of this file is damaged" in last.detail


@pytest.mark.parametrize("lines", [[b" " + b"x" * 60_000] * 30, [b"a: b"] * 1001])
def test_headers_without_end_cost_their_record(tmp_path: Path, lines: list[bytes]) -> None:
    assert sum(map(len, lines)) > MAX_HEADER_BYTES or len(lines) > 1000
    path = tmp_path / "in.warc"
    endless = b"WARC/1.0\r\n" + b"\r\n".join([b"x-a: b", *lines, b"Content-Length: 0"])
    path.write_bytes(page(0) + endless + b"\r\n\r\n" + page(1))
    first, drop, second = records(path, 1 << 20)
    assert isinstance(first, Record)
    assert isinstance(second, Record)
    assert isinstance(drop, Drop)
    assert drop.reason == "damaged_record"
    assert "headers of more than" in drop.detail


@pytest.mark.parametrize("label", ["undefined", "idna", "punycode", "unicode_escape", "rot13"])
def test_a_page_that_names_a_codec_of_no_page_is_read_as_if_it_named_none(label: str) -> None:
    body = "Молоко и \\x41 хлеб".encode("koi8-r")
    read = text_of_bytes(body, f"text/html; charset={label}")
    assert read == text_of_bytes(body, "text/html")
    assert "\\x41" in read


def test_codings_upon_codings_are_refused() -> None:
    assert decompressed(b"plain", ", ".join(["identity"] * 8), 9) == b"plain"
    with pytest.raises(PayloadError, match="9 content codings"):
        decompressed(b"plain", ", ".join(["identity"] * 9), 9)
