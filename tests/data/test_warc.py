"""Web archives: every record that can be read is read, every gap has its offset."""

import gzip
import tracemalloc
import zlib
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
from archives import http, member, page, record

from rlpt_data.documents import Drop
from rlpt_data.sources.warc_records import Record, broken_digest, records

LIMIT = 1 << 20


def read(
    path: Path, start: int = 0, stop: int | None = None, limit: int = LIMIT
) -> tuple[list[str], list[Drop]]:
    found = list(records(path, limit, start, stop))
    urls = [item.url or "" for item in found if isinstance(item, Record)]
    return urls, [item for item in found if isinstance(item, Drop)]


def urls(*numbers: int) -> list[str]:
    return [f"https://a.org/{number}" for number in numbers]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "in.warc.gz"


@pytest.mark.parametrize(
    ("name", "good"), [("ok", 60), ("flip", 59), ("hdr", 59), ("trunc", 40), ("whole", 60)]
)
def test_damage_costs_the_damaged_record_alone(corpus: Path, name: str, good: int) -> None:
    found, drops = read(corpus / f"corrupt-warc/{name}.warc.gz", limit=16 << 20)
    assert len(found) == good
    assert [drop.reason for drop in drops] == ["damaged_file"] * (name in ("flip", "hdr", "trunc"))


def test_a_gap_is_reported_with_its_offset_and_length(path: Path) -> None:
    members = [member(page(number)) for number in range(4)]
    broken = b"\0\xff" + members[1][2:]
    path.write_bytes(members[0] + broken + members[2] + members[3])
    found, drops = read(path)
    assert found == urls(0, 2, 3)
    assert [drop.where for drop in drops] == [f"{path}@{len(members[0])}"]
    assert f"{len(broken)} bytes passed over" in drops[0].detail


def test_no_place_of_a_flipped_byte_costs_more_than_one_record(path: Path) -> None:
    members = [member(page(number)) for number in range(3)]
    whole = b"".join(members)
    for at in range(len(members[0]), len(members[0]) + len(members[1]), 23):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
        found, drops = read(path)
        # The flags and the time of a member are not under its checksum: nothing may be lost at all.
        assert {*found} >= {*urls(0, 2)}
        assert found == urls(0, 1, 2) or len(drops) == 1


def test_every_truncation_keeps_the_whole_records(path: Path) -> None:
    members = [member(page(number)) for number in range(3)]
    whole, ends = b"".join(members), [len(members[0]), len(members[0]) + len(members[1])]
    for size in range(1, len(whole), 37):
        path.write_bytes(whole[:size])
        found, drops = read(path)
        assert found == urls(*range(sum(size >= end for end in ends)))
        assert bool(drops) == (size not in ends)


@pytest.mark.parametrize("pieces", [2, 3, 7])
def test_ranges_of_a_file_hold_every_record_once(path: Path, pieces: int) -> None:
    path.write_bytes(b"".join(member(page(number)) for number in range(20)))
    size = path.stat().st_size
    edges = [size * piece // pieces for piece in range(pieces + 1)]
    found = [read(path, a, b) for a, b in pairwise(edges)]
    assert [url for part, _ in found for url in part] == urls(*range(20))
    assert not any(drops for _, drops in found)


def test_one_member_with_every_record_and_plain_files_read_alike(path: Path) -> None:
    plain = b"".join(page(number) for number in range(5))
    for data, name in ((gzip.compress(plain), "a.warc.gz"), (plain, "a.warc")):
        path.with_name(name).write_bytes(data)
        assert read(path.with_name(name)) == (urls(0, 1, 2, 3, 4), [])


def test_a_reader_that_lost_its_place_finds_the_next_record(tmp_path: Path) -> None:
    path = tmp_path / "in.warc"
    bad = record("https://a.org/bad", b"x" * 50, Content_Length="many")
    path.write_bytes(page(0) + b"rubbish\n" + page(1) + bad + page(2))
    found, drops = read(path)
    assert found == urls(0, 1, 2)
    assert [drop.reason for drop in drops] == ["damaged_record"]


def test_a_short_payload_and_a_wrong_digest_are_no_records(tmp_path: Path) -> None:
    path = tmp_path / "in.warc"
    wrong = record("https://a.org/w", b"abc", WARC_Block_Digest="sha1:" + "A" * 32)
    path.write_bytes(wrong + page(1) + page(2)[:-54])
    found, drops = read(path)
    assert found == urls(1)
    assert [drop.reason for drop in drops] == ["bad_digest", "short_record"]
    assert drops[1].detail == "https://a.org/2: 50 bytes are missing"


@pytest.mark.parametrize(
    "stated",
    [
        "sha1:VGMT4NSHA2AWVOR6EVYXQUGCNSONBWE5",
        "SHA-1:a9993e364706816aba3e25717850c26c9cd0d89d",
        "sha1:qZk+NkcGgWq6PiVxeFDCbJzQ2J0=",
        "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
        "crc7:00",
        None,
    ],
)
def test_digests_are_read_in_every_spelling(stated: str | None) -> None:
    assert broken_digest(stated, b"abc") == ""
    if stated and not stated.startswith("crc7"):
        assert "is not that of its bytes" in broken_digest(stated, b"abd")


def test_a_bomb_is_passed_over_in_constant_memory(path: Path) -> None:
    size = 200 << 20
    head = record("https://a.org/bomb", b"", Content_Length=str(size))[:-4]
    compress = zlib.compressobj(wbits=31)
    parts = [compress.compress(head)]
    parts += [compress.compress(bytes(1 << 20)) for _ in range(size >> 20)]
    bomb = b"".join([*parts, compress.flush()])
    path.write_bytes(member(page(0)) + bomb + member(page(1)))
    tracemalloc.start()
    found, drops = read(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found == urls(0, 1)
    assert [drop.reason for drop in drops] == ["too_large"]
    assert peak < 8 << 20


def test_a_record_that_claims_terabytes_is_not_inflated(path: Path) -> None:
    claim = record("https://a.org/bomb", b"x" * 99, Content_Length=str(1 << 50))
    path.write_bytes(member(claim) + member(page(1)))
    found, drops = read(path)
    assert found == urls(1)
    assert [drop.reason for drop in drops] == ["too_large", "damaged_file"]


def test_an_empty_file_zeros_and_noise_never_crash(path: Path) -> None:
    path.write_bytes(b"")
    assert [drop.detail for drop in read(path)[1]] == ["the file is empty"]
    path.write_bytes(member(page(0)) + bytes(4096) + member(page(1)) + bytes(4096))
    assert read(path) == (urls(0, 1), [])
    path.write_bytes(bytes(range(256)) * 40)
    assert Counter(drop.reason for drop in read(path)[1]) == {"damaged_file": 1}


def test_malformed_archives_yield_records_or_reasons(corpus: Path) -> None:
    for path in sorted((corpus / "warcio-test").rglob("*.*arc*")):
        found, drops = read(path)
        assert found or drops, path


def test_headers_in_angle_brackets_and_continued_lines_are_read(tmp_path: Path) -> None:
    path = tmp_path / "in.warc"
    block = http(b"x")
    head = f"WARC/1.0\nWARC-Type: response\nWARC-Target-URI:\n <https://a.org/b>\nContent-Length: {len(block)}\n\n"
    path.write_bytes(head.encode() + block)
    assert read(path) == (["https://a.org/b"], [])
