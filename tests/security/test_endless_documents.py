"""No document is without end: what is too long, too deep or inflates too far costs itself, and is counted."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from rlpt_data import documents, places, sources, tokenizer
from rlpt_data.documents import Drop, SourceDocument, too_large
from rlpt_data.filters import ALWAYS, admitted
from rlpt_data.sources import files, folder
from rlpt_data.tally import LONGEST_SAMPLE, Tally

ROOT = Path(__file__).parents[2]
CONFIGS = {kind: sources.SOURCES[kind] for kind in ("jsonl", "parquet", "folder")}


def found(kind: str, path: Path, **settings: Any) -> list[SourceDocument | Drop]:
    named = {"jsonl": "JsonlConfig", "parquet": "ParquetConfig", "folder": "FolderConfig"}[kind]
    config = getattr(CONFIGS[kind], named)(kind=kind, path=path, **settings)
    return list(CONFIGS[kind].documents(config))


def test_a_limit_is_met_at_its_last_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "MAX_TEXT", 12)
    monkeypatch.setattr(documents, "MAX_NAME", 5)
    assert too_large(SourceDocument("\u6c34" * 4, url="u" * 5)) == ""
    assert too_large(SourceDocument("\u6c34" * 4 + "a")) == "a text of 13 bytes"
    assert too_large(SourceDocument("\ud800" * 4)) == ""
    long = SourceDocument("a", url="u" * 6, domain="d" * 7, language="l" * 8)
    expected = "a URL of 6 characters, a domain of 7 characters, a language of 8 characters"
    assert too_large(long) == expected


def test_what_is_too_large_is_counted_and_its_sample_is_short(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(documents, "MAX_TEXT", 10)
    tally = Tally()
    items = [SourceDocument("short"), SourceDocument("x" * 11, url="u" * 200)]
    items.append(Drop("bad_json", "w" * 10_000, "d" * 10_000))
    assert [item.text for item in admitted(items, ALWAYS, tally)] == ["short"]
    assert tally.reasons == {"too_large": 1, "bad_json": 1}
    assert tally.samples()["too_large"] == [{"where": "u" * 80, "detail": "a text of 11 bytes"}]
    (sample,) = tally.samples()["bad_json"]
    assert set(map(len, sample.values())) == {LONGEST_SAMPLE}


@pytest.mark.parametrize(
    "suffix", [".jsonl.zst", ".jsonl.gz", pytest.param(".jsonl", marks=pytest.mark.slow)]
)
def test_lines_that_inflate_without_end_stop_at_their_limit(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "BOMB_BYTES", 1000)
    path = tmp_path / f"a{suffix}"
    with pa.output_stream(str(path), compression="detect") as file:
        file.write(b'{"text": "one"}\n' + b"\n" * 100_000 + b'{"text": "two"}\n')
    first, last = found("jsonl", path)
    assert first == SourceDocument("one")
    if suffix == ".jsonl":
        assert last == SourceDocument("two")
        return
    assert isinstance(last, Drop)
    assert (last.reason, last.detail) == (
        "damaged_file",
        f"inflates to more than {1000 + 200 * path.stat().st_size} bytes",
    )


def test_a_line_within_a_bomb_is_passed_over_no_further(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "BOMB_BYTES", 1000)
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(zstandard.compress(b"x" * 3_000_000))
    (drop,) = files.lines(path, max_bytes=500)
    assert isinstance(drop, Drop)
    assert drop.reason == "damaged_file"


@pytest.mark.parametrize("name", ["text", "url"])
def test_a_column_that_repeats_one_text_stops_at_its_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(files, "BOMB_BYTES", 1000)
    path = tmp_path / "a.parquet"
    column = pa.DictionaryArray.from_arrays(pa.array([0] * 5000, pa.int32()), pa.array(["x" * 999]))
    table = pa.table({"text": pa.array([""] * 5000)} | {name: column})
    pq.write_table(table, path, compression="zstd")
    items = found("parquet", path)
    most = 1000 + 200 * path.stat().st_size
    assert len(items) == most // 999 + 1
    assert isinstance(items[-1], Drop)
    assert items[-1].detail == f"inflates to more than {most} bytes"


@given(text=st.text("ab \n", max_size=60), read=st.integers(1, 12))
def test_a_file_read_in_parts_has_the_paragraphs_of_its_whole(
    tmp_path_factory: pytest.TempPathFactory, text: str, read: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "parts.txt"
    path.write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(folder, "_READ", read)
        patch.setattr(folder, "MAX_TEXT", 9)
        expected = [part if len(part) <= 9 else None for part in text.split("\n\n")]
        assert list(folder._paragraphs(path)) == expected


def test_words_without_end_are_cut_for_training_and_others_are_left_alone() -> None:
    ordinary = "The river runs. " * 100 + "w" * 511 + " " * 510 + "\n"
    assert list(tokenizer._short_words(ordinary)) == [ordinary]
    for fill in ("a", " ", "\t\n", "\u3000", "!\x1c"):
        text = f"one {fill * 1000} two"
        pieces = list(tokenizer._short_words(text))
        assert "".join(pieces) == text
        assert max(map(len, pieces)) <= 512 + len(" two")


def seconds(work: Callable[[], Any]) -> float:
    before = time.process_time()
    work()
    return time.process_time() - before


def test_training_and_fences_take_the_time_of_their_length_not_of_its_square() -> None:
    """Before they were mended these took minutes each."""
    assert seconds(lambda: tokenizer.train_byte_pairs(["a" * 400_000, "the river"], 260)) < 5
    backticks = b"`" * 200_000
    assert seconds(lambda: places.in_code(backticks, np.arange(1, 100))) < 5
    fences = b"```\nx\n```\n" * 20_000
    inside = places.in_code(fences, np.arange(len(fences)))
    # Of every ten bytes all but the first edge and the line end behind the last.
    assert inside.reshape(-1, 10)[:, 1:9].all()
    assert not inside.reshape(-1, 10)[:, [0, 9]].any()


CHILD = """
import json, sys
from pathlib import Path
from rlpt_data.sources import documents
from rlpt_data.sources.{module} import {name}
config = {name}.model_validate_json(sys.argv[1])
found = [getattr(item, "reason", None) or len(item.text) for item in documents(config)]
status = Path("/proc/self/status").read_text()
peak = 1024 * int(status.partition("VmHWM:")[2].split()[0])
print(json.dumps([found, peak]))
"""


def in_a_child(module: str, name: str, table: dict[str, Any]) -> tuple[list[Any], int]:
    """What became of every item, and the most memory in bytes: as a process of its own has it."""
    command = [sys.executable, "-c", CHILD.format(module=module, name=name), json.dumps(table)]
    environment = {"PYTHONPATH": f"{ROOT / 'data'}:{ROOT}", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    items, peak = json.loads(done.stdout)
    return items, peak


@pytest.mark.slow
@pytest.mark.parametrize("module", ["jsonl", "folder", "warc"])
def test_a_line_of_a_hundred_megabytes_is_dropped_in_bounded_memory(
    module: str, tmp_path: Path
) -> None:
    """Less memory than twice the line, of which the libraries take most."""
    size = 100 << 20
    path = tmp_path / {"jsonl": "a.jsonl", "folder": "a.txt", "warc": "a.warc"}[module]
    if module == "jsonl":
        path.write_bytes(b'{"text": "' + b"x" * size + b'"}\n{"text": "next"}\n')
        items, peak = in_a_child("jsonl", "JsonlConfig", {"kind": "jsonl", "path": str(path)})
        assert items == ["too_large", 4]
    elif module == "folder":
        path.write_bytes(b"first\n\n" + b"x" * size + b"\n\nlast")
        table = {"kind": "folder", "path": str(path), "piece_bytes": 1}
        items, peak = in_a_child("folder", "FolderConfig", table)
        assert items == [5, "too_large", 4]
    else:
        head = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n"
        length = len(head) + size
        warc = f"WARC/1.0\r\nWARC-Type: response\r\nContent-Length: {length}\r\n\r\n".encode()
        path.write_bytes(warc + head + b"x" * size + b"\r\n\r\n")
        items, peak = in_a_child("warc", "WarcConfig", {"kind": "warc", "path": str(path)})
        assert items == ["too_large"]
    assert peak < 200 << 20


PAGES = {
    "nested": "<div>" * 100_000 + "words of the page",
    "unclosed": "<nav>" * 100_000 + "</div>" * 100_000 + "words",
    "attributes": "<p " + " ".join(f"a{n}='" for n in range(50_000)) + ">words of the page",
    "entities": "&#x41;" * 200_000 + "&" * 200_000,
    "comments": "<!--" * 100_000 + "words",
    "brackets": "<" * 400_000,
    "tables": "<table><tr><td>" * 30_000 + "words of the page",
    "declarations": "<![CDATA[" * 100_000,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain", "trafilatura", "resiliparse"])
@pytest.mark.parametrize("page", PAGES)
def test_markup_without_end_costs_its_page(name: str, page: str) -> None:
    """The extractor may fail on it, within its limits, and reads the next page."""
    from rlpt_data.extraction.extractors import PROBE, PROBE_PAGE
    from rlpt_data.extraction.sandbox import LimitsConfig, Sandbox

    if name != "plain":
        pytest.importorskip(name)
    with Sandbox(name, LimitsConfig(cpu_seconds=3.0)) as box:
        outcome = box.extract(PAGES[page])
        known = ("", "extract_timeout", "extract_crash", "extract_error", "nothing_extracted")
        assert outcome.reason in known
        assert PROBE in box.extract(PROBE_PAGE).text
