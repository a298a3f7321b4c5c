"""Things that must not pass, planted among real web pages: each is handled, and the rest is untouched."""

import json
from pathlib import Path

import pytest
from archives import http, member, record

from rlpt_data.contamination import EvaluationSet, IndexConfig, build_index
from rlpt_data.prepare import PrepareConfig, prepare
from rlpt_data.shards import SPLITS, Document, ShardFolder, verify_folder
from rlpt_data.sources import files
from rlpt_data.tokenizer import PlainTokenizer

Made = tuple[Path, dict[str, Document]]


def texts(corpus: Path, count: int) -> list[str]:
    found = []
    for item in files.lines(corpus / "digitalgov.jsonl.zst"):
        text = json.loads(item[1])["text"]  # pyright: ignore
        if 1500 < len(text) < 8000 and "@" not in text:
            found.append(text)
        if len(found) == count:
            return found
    raise AssertionError("too few pages")


def html(text: str) -> bytes:
    paragraphs = text.replace("&", "&amp;").replace("<", "&lt;").split("\n\n")
    body = "".join(f"<p>{paragraph}</p>" for paragraph in paragraphs)
    return f"<html><body><main><article>{body}</article></main></body></html>".encode()


@pytest.fixture(scope="module")
def made(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Shards of a web archive of real pages with plants, and their documents by URL."""
    folder = tmp_path_factory.mktemp("planted")
    items = (corpus / "eval-gsm8k/test.jsonl").read_text().splitlines()[:50]
    (folder / "items.jsonl").write_text("\n".join(items))
    item = json.loads(items[7])["question"]
    clean = texts(corpus, 48)
    words = clean[0].split()
    # Every tenth of the near-duplicate is another: four fifths of all runs of 5 words are shared.
    near = " ".join([*words[: len(words) * 9 // 10], *clean[40].split()[: len(words) // 10]])
    plants = {
        "near": near,
        "equal": clean[1],
        "contaminated": f"{clean[41]}\n\nA puzzle: {item}\n\nMore of it below.",
        "mail": f"{clean[42]}\n\nWrite to jane.roe@agency.gov or 8.8.8.8 for more about it.",
        "control": f"{clean[43]}\n\nThe model says </think> and <|endoftext|> and <|im_end|> then.",
    }
    pages = {str(number): text for number, text in enumerate(clean[:40])} | plants
    archive = [member(record(f"https://a.org/{name}", http(html(t)))) for name, t in pages.items()]
    (folder / "in.warc.gz").write_bytes(b"".join(archive))
    chosen = EvaluationSet(name="gsm8k", path=folder / "items.jsonl", fields=("question", "answer"))
    build_index(IndexConfig(out=folder / "index.npz", sets=(chosen,)))
    table = {
        "out": str(folder / "shards"),
        "source": {"kind": "warc", "path": str(folder / "in.warc.gz")},
        "stages": [
            {"kind": "near-duplicates"},
            {"kind": "decontaminate", "index": str(folder / "index.npz")},
            {"kind": "pii"},
        ],
        "tokenizer": {"kind": "file", "path": str(corpus / "gpt2-tokenizer/tokenizer.json")},
    }
    prepare(PrepareConfig.model_validate_json(json.dumps(table)), progress=False)
    opened = ShardFolder.open(folder / "shards")
    rows = [row for name in SPLITS for row in opened.split(name)]
    return folder / "shards", {str(row.url).rsplit("/", 1)[1]: row for row in rows}


def test_the_rest_of_the_pages_is_there(made: Made) -> None:
    folder, rows = made
    # Two of the forty real pages are similar themselves.
    assert len({str(number) for number in range(2, 40)} - rows.keys()) == 1
    drops = ShardFolder.open(folder).manifest.drops
    assert drops == {"contaminated": 1, "duplicate": 1, "near_duplicate": 2}
    verify_folder(folder)


def test_an_evaluation_item_is_left_out_and_reported(made: Made) -> None:
    folder, rows = made
    assert "contaminated" not in rows
    (line,) = (folder / "dropped/contaminated.jsonl").read_text().splitlines()
    assert json.loads(line)["where"] == "https://a.org/contaminated"
    assert json.loads(line)["detail"].startswith("gsm8k#7 by 13 words: ")


def test_one_of_two_similar_and_of_two_equal_pages_stays(made: Made) -> None:
    _, rows = made
    assert len({"0", "near"} & rows.keys()) == 1
    # The one whose address sorts first.
    assert {"1", "equal"} & rows.keys() == {"1"}


def test_addresses_are_replaced_and_no_cut_lies_inside(made: Made) -> None:
    _, rows = made
    text = rows["mail"].text
    assert "jane.roe" not in text
    assert "8.8.8.8" not in text
    start, stop = text.index("user"), text.index("@example.com") + len("@example.com")
    edges = rows["mail"].offsets[rows["mail"].cuts].tolist()
    assert not [e for e in edges if len(text[:start].encode()) < e < len(text[:stop].encode())]


def test_control_tokens_are_plain_text_to_the_last_byte(made: Made, corpus: Path) -> None:
    _, rows = made
    row = rows["control"]
    assert row.text.endswith("The model says </think> and <|endoftext|> and <|im_end|> then.")
    tokenizer = PlainTokenizer.cached(corpus / "gpt2-tokenizer/tokenizer.json")
    assert tokenizer.decode(row.ids) == row.text.encode()
    table = json.loads((corpus / "gpt2-tokenizer/tokenizer.json").read_text())
    special = {token["id"] for token in table["added_tokens"]}
    assert special
    assert not special & set(row.ids.tolist())
