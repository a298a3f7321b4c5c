"""Every source yields its documents, and a drop with its place for what is none."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlpt_data import sources
from rlpt_data.documents import Drop, SourceDocument
from rlpt_data.prepare import PrepareConfig
from rlpt_data.sources import folder
from rlpt_data.sources.html_text import text_of
from rlpt_data.strict import UserError

Read = Callable[..., list[Any]]


@pytest.fixture
def read(configured: Callable[..., PrepareConfig]) -> Read:
    def run(toml: str) -> list[Any]:
        return list(sources.documents(configured(f"[source]\n{toml}").source))

    return run


ROWS = [{"text": "one", "url": "https://a.org/1", "id": 1}, {"text": "two", "url": None, "id": 2}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_jsonl_reads_plain_and_compressed_lines(read: Read, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"in{suffix}"
    if suffix.endswith("zst"):
        with pa.output_stream(str(path), compression="zstd") as file:
            file.write(LINES)
    else:
        path.write_bytes(gzip.compress(LINES) if suffix.endswith("gz") else LINES)
    one = SourceDocument("one", url="https://a.org/1")
    assert read(f'kind = "jsonl"\npath = "{path}"') == [one, SourceDocument("two")]


def test_jsonl_fields_are_configurable(read: Read, tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text('{"body": "one", "id": 7, "site": "s", "part": "dev"}\n{"body": "x"}\n')
    fields = 'text = "body"\nurl = "id"\ndomain = "site"\nsplit = "part"'
    found = read(f'kind = "jsonl"\npath = "{path}"\n[source.fields]\n{fields}')
    assert found[0] == SourceDocument("one", url="7", domain="s", split="dev")
    assert found[1] == Drop("unknown_split", f"{path}:2", "part = None")


def test_jsonl_bad_lines_are_drops_that_name_file_and_line(read: Read, tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'{"text": "ok"}\n\n{"text": \n[1]\n{"txt": "x"}\n{"text": 5}\n\xff\n')
    found = read(f'kind = "jsonl"\npath = "{path}"')
    assert found[0] == SourceDocument("ok")
    dropped = [(drop.reason, drop.where) for drop in found[1:]]
    assert dropped == [
        ("bad_json", f"{path}:3"),
        ("not_an_object", f"{path}:4"),
        ("no_text", f"{path}:5"),
        ("no_text", f"{path}:6"),
        ("bad_json", f"{path}:7"),
    ]


def test_a_damaged_archive_keeps_what_came_before(read: Read, tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl.gz"
    path.write_bytes(gzip.compress(LINES)[:-12])
    *documents, drop = read(f'kind = "jsonl"\npath = "{path}"')
    assert isinstance(drop, Drop)
    assert drop.reason == "damaged_file"
    assert all(isinstance(document, SourceDocument) for document in documents)


def test_parquet_reads_only_what_it_needs_and_names_a_missing_column(
    read: Read, tmp_path: Path
) -> None:
    path = tmp_path / "in.parquet"
    pq.write_table(pa.Table.from_pylist(ROWS), path)
    one = SourceDocument("one", url="https://a.org/1")
    assert read(f'kind = "parquet"\npath = "{path}"') == [one, SourceDocument("two")]
    with pytest.raises(UserError, match=r"no column 'txt' .* did you mean 'text'\?"):
        read(f'kind = "parquet"\npath = "{path}"\n[source.fields]\ntext = "txt"')
    path.write_bytes(path.read_bytes()[:-9])
    assert [drop.reason for drop in read(f'kind = "parquet"\npath = "{path}"')] == ["damaged_file"]


def test_a_folder_is_read_at_every_depth_in_a_fixed_order(read: Read, tmp_path: Path) -> None:
    for name in ("b/two.md", "a.txt", "b/c/zero.txt", "no.html"):
        (tmp_path / "docs" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "docs" / name).write_text(name)
    (tmp_path / "docs/latin.txt").write_bytes(b"\xe9")
    found = read(f'kind = "folder"\npath = "{tmp_path}/docs"')
    assert [item.url for item in found if isinstance(item, SourceDocument)] == [
        "a.txt",
        "b/c/zero.txt",
        "b/two.md",
    ]
    assert [item.domain for item in found if isinstance(item, SourceDocument)] == [None, "b", "b"]
    assert [item.reason for item in found if isinstance(item, Drop)] == ["not_utf8"]


def test_a_text_of_unbounded_size_is_a_drop_and_not_read(
    read: Read, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder, "MAX_TEXT", 5)
    for name in ("short", "longer"):
        (tmp_path / f"{name}.txt").write_text(name)
    longer, short = read(f'kind = "folder"\npath = "{tmp_path}"')
    assert (longer.reason, short.text) == ("too_large", "short")
    assert "6 bytes; set piece_bytes" in longer.detail
    longer, short = read(f'kind = "folder"\npath = "{tmp_path}"\npiece_bytes = 1')
    assert (longer.reason, short.text) == ("too_large", "short")
    assert "a paragraph of more than 5 characters" in longer.detail


def test_pieces_of_a_file_are_whole_paragraphs(read: Read, tmp_path: Path) -> None:
    (tmp_path / "plays.txt").write_text("aaaa\n\nbb\n\ncccc\n\nd")
    found = read(f'kind = "folder"\npath = "{tmp_path}/plays.txt"\npiece_bytes = 10')
    assert [item.text for item in found] == ["aaaa\n\nbb", "cccc\n\nd"]
    assert [item.url for item in found] == ["plays.txt#0", "plays.txt#1"]


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "folder", "warc"])
def test_a_missing_or_empty_path_is_refused(read: Read, tmp_path: Path, kind: str) -> None:
    with pytest.raises(UserError, match=r"\[source\] path = .*absent: no such file or folder"):
        read(f'kind = "{kind}"\npath = "{tmp_path}/absent"')
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"\[source\] path = .*empty: no \."):
        read(f'kind = "{kind}"\npath = "{tmp_path}/empty"')


def warc_record(url: str, content_type: str, body: bytes) -> bytes:
    http = f"HTTP/1.1 200 OK\r\nContent-Type: {content_type}\r\n\r\n".encode() + body
    head = {
        "WARC-Type": "response",
        "WARC-Record-ID": f"<urn:test:{url}>",
        "WARC-Date": "2020-01-01T00:00:00Z",
        "WARC-Target-URI": url,
        "Content-Type": "application/http; msgtype=response",
        "Content-Length": str(len(http)),
    }
    lines = "".join(f"{name}: {value}\r\n" for name, value in head.items())
    return f"WARC/1.0\r\n{lines}\r\n".encode() + http + b"\r\n\r\n"


def test_warc_yields_the_text_of_html_responses(read: Read, tmp_path: Path) -> None:
    path = tmp_path / "in.warc.gz"
    pages = [
        ("https://a.org/", "text/html; charset=latin-1", "<p>caf\xe9</p><p>two".encode("latin-1")),
        ("https://a.org/x.png", "image/png", b"\x89PNG"),
    ]
    path.write_bytes(b"".join(gzip.compress(warc_record(*page)) for page in pages))
    found = read(f'kind = "warc"\npath = "{path}"')
    assert found[0] == SourceDocument("café\n\ntwo", url="https://a.org/")
    assert [drop.reason for drop in found[1:]] == ["not_html"]
    found = read(f'kind = "warc"\npath = "{path}"\nextractor = "html:escape"')
    assert found[0].text == "&lt;p&gt;café&lt;/p&gt;&lt;p&gt;two"
    with pytest.raises(UserError, match="extractor = html:nothing"):
        read(f'kind = "warc"\npath = "{path}"\nextractor = "html:nothing"')


def test_a_short_warc_record_is_a_drop(read: Read, tmp_path: Path) -> None:
    path = tmp_path / "in.warc"
    whole = warc_record("https://a.org/", "text/html", b"<p>" + b"x" * 400)
    path.write_bytes(whole[:-104])  # the record ends in two empty lines
    found = read(f'kind = "warc"\npath = "{path}"')
    assert [(drop.reason, drop.detail) for drop in found] == [
        ("short_record", "https://a.org/: 100 bytes are missing")
    ]


def test_text_of_html_keeps_blocks_apart_and_leaves_scripts_out() -> None:
    page = """<html><head><title>t</title></head><body><h1>A &amp; B</h1>
      <script>if (1 < 2) {}</script><p>one <b>two</b>
      three</p><ul><li>x<li>y</ul><nav>menu</nav>end</body></html>"""
    assert text_of(page) == "A & B\n\none two three\n\nx\ny\n\nend"


def test_huggingface_reads_a_local_dataset(
    read: Read, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "set").mkdir()
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "set/train.parquet")
    found = read(f'kind = "huggingface"\nname = "{tmp_path}/set"')
    assert found == [SourceDocument("one", url="https://a.org/1"), SourceDocument("two")]
    with pytest.raises(UserError, match=r"\[source\] name = .*absent"):
        read(f'kind = "huggingface"\nname = "{tmp_path}/absent"')


def test_installed_docs_have_no_network_and_one_document_for_each_topic(read: Read) -> None:
    from pydoc_data.topics import topics

    found = read('kind = "installed-docs"\nmax_bytes = 300_000\nmin_bytes = 0')
    urls = [document.url for document in found]
    assert len(set(urls)) == len(urls)
    assert urls[: len(topics)] == [f"topic:{name}" for name in sorted(topics)][: len(urls)]
    size = sum(len(document.text.encode()) for document in found)
    assert 300_000 <= size < 400_000
    assert found == read('kind = "installed-docs"\nmax_bytes = 300_000\nmin_bytes = 0')


def test_installed_docs_leave_out_only_what_is_shorter_than_asked(read: Read) -> None:
    everything = read('kind = "installed-docs"\nmax_bytes = 100_000\nmin_bytes = 0')
    sizes = sorted(len(document.text.encode()) for document in everything)
    least = sizes[len(sizes) // 2]
    kept = read(f'kind = "installed-docs"\nmax_bytes = 100_000\nmin_bytes = {least}')
    found = [len(document.text.encode()) for document in kept]
    assert min(found) == least


def test_docstrings_are_parsed_and_never_run(tmp_path: Path) -> None:
    from rlpt_data.sources.installed_docs import _docstrings

    path = tmp_path / "danger.py"
    path.write_text(
        '"""Top."""\nraise SystemExit\nclass C(Base):\n    """Of C."""\n'
        '    def run(self, x: int = 2):\n        """Runs."""\ndef silent(): pass\n'
    )
    expected = "module danger\n\nTop.\n\nclass C(Base)\n\nOf C.\n\nrun(self, x: int=2)\n\nRuns.\n"
    assert _docstrings(path, "danger") == expected
    path.write_text('x = """\n')
    assert _docstrings(path, "danger") == ""


def test_proving_pages_come_through_the_registry(read: Read) -> None:
    found = read('kind = "proving"\ndocuments = 20')
    assert len(found) == 20
    assert all(document.cuts for document in found)
