"""The datasheet says what the folder says, escapes what pages say, loads nothing and hides nothing."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from rlpt_data import datasheet, provenance
from rlpt_data.contamination import EvaluationSet, IndexConfig, build_index
from rlpt_data.datasheet import figures
from rlpt_data.prepare import PrepareConfig, prepare
from rlpt_data.shards import ShardFolder
from rlpt_data.strict import UserError

HOSTILE = '<script>alert(1)</script><img src="http://x.example/p.png" onerror=alert(2)>\u202e\x07'
QUESTIONS = (
    "How many apples are left when Ann gives three of her fourteen apples to Bob today?",
    "Which of the seven wonders of the ancient world is the only one still standing in Egypt?",
)
GERMAN = "Die Katze sitzt auf der Mauer und wartet geduldig, bis der Hund wieder nach Hause geht. "
ENGLISH = "The cat sits on the wall and waits with patience until the dog has gone home again. "


class Page(HTMLParser):
    """Tags, attributes, and the text as one reads it: what ends an element ends a word."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.words = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.words += data

    def handle_endtag(self, tag: str) -> None:
        self.words += "" if tag in ("span", "bdi") else " "

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", self.words)


def rows() -> list[dict[str, str]]:
    """20 pages of which one repeats another, one holds two evaluation items, and two are German."""
    pages = [f"Page {n}. " + ENGLISH * 4 for n in range(14)]
    pages += [f"Seite {n}. " + GERMAN * 4 for n in range(2)]
    pages += [pages[0], f"{ENGLISH} {QUESTIONS[0]} {ENGLISH} {QUESTIONS[1]}", "   "]
    pages += [HOSTILE + " Größe \N{SNOWMAN} " + ENGLISH * 8]
    sites = ["a.example"] * 12 + ["b.example"] * 8
    return [
        {"text": text, "url": f"https://{site}/{n}?<b>"}
        for n, (text, site) in enumerate(zip(pages, sites, strict=True))
    ]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("datasheet")
    (folder / "pages.jsonl").write_text("\n".join(json.dumps(row) for row in rows()))
    lines = [json.dumps({"q": question}) for question in (*QUESTIONS, "Nobody says this sentence")]
    (folder / "quiz.jsonl").write_text("\n".join(lines))
    chosen = EvaluationSet(name="quiz by two", path=folder / "quiz.jsonl", fields=("q",))
    build_index(IndexConfig(out=folder / "index.npz", sets=(chosen,)))
    table = {
        "out": str(folder / "shards"),
        "source": {
            "kind": "jsonl",
            "path": str(folder / "pages.jsonl"),
            "licence": "CC-BY-4.0",
            "notes": f"collected <i>by</i> hand {HOSTILE}",
        },
        "stages": [{"kind": "decontaminate", "index": str(folder / "index.npz")}],
        "tokenizer": {"kind": "byte"},
        "cuts": {"min_context": 8, "min_continuation": 8},
        "split": {"by": "document", "dev": 0.2, "test": 0.2},
    }
    prepare(PrepareConfig.model_validate_json(json.dumps(table)), progress=False)
    return folder / "shards"


@pytest.fixture(scope="module")
def page(shards: Path) -> Page:
    out = datasheet.default_path(shards)
    datasheet.write(shards, out)
    assert out == shards.resolve().parent / "shards.html"
    return Page(out.read_text(encoding="utf-8"))


def test_what_pages_say_is_shown_and_never_run(page: Page) -> None:
    assert "<script>alert(1)</script>" in page.text
    assert "collected <i>by</i> hand" in page.text
    assert not {"script", "img"} & set(page.tags)
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    # What turns a line round or rings a bell is spelled out.
    assert "\\u202e\\u0007" in page.text
    assert "\u202e" not in page.words


def test_the_page_loads_nothing(page: Page) -> None:
    assert not [value for _, name, value in page.attributes if name in ("src", "href", "srcset")]
    assert not {"link", "iframe", "object", "form", "a"} & set(page.tags)
    policies = [value for tag, name, value in page.attributes if (tag, name) == ("meta", "content")]
    assert "default-src 'none'; style-src 'unsafe-inline'" in policies
    assert "url(" not in page.words
    assert "@import" not in page.words


def test_the_funnel_counts_what_each_stage_took(shards: Path, page: Page) -> None:
    manifest = ShardFolder.open(shards).manifest
    found = {row["stage"]: (row["in"], row["left"], row["out"]) for row in figures.funnel(manifest)}
    assert found == {
        "read": (20, 0, 20),
        "extract": (20, 0, 20),
        "unicode": (20, 0, 20),
        "empty": (20, 1, 19),
        "duplicates": (19, 1, 18),
        "decontaminate": (18, 1, 17),
        "duplicates-again": (17, 0, 17),
        "encode": (17, 0, 17),
    }
    assert [row["kept"] for row in figures.funnel(manifest)][3:6] == [95.0, 90.0, 85.0]
    assert "Kept 85.0% of 20 records read" in page.text
    assert "contaminated 1 18 1 17 85.0%" in page.text


def test_every_evaluation_item_of_a_document_is_in_the_report(shards: Path, page: Page) -> None:
    found = figures.contamination(ShardFolder.open(shards))
    # The third item has four words: too short to be looked for.
    assert found["sets"] == [("quiz by two", 3, 2)]
    assert [(hit["item"], hit["rule"]) for hit in found["hits"]] == [
        ("quiz by two#0", "13 words"),
        ("quiz by two#1", "13 words"),
    ]
    assert {hit["where"] for hit in found["hits"]} == {"https://b.example/17?<b>"}
    assert "1 documents held evaluation items" in page.text
    assert "https://b.example/17?<b> quiz by two#1 13 words which of the seven wonders" in page.text


def test_lengths_fall_into_powers_of_two(shards: Path) -> None:
    bars = figures.lengths(ShardFolder.open(shards))
    texts = [row["text"] for row in rows()]
    kept = [text for n, text in enumerate(texts) if n not in (16, 17, 18)]
    sizes = [len(text.encode()) for text in kept]  # one byte a token
    assert [(bar.label, bar.count) for bar in bars] == [
        ("256 to 511", sum(256 <= size < 512 for size in sizes)),
        ("512 to 1,023", sum(512 <= size < 1024 for size in sizes)),
    ]
    assert [bar.width for bar in bars] == [100.0, 100 * bars[1].count / bars[0].count]
    assert sum(bar.share for bar in bars) == pytest.approx(1.0)


def test_domains_and_languages_are_counted(shards: Path, page: Page) -> None:
    folder = ShardFolder.open(shards)
    domains = figures.domains(folder)
    assert [(bar.label, bar.count) for bar in domains["bars"]] == [
        ("a.example", 12),
        ("b.example", 5),
    ]
    assert (domains["count"], domains["unknown"]) == (2, 0)
    languages = figures.languages(folder)
    assert languages["sample"] == 17
    assert [(bar.label, bar.count) for bar in languages["bars"]] == [("en", 15), ("de", 2)]
    assert "from all 17 documents" in page.text


def test_the_rarer_ones_are_counted_together() -> None:
    found = figures.Counter({"a": 5, "c": 2, "b": 2, "d": 1})
    assert [(bar.label, bar.count, bar.share) for bar in figures.most(found, 2)] == [
        ("a", 5, 0.5),
        ("b", 2, 0.2),
        ("2 others", 3, 0.3),
    ]


def test_both_sides_of_a_sample_join_to_the_text_around_the_cut(shards: Path) -> None:
    folder = ShardFolder.open(shards)
    texts = {d.url: d.text for name in ("train", "dev", "test") for d in folder.split(name)}
    found = datasheet.samples.cuts(folder)
    assert {sample.kind for sample in found} == {"sentence", "random"}
    assert len({sample.where for sample in found}) == len(found) == 6
    for sample in found:
        text = texts[sample.where].encode()
        context = "".join(sample.context).encode()
        shown = context + "".join(sample.continuation).encode()
        assert text[sample.byte - len(context) : sample.byte - len(context) + len(shown)] == shown
        assert sample.tokens_before + sample.tokens_after == len(text)
        assert len(shown) - len(context) == min(60, sample.tokens_after)
        assert sample.begins == (len(context) == sample.byte)


def test_licence_and_notes_are_shown_and_their_absence_is_said(page: Page, tmp_path: Path) -> None:
    assert "Licence CC-BY-4.0" in page.text
    (tmp_path / "pages.jsonl").write_text("\n".join(json.dumps(row) for row in rows()))
    table = {
        "out": str(tmp_path / "bare"),
        "source": {"kind": "jsonl", "path": str(tmp_path / "pages.jsonl")},
        "tokenizer": {"kind": "byte"},
        "split": {"by": "document", "dev": 0.2, "test": 0.2},
        "without_decontamination": True,
    }
    manifest = prepare(PrepareConfig.model_validate_json(json.dumps(table)), progress=False)
    # Shards prepared before there were licences still have the configuration they had.
    assert manifest.config["source"].keys() == {"kind", "path", "fields"}
    datasheet.write(tmp_path / "bare", tmp_path / "other/page.html")
    text = Page((tmp_path / "other/page.html").read_text(encoding="utf-8")).text
    assert "Licence not stated Notes not stated" in text
    assert "These documents were not compared with evaluation sets" in text
    with pytest.raises(UserError, match="lies in the shard folder"):
        datasheet.write(tmp_path / "bare", tmp_path / "bare/page.html")
    assert not (tmp_path / "bare/page.html").exists()


def test_every_part_of_a_mixture_and_of_a_merger_is_stated(tmp_path: Path) -> None:
    for name, word in (("near", "here"), ("far", "there")):
        lines = [json.dumps({"text": f"{n} {word}. " + ENGLISH * 3}) for n in range(8)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    table = {
        "out": str(tmp_path / "mixed"),
        "sources": [
            {
                "name": name,
                "weight": weight,
                "source": {"kind": "jsonl", "path": str(tmp_path / f"{name}.jsonl")} | stated,
            }
            for name, weight, stated in (("near", 1.0, {"licence": "MIT"}), ("far", 2.0, {}))
        ],
        "tokenizer": {"kind": "byte"},
        "split": {"by": "document", "dev": 0.0, "test": 0.0},
        "without_decontamination": True,
    }
    manifest = prepare(PrepareConfig.model_validate_json(json.dumps(table)), progress=False)
    found = provenance.sources_of({"merged": [{"config": manifest.config}] * 2})
    assert [(stated.name, stated.weight, stated.licence) for stated in found] == [
        ("far", 2.0, None),
        ("near", 1.0, "MIT"),
    ] * 2
    assert provenance.licence_of(manifest.config) is None
    assert manifest.sources is not None
    datasheet.write(tmp_path / "mixed", tmp_path / "mixed.html")
    text = Page((tmp_path / "mixed.html").read_text(encoding="utf-8")).text
    counted = manifest.sources["far"].documents
    assert f"Part far , weight 2: {counted} documents" in text
    assert text.index("Part far") < text.index("Part near") < text.index("Licence MIT")
