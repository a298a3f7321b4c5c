"""Corpus -> shards: the same bytes for the same corpus, and one line for every mistake."""

import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from rlpt_data.documents import SourceDocument, SourceThought
from rlpt_data.prepare import PrepareConfig, inspect, prepare, render_inspect
from rlpt_data.shards import CUT_KINDS, ShardFolder, verify_folder
from rlpt_data.strict import UserError
from rlpt_data.tokenizer import train_byte_pairs

Configured = Callable[..., PrepareConfig]
WORDS = ["river", "stone", "light", "under", "many", "small", "houses", "went", "home", "again"]
SPECIAL = "It says </think> and <think> and <|endoftext|> here. "


def page(number: int) -> str:
    rng = random.Random(number)
    sentences = [" ".join(rng.choices(WORDS, k=8)).capitalize() + "." for _ in range(12)]
    return SPECIAL + " ".join(sentences[:6]) + "\n\n" + " ".join(sentences[6:]) + "\n"


def write_pages(path: Path, numbers: list[int], prefix: str = "") -> None:
    rows = [{"text": page(n), "url": f"https://{prefix}site{n % 7}.org/{n}"} for n in numbers]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def pages(tmp_path: Path, configured: Configured) -> Configured:
    """A configuration over 60 pages in ``pages.jsonl``."""
    write_pages(tmp_path / "pages.jsonl", list(range(60)))

    def make(*overrides: str) -> PrepareConfig:
        toml = f"""
            [source]
            kind = "jsonl"
            path = "{tmp_path}/pages.jsonl"
            [tokenizer]
            kind = "bpe"
            vocab_size = 300
            [cuts]
            min_context = 8
            min_continuation = 8
            [split]
            dev = 0.1
            test = 0.1
        """
        return configured(toml, *overrides)

    return make


def run(config: PrepareConfig, **options: bool) -> Any:
    return prepare(config, progress=False, **options)


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_shards_hold_every_page_exactly_and_verify(pages: Configured, tmp_path: Path) -> None:
    manifest = run(pages())
    report = verify_folder(tmp_path / "shards")
    assert report["train"] + report["dev"] + report["test"] == 60
    assert manifest.drops == {}
    folder = ShardFolder.open(tmp_path / "shards")
    pieces = folder.token_bytes()
    texts = set()
    for name in ("train", "dev", "test"):
        for document in folder.split(name):
            texts.add(document.text)
            assert b"".join(pieces[i] for i in document.ids) == document.text.encode()
            assert len(document.cuts) > 0
            assert document.cuts[0] >= 8
            assert document.num_tokens - document.cuts[-1] >= 8
            for cut, kind in zip(document.cuts, document.cut_kinds, strict=True):
                before = document.text.encode()[: document.offsets[cut]]
                assert CUT_KINDS[kind] != "sentence" or before.endswith(b".")
    assert texts == {page(number) for number in range(60)}


def test_the_same_corpus_gives_the_same_bytes(pages: Configured, tmp_path: Path) -> None:
    run(pages())
    once = contents(tmp_path / "shards")
    run(pages(), overwrite=True)
    assert contents(tmp_path / "shards") == once


def test_the_order_of_the_input_does_not_matter(pages: Configured, tmp_path: Path) -> None:
    duplicate = json.dumps({"text": page(3), "url": "https://a.org/first"}) + "\n"
    # More drops of one reason than samples are kept of it.
    empty = "".join(json.dumps({"text": " ", "url": f"e{number}"}) + "\n" for number in range(30))
    forward = (tmp_path / "pages.jsonl").read_text() + duplicate + empty
    (tmp_path / "pages.jsonl").write_text(forward)
    run(pages())
    once = contents(tmp_path / "shards")
    backward = "".join(reversed(forward.splitlines(keepends=True)))
    (tmp_path / "pages.jsonl").write_text(backward)
    run(pages(), overwrite=True)
    again = contents(tmp_path / "shards")
    assert once.keys() == again.keys()
    # The manifest alone differs: it names the input's hash.
    differing = {name for name, data in once.items() if data != again[name]}
    assert differing == {"manifest.json"}


def test_order_is_shuffled_by_seed_and_split_is_not(pages: Configured, tmp_path: Path) -> None:
    def read() -> tuple[list[str], set[str]]:
        ids = ShardFolder.open(tmp_path / "shards").split("train").document_ids
        return ids, set(ids)

    run(pages())
    first, sides = read()
    run(pages("seed=1"), overwrite=True)
    second, same = read()
    assert same == sides
    assert first != second
    assert first != sorted(first)


def test_a_second_run_does_nothing_and_says_so(
    pages: Configured, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = run(pages())
    before = (tmp_path / "shards/manifest.json").stat().st_mtime_ns
    assert run(pages()) == first
    assert "already prepared" in " ".join(capsys.readouterr().err.split())
    assert (tmp_path / "shards/manifest.json").stat().st_mtime_ns == before


def test_other_shards_are_never_replaced_unasked(pages: Configured, tmp_path: Path) -> None:
    first = run(pages())
    with pytest.raises(UserError, match=r"holds other shards \(another cuts, seed\)"):
        run(pages("seed=1", "cuts.min_context=9"))
    write_pages(tmp_path / "pages.jsonl", list(range(61)))
    with pytest.raises(UserError, match="the corpus has changed"):
        run(pages())
    assert ShardFolder.open(tmp_path / "shards").manifest == first
    assert run(pages(), overwrite=True).hash != first.hash


def test_a_damaged_folder_is_written_again(pages: Configured, tmp_path: Path) -> None:
    first = run(pages())
    shard = tmp_path / "shards/train/00000.arrow"
    shard.write_bytes(shard.read_bytes()[:-5])
    assert run(pages()).hash == first.hash
    verify_folder(tmp_path / "shards")


def test_a_folder_that_is_no_shard_folder_is_never_touched(
    pages: Configured, tmp_path: Path
) -> None:
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards/thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="not a shard folder, so it is not touched"):
        run(pages(), overwrite=True)
    assert (tmp_path / "shards/thesis.txt").read_text() == "mine"


def test_drops_are_counted_by_reason_with_samples(pages: Configured, tmp_path: Path) -> None:
    bad = [
        json.dumps({"text": "   \n", "url": "https://e.org/empty"}),
        json.dumps({"text": "short", "url": "https://e.org/short"}),
        json.dumps({"text": "x" * 90, "url": "https://e.org/no-space"}),
        json.dumps({"text": page(3), "url": "https://z.org/duplicate"}),
        '{"text": "\\ud800 alone", "url": "https://e.org/surrogate"}',
        "{",
    ]
    with (tmp_path / "pages.jsonl").open("a") as file:
        file.writelines(line + "\n" for line in bad)
    manifest = run(pages())
    assert manifest.drops == dict.fromkeys(
        ("bad_json", "duplicate", "empty", "no_cut", "not_unicode", "too_short"), 1
    )
    found = inspect(tmp_path / "shards")
    where = {reason: drop["samples"][0]["where"] for reason, drop in found["drops"].items()}
    assert where["duplicate"] == "https://z.org/duplicate"
    assert where["bad_json"].endswith("pages.jsonl:66")
    assert where["too_short"] == "https://e.org/short"
    verify_folder(tmp_path / "shards")


def test_an_empty_corpus_says_what_became_of_it(pages: Configured, tmp_path: Path) -> None:
    (tmp_path / "pages.jsonl").write_text("{\n\n")
    with pytest.raises(UserError, match=r"\[source\] kind = jsonl: no documents \(1 bad_json\)"):
        run(pages())
    (tmp_path / "pages.jsonl").write_text("")
    with pytest.raises(UserError, match="no documents"):
        run(pages())
    assert not (tmp_path / "shards").exists()


def test_an_empty_side_is_refused_even_when_only_drops_emptied_it(
    pages: Configured, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"\[split\] (train|dev|test): none of"):
        run(pages("cuts.min_context=5000"))
    write_pages(tmp_path / "pages.jsonl", [1, 2])
    with pytest.raises(UserError, match=r"\[split\] (train|dev|test): none of"):
        run(pages())
    assert not (tmp_path / "shards").exists()


def test_a_given_tokenizer_is_kept_byte_for_byte_and_its_change_is_noticed(
    pages: Configured, tmp_path: Path
) -> None:
    run(pages())
    given = tmp_path / "given.json"
    given.write_bytes((tmp_path / "shards/tokenizer.json").read_bytes() + b"\n")
    arguments = (f"out={tmp_path}/second", f'tokenizer={{kind="file", path="{given}"}}')
    manifest = run(pages(*arguments))
    assert (tmp_path / "second/tokenizer.json").read_bytes() == given.read_bytes()
    assert manifest.vocab_size == 300
    given.write_bytes(given.read_bytes() + b"\n")
    with pytest.raises(UserError, match="the corpus has changed"):
        run(pages(*arguments))


def test_the_tokenizer_is_trained_on_the_train_split_alone(
    pages: Configured, tmp_path: Path
) -> None:
    run(pages())
    train = [row.text for row in ShardFolder.open(tmp_path / "shards").split("train")]
    everything = [page(number) for number in range(60)]
    found = (tmp_path / "shards/tokenizer.json").read_bytes()
    assert found == train_byte_pairs(train, 300) != train_byte_pairs(everything, 300)


def test_a_lossy_tokenizer_is_refused(pages: Configured, tmp_path: Path) -> None:
    run(pages())
    table = json.loads((tmp_path / "shards/tokenizer.json").read_text())
    table["normalizer"] = {"type": "Lowercase"}
    (tmp_path / "lossy.json").write_text(json.dumps(table))
    arguments = (f"out={tmp_path}/x", f'tokenizer={{kind="file", path="{tmp_path}/lossy.json"}}')
    with pytest.raises(UserError, match=r"lossy\.json: loses bytes of 60 of 60 documents"):
        run(pages(*arguments))


def supply(monkeypatch: pytest.MonkeyPatch, *supplied: SourceDocument) -> None:
    plain = [SourceDocument(page(number)) for number in range(60)]
    monkeypatch.setattr("rlpt_data.sources.read", lambda *_: iter([*plain, *supplied]))


def rows(folder: Path) -> dict[str, Any]:
    opened = ShardFolder.open(folder)
    return {row.text: row for name in ("train", "dev", "test") for row in opened.split(name)}


def test_supplied_cuts_thoughts_and_spans_become_token_positions(
    pages: Configured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "é 12=3. Then"
    thoughts = (SourceThought(6, "1+2</think>", "hand"), SourceThought(6, "", "empty"))
    spans = ((0, 2), (6, 8))
    supply(monkeypatch, SourceDocument(text, cuts=(8, 6), thoughts=thoughts, target_spans=spans))
    run(pages('tokenizer={kind="byte"}'))
    row = rows(tmp_path / "shards")[text]
    assert row.cuts.tolist() == [6, 8]
    assert row.cut_kinds.tolist() == [0, 0]
    assert [(t.cut, bytes(t.ids.tolist()), t.source) for t in row.thoughts] == [
        (6, b"1+2</think>", "hand"),
        (6, b"", "empty"),
    ]
    assert row.target_spans == ((0, 2), (6, 8))
    verify_folder(tmp_path / "shards")


def test_supplied_positions_inside_a_token_drop_the_document(
    pages: Configured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = page(0) + "river"  # "river" is frequent enough to have merges
    inside = len(text.encode()) - 2
    supply(
        monkeypatch,
        SourceDocument(text, cuts=(inside,)),
        SourceDocument(text + "!", thoughts=(SourceThought(inside, "x", "hand"),)),
        SourceDocument(text + "?", target_spans=((inside, inside + 1),)),
    )
    assert run(pages()).drops == {"cut_inside_token": 2, "span_inside_token": 1}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"cuts": (5,)}, r"u: cut at byte 5 of a document with 5; correct the source"),
        ({"cuts": (0,)}, r"u: cut at byte 0 of a document with 5"),
        ({"cuts": (2,), "thoughts": (SourceThought(9, "x", ""),)}, r"u: thought at byte 9"),
        ({"cuts": (2,), "target_spans": ((2, 6),)}, r"u: target span at byte 6"),
        ({"cuts": (2,), "target_spans": ((2, 4), (3, 5))}, r"target_spans .* overlap"),
        ({"cuts": (2,), "target_spans": ((2, 2),)}, r"target_spans .* overlap"),
    ],
)
def test_positions_outside_the_document_are_the_sources_mistake(
    pages: Configured, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], expected: str
) -> None:
    supply(monkeypatch, SourceDocument("abcde", url="u", **changes))
    with pytest.raises(UserError, match=expected):
        run(pages('tokenizer={kind="byte"}'))


def test_max_documents_reads_no_more(pages: Configured) -> None:
    counts = run(pages("max_documents=40")).counts
    assert sum(side.documents for side in counts.values()) == 40


def test_inspect_shows_counts_drops_and_marks_at_the_cuts(
    pages: Configured, tmp_path: Path
) -> None:
    manifest = run(pages("cuts.kinds=['paragraph']"))
    found = inspect(tmp_path / "shards")
    json.dumps(found)
    assert found["counts"]["train"]["documents"] == manifest.counts["train"].documents
    total = sum(side["documents"] for side in found["counts"].values())
    assert sum(side["paragraph"] for side in found["cuts"].values()) == total
    assert ".\u2502\n\n" in found["documents"][0]["excerpt"]
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(render_inspect(found))
    assert found["hash"] in console.export_text()


def test_every_configuration_of_the_repository_parses() -> None:
    from rlpt_data.strict import load

    paths = sorted((Path(__file__).parents[2] / "configs/data").glob("*.toml"))
    paths = [path for path in paths if path.stem != "evaluation_sets"]
    assert [load(PrepareConfig, path).out.name for path in paths] == [p.stem for p in paths]


def test_arrays_are_views_of_the_file(pages: Configured, tmp_path: Path) -> None:
    run(pages())
    document = ShardFolder.open(tmp_path / "shards").split("train")[0]
    assert not document.ids.flags.writeable
    assert isinstance(document.ids.base, object)
    assert document.ids.dtype == np.uint32
