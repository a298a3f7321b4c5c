"""The sandbox: a page that hangs, crashes or eats memory costs itself and says how."""

import json
import os
import re
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from archives import http, record

from rlpt_data.documents import Drop, SourceDocument
from rlpt_data.extraction.sandbox import LimitsConfig, Sandbox
from rlpt_data.sources.warc import WarcConfig, documents, pages
from rlpt_data.sources.warc_records import Record, records
from rlpt_data.strict import UserError

BEHAVIOUR = """
import os, time
count = 0
def extract(html):
    global count
    count += 1
    if "spin" in html:
        while True: pass
    if "sleep" in html: time.sleep(60)
    if "die" in html: os._exit(3)
    if "segv" in html: os.kill(os.getpid(), 11)
    if "hungry" in html: return "x" * (8 << 30)
    if "raise" in html: raise KeyError("odd page")
    if "print" in html: print("noise on stdout", flush=True)
    if "nothing" in html: return None
    if "count" in html: return str(count)
    return html.upper()
"""


@pytest.fixture
def box(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Sandbox]:
    (tmp_path / "behaviour.py").write_text(BEHAVIOUR)
    monkeypatch.syspath_prepend(tmp_path)
    limits = LimitsConfig(cpu_seconds=0.3, wall_seconds=2.0, page_bytes=1000)
    with Sandbox("behaviour:extract", limits) as sandbox:
        yield sandbox


def test_a_page_costs_itself_and_the_next_one_is_read(box: Sandbox) -> None:
    for page, reason, detail in [
        ("spin", "extract_timeout", "more than 0.3 s of CPU time"),
        ("die", "extract_crash", "exit status 3"),
        ("segv", "extract_crash", f"exit status -{signal.SIGSEGV.value}"),
        ("hungry", "extract_error", "MemoryError: "),
        ("raise", "extract_error", "KeyError: 'odd page'"),
        ("nothing", "nothing_extracted", ""),
        ("x" * 1001, "too_large", "1001 bytes of HTML, the limit is 1000"),
    ]:
        outcome = box.extract(page)
        assert (outcome.reason, outcome.detail, outcome.text) == (reason, detail, "")
        assert box.extract("after print").text == "AFTER PRINT"


@pytest.mark.slow
def test_a_page_that_waits_is_ended_by_wall_time(box: Sandbox) -> None:
    started = time.monotonic()
    assert box.extract("sleep").reason == "extract_timeout"
    assert time.monotonic() - started < 20


def test_one_process_reads_many_pages_and_leaves_with_the_sandbox(box: Sandbox) -> None:
    # The probe page was the first.
    assert [box.extract("count").text for _ in range(3)] == ["2", "3", "4"]
    child = box._child
    assert child is not None
    box.__exit__(None, None, None)
    with pytest.raises(ProcessLookupError):
        os.kill(child.pid, 0)


def test_characters_no_parser_likes_reach_it_harmlessly(box: Sandbox) -> None:
    assert box.extract("a\0b\ud800c").text == "AB?C"


def test_a_broken_extractor_stops_the_job(box: Sandbox) -> None:
    for _ in range(5):
        box.extract("raise")
    with pytest.raises(UserError, match=r"6 of the first 6 pages failed.*mend the installation"):
        box.extract("raise")


def test_a_few_failures_among_many_pages_do_not(box: Sandbox) -> None:
    for number in range(200):
        box.extract("raise" if number % 25 == 0 else "fine")


@pytest.mark.parametrize("name", ["absent_module:extract", "html:absent", "nothing"])
def test_an_extractor_that_is_not_there_is_the_users_mistake(name: str) -> None:
    with Sandbox(name, LimitsConfig()) as box, pytest.raises(UserError, match=f"= {name}: "):
        box.extract("page")


def test_a_missing_dependency_never_looks_like_pages_without_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("trafilatura")
    (tmp_path / "lxml_html_clean.py").write_text("raise ImportError('not installed')")
    monkeypatch.syspath_prepend(tmp_path)
    with (
        Sandbox("trafilatura", LimitsConfig()) as box,
        pytest.raises(UserError, match=r"not installed; pip install 'rlpt\[data\]'"),
    ):
        box.extract("page")


def test_an_archive_goes_through_the_sandbox(tmp_path: Path) -> None:
    path = tmp_path / "in.warc"
    path.write_bytes(
        record("https://a.org", http(b"<p>one</p>")) + record("b", http(b"<script>x</script>"))
    )
    config = WarcConfig(kind="warc", path=path)
    found = list(documents(config))
    assert found[0] == SourceDocument("one", url="https://a.org")
    assert isinstance(found[1], Drop)
    assert found[1].reason == "nothing_extracted"


@pytest.mark.parametrize("name", ["trafilatura", "resiliparse"])
def test_the_text_of_a_page_does_not_depend_on_earlier_pages(corpus: Path, name: str) -> None:
    pytest.importorskip(name)
    (page,) = pages(corpus / "commoncrawl-whirlwind/whirlwind.warc.gz", 1 << 20)
    assert not isinstance(page, Drop | SourceDocument)
    with Sandbox(name, LimitsConfig()) as box:
        found = {box.extract(page.html).text for _ in range(5)}
    assert len(found) == 1
    assert "Escopete" in found.pop()


def shingles(text: str) -> Counter[tuple[str, ...]]:
    words = re.findall(r"\w+", text)
    return Counter(tuple(words[at : at + 4]) for at in range(max(1, len(words) - 3)))


def f1(pairs: list[tuple[str, str]]) -> float:
    """Of four-word shingles (found, gold): precision and recall with every page counting alike."""
    right = extra = missing = 0.0
    for found, gold in pairs:
        a, b = shingles(found), shingles(gold)
        common, total = (a & b).total(), (a | b).total()
        right += common / total
        extra += (a - b).total() / total
        missing += (b - a).total() / total
    return 2 * right / (2 * right + extra + missing)


def test_f1_is_that_of_a_hand_counted_example() -> None:
    assert f1([("a b c d e", "a b c d e")]) == 1.0
    # One of two found shingles is right, and one of the two in the gold text is found.
    assert f1([("a b c d x", "a b c d e")]) == pytest.approx(0.5)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "least"), [("trafilatura", 0.95), ("resiliparse", 0.92)])
def test_extraction_meets_the_gold_text(corpus: Path, name: str, least: float) -> None:
    pytest.importorskip(name)
    gold = {}
    for line in (corpus / "sample.gold.jsonl").read_text().splitlines():
        row = json.loads(line)
        if "articleBody" in row:
            gold[row["record_id"]] = row["articleBody"]
    ids = [
        item.headers["warc-record-id"]
        for item in records(corpus / "sample.warc.gz", 16 << 20)
        if isinstance(item, Record)
    ]
    pairs = []
    with Sandbox(name, LimitsConfig()) as box:
        for key, page in zip(ids, pages(corpus / "sample.warc.gz", 16 << 20), strict=True):
            if key in gold:
                assert not isinstance(page, Drop | SourceDocument)
                pairs.append((box.extract(page.html).text, gold[key]))
    assert len(pairs) == 181
    assert f1(pairs) >= least
