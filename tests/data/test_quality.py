"""Stages that choose and change documents: each rule drops what it is about, and says its name."""

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest

from rlpt_data.choosing import LanguageConfig, UrlBlockListConfig
from rlpt_data.documents import Drop, SourceDocument
from rlpt_data.pii import PiiConfig, anonymous
from rlpt_data.quality import QualityConfig
from rlpt_data.sources import files
from rlpt_data.strict import UserError

GOOD = """The river runs through the old town and past the mill, where the baker buys his flour.
In the morning the fishermen come down to the bridge with their nets and talk of the weather.
Most of them have known one another since they were children in the school behind the church.
When the ferry arrives, visitors walk up the hill to look at the castle and to take pictures.
At night the lamps are lit along the quay and music can be heard from the open windows."""


def judged(text: str, **changes: Any) -> str:
    stage = QualityConfig(kind="quality", **{"profile": "fast", **changes}).build()
    found = stage(SourceDocument(text))
    return found.reason if isinstance(found, Drop) else "kept"


@pytest.mark.parametrize("profile", ["fast", "fineweb"])
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (GOOD, "kept"),
        ("\n".join(GOOD.splitlines()[:2]), "gopher_short_doc"),
        (GOOD + "\n" + "\n".join([GOOD.splitlines()[0]] * 4), "dup_line_frac"),
        ("spam eggs and the " * 80, "top_2_gram"),
        (GOOD + " { x }", "curly_bracket"),
        (GOOD + " Lorem ipsum dolor.", "lorem_ipsum"),
        ("\n".join(GOOD.splitlines()[:4]), "too_few_sentences"),
        ("\n".join(f"- {line}" for line in GOOD.splitlines()), "gopher_too_many_bullets"),
    ],
)
def test_each_rule_drops_what_it_is_about(profile: str, text: str, expected: str) -> None:
    pytest.importorskip("datatrove")
    if profile == "fineweb":
        pytest.importorskip("spacy")
    assert judged(text, profile=profile) == expected


def test_lines_about_cookies_are_taken_out_and_supplied_cuts_forbid_it() -> None:
    pytest.importorskip("datatrove")
    stage = QualityConfig(kind="quality", profile="fast").build()
    text = GOOD + "\nThis page needs JavaScript to run, so please enable it."
    found = stage(SourceDocument(text, url="u"))
    assert found == SourceDocument(GOOD, url="u")
    with pytest.raises(UserError, match="leave it out of rules"):
        stage(SourceDocument(text, cuts=(10,)))


def test_the_fast_order_decides_as_the_published_one(corpus: Path) -> None:
    pytest.importorskip("datatrove")
    published = ("gopher-repetition", "gopher-quality", "c4", "fineweb")
    for number, item in enumerate(files.lines(corpus / "digitalgov.jsonl.zst")):
        if number == 80:
            break
        assert not isinstance(item, Drop)
        text = json.loads(item[1])["text"]
        assert (judged(text) == "kept") == (judged(text, rules=published) == "kept")


def test_rules_can_be_chosen() -> None:
    pytest.importorskip("datatrove")
    assert judged("\n".join(GOOD.splitlines()[:2]), rules=("gopher-repetition",)) == "kept"


def test_listed_hosts_and_pages_are_blocked_with_all_below_them(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("# bad\nBad.org\nhttps://good.org/page/\nco.uk.evil.com\n")
    stage = UrlBlockListConfig(kind="url-blocklist", path=tmp_path / "list.txt").build()
    blocked = {
        url: isinstance(stage(SourceDocument("x", url=url)), Drop)
        for url in (
            *("https://bad.org/x", "http://www.sub.BAD.org:80/", "https://good.org/page"),
            *("https://notbad.org/", "https://good.org/page2", "http://[broken", "bad.org.com"),
        )
    }
    assert [*blocked.values()] == [True, True, True, False, False, False, False]
    absent = UrlBlockListConfig(kind="url-blocklist", path=tmp_path / "absent")
    with pytest.raises(UserError, match="absent: no such file"):
        absent.resources()


def test_only_the_chosen_languages_stay() -> None:
    pytest.importorskip("resiliparse")
    stage = LanguageConfig(kind="language", languages=("en",)).build()
    german = (
        "Der Fluss fließt durch die alte Stadt und an der Mühle vorbei, wo der Bäcker kauft. " * 4
    )
    assert stage(SourceDocument(GOOD)) == SourceDocument(GOOD)
    found = stage(SourceDocument(german))
    assert isinstance(found, Drop)
    assert found.reason == "language"
    assert not found.detail.startswith("en:")
    with pytest.raises(ValueError, match="languages"):
        LanguageConfig(kind="language", languages=())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("mail jane.doe+x@mail.corp.co.uk.", r"mail user\d{6}@example\.com\."),
        ("<a@b.io>", r"<user\d{6}@example\.com>"),
        ("server 8.8.8.8, port 53", r"server 192\.0\.2\.\d+, port 53"),
        ("local 192.168.1.1 and 10.0.0.1", r"local 192\.168\.1\.1 and 10\.0\.0\.1"),
        ("version 1.2.3.4.5 and 999.1.1.1", r"version 1\.2\.3\.4\.5 and 999\.1\.1\.1"),
        ("you@example.com, a@b.test, @name, a@b, x @ y.com", None),
        ("", None),
    ],
)
def test_addresses_become_those_that_nobody_has(text: str, expected: str | None) -> None:
    found = anonymous(text)
    assert re.fullmatch(expected or re.escape(text), found)
    assert anonymous(found) == found


def test_a_replacement_depends_on_the_address_alone() -> None:
    one, two = anonymous("x@corp.com y@corp.com"), anonymous("y@corp.com then X@corp.com")
    assert one.split() == [two.split()[-1], two.split()[0]]
    assert anonymous("a@b.com", emails=False) == "a@b.com"
    stage = PiiConfig(kind="pii").build()
    with pytest.raises(UserError, match="clean the source first"):
        stage(SourceDocument("a@b.com", cuts=(3,)))


def test_no_address_takes_long_to_look_for() -> None:
    import time

    started = time.process_time()
    for text in ("a." * 50_000 + "@", "a@" * 50_000, "1." * 100_000, "a@b." + "c-" * 50_000):
        anonymous(text)
    assert time.process_time() - started < 5.0


def test_real_pages_lose_their_addresses(corpus: Path) -> None:
    found = 0
    for item in itertools.islice(files.lines(corpus / "digitalgov.jsonl.zst"), 1000):
        assert not isinstance(item, Drop)
        text = json.loads(item[1])["text"]
        found += (changed := anonymous(text)) != text
        for address in re.findall(r"[\w.]+@[\w-]+\.[\w.]*\w", changed):
            assert "example." in address or not re.search(r"@[\w.-]+\.[A-Za-z]{2,}$", address)
    assert found > 20
