"""Stages that choose and change documents: each rule drops what it is about, and says its name."""

import io
import itertools
import json
import re
import struct
import tarfile
from pathlib import Path
from typing import Any

import pytest

from rlpt_data import choosing
from rlpt_data.choosing import LanguageConfig, UrlBlockListConfig
from rlpt_data.documents import Drop, SourceDocument
from rlpt_data.pii import PiiConfig, anonymous
from rlpt_data.quality import QualityConfig
from rlpt_data.sources import files
from rlpt_data.store import text_id
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


def test_the_bundled_list_is_read_from_its_archive_and_joins_the_given_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = tmp_path / "lists.tar.gz"
    with tarfile.open(archive, "w:gz") as file:
        for name, text in (("domains", b"Bad.org\nworse.org\n"), ("urls", b"good.org/page\n")):
            member = tarfile.TarInfo(name)
            member.size = len(text)
            file.addfile(member, io.BytesIO(text))
    monkeypatch.setattr(choosing, "_archive", lambda: archive)
    monkeypatch.setattr(choosing, "_ut1", choosing._ut1.__wrapped__)
    (tmp_path / "mine.txt").write_text("own.org\n")
    both = UrlBlockListConfig(kind="url-blocklist", path=tmp_path / "mine.txt", bundled="ut1")
    stage = both.build()
    urls = ("https://a.bad.org/", "http://worse.org", "https://good.org/page/", "http://own.org/x")
    assert [stage(SourceDocument("x", url=url)) for url in urls] == [
        Drop("blocked_url", url, found)
        for url, found in zip(
            urls, ("bad.org", "worse.org", "good.org/page", "own.org"), strict=True
        )
    ]
    kept = SourceDocument("x", url="https://good.org/another")
    assert stage(kept) == kept
    assert set(both.resources()) == {"url-blocklist", "url-blocklist-ut1"}


def test_a_block_list_is_named_and_older_plans_do_not_change(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="url-blocklist: no list; give path, or bundled"):
        UrlBlockListConfig(kind="url-blocklist")
    given = UrlBlockListConfig(kind="url-blocklist", path=tmp_path)
    assert set(given.model_dump()) == {"kind", "path"}


@pytest.mark.slow
def test_the_list_of_datatrove_has_what_fineweb_left_out() -> None:
    pytest.importorskip("datatrove")
    stage = UrlBlockListConfig(kind="url-blocklist", bundled="ut1").build()
    assert len(choosing._ut1()) == 4_578_527  # seconds, half a gigabyte
    listed = SourceDocument("x", url="https://www.0-1avsex.com/a")
    assert stage(listed) == Drop("blocked_url", "https://www.0-1avsex.com/a", "0-1avsex.com")
    kept = SourceDocument("x", url="https://digital.gov/")
    assert stage(kept) == kept


def fasttext_model(path: Path) -> None:
    """A model in fastText's own format, version 12: the -> en, der -> de, each with a logit of 8."""
    words = [(b"the", (8.0, 0.0)), (b"der", (0.0, 8.0))]
    labels = [(b"__label__en", (1.0, 0.0)), (b"__label__de", (0.0, 1.0))]
    # Two dimensions, softmax (3), supervised (3), no parts of words.
    data = struct.pack("<2i12id", 793712314, 12, 2, 5, 5, 1, 5, 1, 3, 3, 0, 0, 0, 100, 1e-4)
    data += struct.pack("<3i2q", 4, 2, 2, 100, -1)
    for number, (name, _) in enumerate(words + labels):
        data += name + b"\0" + struct.pack("<qb", 10, number >= 2)
    for rows in (words, labels):
        data += struct.pack("<?2q", False, 2, 2)
        data += b"".join(struct.pack("<2f", *vector) for _, vector in rows)
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("the the", "en"),
        ("der\nder", "de"),
        ("the der der der", "de"),  # logits 2 and 6: 0.982
        ("the the der der der", "de"),  # logits 3.2 and 4.8: 0.832
        ("the the the der der der der", "unsure (de)"),  # 24/7 and 32/7: 0.758
        ("zzz", "unknown"),
    ],
)
def test_a_fasttext_model_decides_by_its_score(tmp_path: Path, text: str, language: str) -> None:
    pytest.importorskip("fasttext")
    fasttext_model(tmp_path / "lid.bin")
    config = LanguageConfig(
        kind="language", languages=("fr",), model=tmp_path / "lid.bin", min_score=0.8
    )
    assert config.build()(SourceDocument(text)) == Drop(
        "language", text_id(text).hex(), f"{language}: {text}"
    )
    kept = config.model_copy(update={"languages": (language,)})
    assert kept.build()(SourceDocument(text)) == SourceDocument(text)


def test_a_file_that_is_no_fasttext_model_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("fasttext")
    (tmp_path / "lid.bin").write_text("no model")
    config = LanguageConfig(kind="language", languages=("en",), model=tmp_path / "lid.bin")
    with pytest.raises(UserError, match=r"lid\.bin has wrong file format!; give a fastText model"):
        config.build()


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
