"""What comes from outside: web archives, pages, tables of text, questions."""

import functools
import gzip
import io
import json
import random
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import archives
import pyarrow as pa
import pyarrow.parquet as pq
import zstandard
from fuzzing import Target
from mutations import Mutate, changed, either, flipped, of_lines, wrapped

from rlpt.questions import question_pairs
from rlpt.rlvr import QuestionRows
from rlpt_data.documents import Drop, SourceDocument
from rlpt_data.sources.html_text import text_of
from rlpt_data.sources.http_payload import (
    PayloadError,
    dechunked,
    decompressed,
    response,
    text_of_bytes,
)
from rlpt_data.sources.jsonl import JsonlConfig
from rlpt_data.sources.jsonl import documents as of_jsonl
from rlpt_data.sources.parquet import ParquetConfig
from rlpt_data.sources.parquet import documents as of_parquet
from rlpt_data.sources.records import Fields
from rlpt_data.sources.warc import Page, pages

LIMIT = 1 << 16
_PAGE = b"<html><head><title>x</title></head><body><p>It rains.</p><ul><li>a &amp; b</ul><br>c</body></html>"


def targets(scratch: Path) -> Iterator[Target]:
    yield from _archives(scratch)
    yield Target("http: payload", _payload, _payloads(), flipped, (PayloadError,))
    yield Target(
        "html",
        lambda data: text_of(data.decode("utf-8", "replace")),
        [_PAGE, b"<p>a<!-- -->b"],
        _html,
    )
    yield from _tables(scratch)
    yield from _questions(scratch)


# ---- archives ------------------------------------------------------------------------------------


def _archives(scratch: Path) -> Iterator[Target]:
    chunked = b"6\r\n<p>It \r\n8\r\nrains.</p>\r\n0\r\n\r\n"[:-2]
    whole = [
        archives.page(1, 64),
        archives.record("https://a.org/t", b"Plain text.", kind="conversion"),
        archives.record("https://a.org/c", archives.http(chunked, "Transfer-Encoding: chunked")),
        archives.record("https://a.org/r", b"", kind="revisit"),
    ]
    plain, members = b"".join(whole), b"".join(map(archives.member, whole))
    yield Target("warc", _warc(scratch / "x.warc"), [plain], flipped)
    inside = wrapped(flipped, _inflated, lambda data: gzip.compress(data, 1, mtime=0))
    yield Target("warc.gz", _warc(scratch / "x.warc.gz"), [members], inside)


def _inflated(data: bytes) -> bytes:
    return b"".join(gzip.GzipFile(fileobj=io.BytesIO(data)).readlines())


def _warc(file: Path) -> Callable[[bytes], object]:
    def read(data: bytes) -> None:
        file.write_bytes(data)
        for item in pages(file, LIMIT):
            assert isinstance(item, Page | SourceDocument | Drop)

    return read


def _payload(data: bytes) -> None:
    found = response(data)
    body = (
        dechunked(found.body)
        if "chunked" in found.headers.get("transfer-encoding", "")
        else found.body
    )
    body = decompressed(body, found.headers.get("content-encoding", ""), LIMIT)
    assert len(body) <= LIMIT
    text_of_bytes(body, found.content_type)


def _payloads() -> list[bytes]:
    html = {"kind": "text/html; charset=iso-8859-1"}
    codings = {
        "gzip": gzip.compress(_PAGE),
        "deflate": zlib.compress(_PAGE),
        "zstd": zstandard.compress(_PAGE),
    }
    return [
        archives.http(_PAGE, **html),
        archives.http(b"<meta charset=gbk>\xc4\xe3", "X: y"),
        archives.http(b"3\r\nabc\r\n0\r\n\r\n", "Transfer-Encoding: chunked"),
        *(archives.http(body, f"Content-Encoding: {name}") for name, body in codings.items()),
    ]


def _html(rng: random.Random, samples: Sequence[bytes]) -> bytes:
    if rng.random() < 0.8:
        return flipped(rng, samples)
    return rng.choice((b"<div>", b"<!--", b"<![CDATA[", b"&#", b"<a href='", b"</p>")) * 60


# ---- tables --------------------------------------------------------------------------------------

_LINES = b'{"text": "It rains.", "url": "https://a.org/1", "n": 3}\n{"text": "Tea \\u00e9", "language": "en"}\n'
_FIELDS = Fields(domain="n", language="language")


def _tables(scratch: Path) -> Iterator[Target]:
    for name, opened, closed in (
        ("x.jsonl", bytes, bytes),
        ("x.jsonl.gz", gzip.decompress, lambda data: gzip.compress(data, 1, mtime=0)),
        ("x.jsonl.zst", zstandard.decompress, zstandard.compress),
    ):
        file = scratch / name
        read = _documents(
            file, lambda file=file: of_jsonl(JsonlConfig(kind="jsonl", path=file, fields=_FIELDS))
        )
        inside = of_lines if name == "x.jsonl" else wrapped(of_lines, opened, closed)
        yield Target(f"source: {name[2:]}", read, [closed(_LINES)], inside)
    file = scratch / "x.parquet"
    read = _documents(file, lambda: of_parquet(ParquetConfig(kind="parquet", path=file)))
    yield Target("source: parquet", read, [_parquet(_rows())], _tables_like(_rows()))


def _documents(
    file: Path, make: Callable[[], Iterator[SourceDocument | Drop]]
) -> Callable[[bytes], object]:
    def read(data: bytes) -> None:
        file.unlink(missing_ok=True)
        file.write_bytes(data)
        for item in make():
            assert isinstance(item, Drop) or len(item.text) < 1 << 26

    return read


def _rows() -> list[dict[str, object]]:
    return [json.loads(line) for line in _LINES.splitlines()]


def _parquet(rows: Sequence[dict[str, object]]) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(list(rows)), file)
    return file.getvalue()


def _tables_like(rows: Sequence[dict[str, object]]) -> Mutate:
    """Mutations of a Parquet table: of its rows (a few hundred, made once: each takes milliseconds) or of its bytes."""

    @functools.cache
    def variant(number: int) -> bytes:
        try:
            found = changed(random.Random(number), list(rows))
            return _parquet([*map(dict, found)])
        except (pa.ArrowException, TypeError, ValueError, OverflowError, RecursionError, KeyError):
            return _parquet(rows)

    def mutate(rng: random.Random, samples: Sequence[bytes]) -> bytes:
        table = variant(rng.randrange(300))
        return table if rng.random() < 0.1 else flipped(rng, [table])

    return mutate


# ---- questions -----------------------------------------------------------------------------------


def _questions(scratch: Path) -> Iterator[Target]:
    rows = QuestionRows(answer_pattern="#### (.+)")
    lines = (
        b'{"question": "2 + 3?", "answer": "So\\n#### 5"}\n{"question": "What?", "answer": 7.5}\n'
    )

    def read(file: Path) -> Callable[[bytes], object]:
        def pairs(data: bytes) -> None:
            file.unlink(missing_ok=True)
            file.write_bytes(data)
            for how in ("numeric", "exact"):
                for question, answer in question_pairs(file, rows, how)[0]:
                    (question + answer).encode()

        return pairs

    yield Target("questions: jsonl", read(scratch / "q.jsonl"), [lines], either(of_lines, flipped))
    asked = [{"question": "2 + 3?", "answer": "#### 5"}, {"question": "What?", "answer": None}]
    yield Target(
        "questions: parquet", read(scratch / "q.parquet"), [_parquet(asked)], _tables_like(asked)
    )
