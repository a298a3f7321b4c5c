"""Response blocks become pages: codings undone within a limit, bytes read as what they are."""

import gzip
import zlib
from pathlib import Path

import pytest
import zstandard
from archives import digest, http, record

from rlpt_data.documents import Drop
from rlpt_data.sources.http_payload import (
    PayloadError,
    dechunked,
    decompressed,
    response,
    text_of_bytes,
)
from rlpt_data.sources.warc import Page, pages

LIMIT = 1 << 20
BODY = b"<p>some text of a page</p>" * 20
CHUNKED = b"".join(b"%x;x=y\r\n%s\r\n" % (len(p), p) for p in (BODY[:7], BODY[7:])) + b"0\r\n\r\n"


def brotli(data: bytes) -> bytes:
    return pytest.importorskip("brotli").compress(data)


def raw_deflate(data: bytes) -> bytes:
    compress = zlib.compressobj(wbits=-15)
    return compress.compress(data) + compress.flush()


def test_status_headers_and_body_are_split_at_the_first_empty_line() -> None:
    found = response(b"HTTP/1.1 404 Not Found\r\nX: 1\r\nx: 2\r\n\r\nbody\r\n\r\nmore")
    assert (found.status, found.headers, found.body) == (404, {"x": "1"}, b"body\r\n\r\nmore")
    assert response(b"HTTP/1.0 200\nA:b\n\nbody").body == b"body"
    with pytest.raises(PayloadError, match="no HTTP status line"):
        response(b"GET / HTTP/1.1\r\n\r\n")


def test_chunks_are_joined_and_a_body_without_chunks_is_left_alone() -> None:
    assert dechunked(CHUNKED) == BODY
    assert dechunked(BODY) == BODY
    with pytest.raises(PayloadError, match="a chunk of"):
        dechunked(CHUNKED[:-40])


@pytest.mark.parametrize(
    ("codings", "coded"),
    [
        ("gzip", gzip.compress(BODY, mtime=0)),
        ("deflate", zlib.compress(BODY)),
        ("deflate", raw_deflate(BODY)),
        ("zstd", zstandard.compress(BODY)),
        ("deflate, gzip", gzip.compress(zlib.compress(BODY), mtime=0)),
        ("gzip", BODY),  # the crawler undid the coding and kept the header
        ("", BODY),
        ("Identity", BODY),
    ],
)
def test_content_codings_are_undone(codings: str, coded: bytes) -> None:
    assert decompressed(coded, codings, LIMIT) == BODY


def test_brotli_is_undone_and_limited() -> None:
    assert decompressed(brotli(BODY), "br", LIMIT) == BODY
    with pytest.raises(PayloadError, match="more than"):
        decompressed(brotli(bytes(8 << 20)), "br", LIMIT)


@pytest.mark.parametrize(
    ("codings", "coded", "what"),
    [
        ("gzip", gzip.compress(bytes(8 << 20), mtime=0), "more than 1048576 bytes"),
        ("deflate", zlib.compress(bytes(8 << 20)), "more than 1048576 bytes"),
        ("zstd", zstandard.compress(bytes(8 << 20)), "more than 1048576 bytes"),
        ("gzip", gzip.compress(BODY, mtime=0)[:-20], "ends early"),
        ("gzip", b"\x1f\x8b" + BODY, "damaged body"),
        ("br", b"\xff" * 40, "damaged brotli"),
        ("zstd", b"\x01" * 40, "damaged zstd"),
        ("snappy", BODY, "'snappy' is unknown"),
    ],
)
def test_bombs_and_damage_are_refused(codings: str, coded: bytes, what: str) -> None:
    if codings == "br":
        pytest.importorskip("brotli")
    with pytest.raises(PayloadError, match=what):
        decompressed(coded, codings, LIMIT)


@pytest.mark.parametrize(
    ("body", "content_type", "text"),
    [
        ("café".encode(), "text/html; charset=iso-8859-1", "café"),  # valid UTF-8 is UTF-8
        ("café “x”".encode("cp1252"), "text/html; charset=ISO-8859-1", "café “x”"),
        (b'<meta charset="windows-1251">' + "мир".encode("cp1251"), "text/html", "мир"),
        (b"<meta content='text/html; charset=GB2312'>" + "书".encode("gbk"), "", "书"),
        ("日本".encode("iso-2022-jp"), "text/html; charset=ISO-2022-JP", "日本"),
        ("\ufeffx".encode("utf-16-le"), "text/html; charset=utf-8", "x"),
        (b'<meta charset="utf-16">caf\xc3\xa9', "text/html", "café"),
        ("Привет, как дела? Сегодня хорошая погода".encode("cp1251"), "", "Привет"),
        (b"ok\xff\xfe", "text/html; charset=utf-8", "ok\ufffd\ufffd"),
        (b"\x80abc", "text/html; charset=base64", "abc"),  # a codec, and none for text
    ],
)
def test_bytes_are_read_in_the_encoding_they_have(
    body: bytes, content_type: str, text: str
) -> None:
    assert text in text_of_bytes(body, content_type)


def found(tmp_path: Path, *archive: bytes) -> list[object]:
    path = tmp_path / "in.warc"
    path.write_bytes(b"".join(archive))
    return [
        item.reason
        if isinstance(item, Drop)
        else item.html
        if isinstance(item, Page)
        else item.text
        for item in pages(path, LIMIT)
    ]


def test_a_payload_digest_holds_before_or_after_the_transfer_coding(tmp_path: Path) -> None:
    block = http(CHUNKED, "Transfer-Encoding: chunked")
    stated = [digest(CHUNKED), digest(BODY), digest(b"other")]
    archive = [record("https://a.org", block, WARC_Payload_Digest=value) for value in stated]
    assert found(tmp_path, *archive) == [BODY.decode(), BODY.decode(), "bad_payload"]


def test_what_is_no_page_says_why(tmp_path: Path) -> None:
    assert found(
        tmp_path,
        record("a", http(b"gone", status="404 Not Found")),
        record("b", http(b"%PDF", kind="application/pdf")),
        record("c", b"no http"),
        record("d", b"GET / HTTP/1.1\r\n\r\n", kind="request"),
        record("e", b"", kind="revisit"),
        record("f", b"plain text of a WET file", kind="conversion"),
        record("g", http(b"\x1f\x8bxx", "Content-Encoding: gzip")),
    ) == [
        *("http_status", "not_html", "bad_payload", "revisit"),
        *("plain text of a WET file", "bad_payload"),
    ]


def test_the_genuine_common_crawl_record_is_read(corpus: Path) -> None:
    (page,) = pages(corpus / "commoncrawl-whirlwind/whirlwind.warc.gz", LIMIT)
    assert isinstance(page, Page)
    assert page.url == "https://an.wikipedia.org/wiki/Escopete"
    assert "Escopete" in page.html
