"""No evaluation item reaches a shard, and every document that is left out says which it held."""

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlpt_data.contamination import (
    EvaluationSet,
    Index,
    IndexConfig,
    build_index,
)
from rlpt_data.manifest import read_manifest
from rlpt_data.prepare import PrepareConfig, prepare
from rlpt_data.shards import ShardFolder, verify_folder
from rlpt_data.sources import files
from rlpt_data.strict import UserError, parse

ITEM = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen"
OTHER = "a b c d e f g h i j k l m n o p q r s t"
Make = Callable[..., PrepareConfig]


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        (f"Before. {ITEM.upper()}, after.", "13 words"),
        (
            "two three four five six seven eight nine ten eleven twelve thirteen fourteen",
            "13 words",
        ),
        # 7 of its 8 runs of eight words, but no thirteen in a row
        ("x one two three four five six seven eight nine ten eleven twelve y", "62% of its runs"),
        ("four five six seven eight nine ten eleven x twelve", None),
        ("the answer is forty two", "all its 5 words"),
        ("the answer is forty", None),
        ("short item", None),
        ("", None),
    ],
)
def test_each_rule_finds_what_it_should_and_no_more(text: str, rule: str | None) -> None:
    items = {"s#0": OTHER, "s#1": ITEM, "s#2": "The answer is forty-two.", "s#3": "short item"}
    hit = Index.of(items).hit(text)
    assert (hit is None) == (rule is None)
    if hit is not None:
        assert rule is not None
        assert hit.rule.startswith(rule)
        assert hit.item == ("s#2" if rule.startswith("all") else "s#1")
        assert hit.words in text.lower().replace(",", "")


@pytest.mark.parametrize(
    ("name", "data", "told"),
    [
        ("a.jsonl", b'{"q": "x"}\n{"q": \n', r"a\.jsonl:2: EOF while parsing.*; an index needs"),
        ("a.jsonl", b"[1]\n", r"a\.jsonl:1: no JSON object; an index needs every item"),
        ("a.parquet", b"PAR1", r"a\.parquet: .*; an index needs every item"),
    ],
    ids=["json", "list", "parquet"],
)
def test_a_set_that_cannot_be_read_whole_is_one_line(
    tmp_path: Path, name: str, data: bytes, told: str
) -> None:
    (tmp_path / name).write_bytes(data)
    chosen = EvaluationSet(name="s", path=tmp_path / name, fields=("q",))
    with pytest.raises(UserError, match=told):
        build_index(IndexConfig(out=tmp_path / "i.npz", sets=(chosen,)))
    assert not (tmp_path / "i.npz").exists()


def test_sets_of_one_name_are_refused() -> None:
    table = {"name": "s", "path": "a.jsonl", "fields": ["q"]}
    with pytest.raises(UserError, match=r"names of \[\[sets\]\] must differ; got s, s"):
        parse(IndexConfig, {"out": "i.npz", "sets": [table, table]}, "sets.toml")


def test_a_run_that_two_items_share_counts_for_both() -> None:
    shared = "one two three four five six seven eight nine"
    items = {
        "long": f"{shared} " + " ".join(f"x{n}" for n in range(40)),
        "half": f"{shared} y z u v",
    }
    hit = Index.of(items).hit(f"{shared} something else")
    assert hit is None
    hit = Index.of(items).hit(f"{shared} y z something else")
    assert hit is not None
    assert (hit.item, hit.rule) == ("half", "67% of its runs of 8 words")


def test_every_item_of_a_text_is_a_hit_and_each_counts_once() -> None:
    whole = " ".join(f"word{n}" for n in range(20))
    other = " ".join(f"thing{n}" for n in range(14))
    half = " ".join(f"part{n}" for n in range(15))
    index = Index.of(
        {"whole": whole, "other": other, "half": half, "short": "one two three four five"}
    )
    # Of the 8 runs of 8 words of `half` the text holds 5: no run of 13, but more than half.
    start_of_half = " ".join(half.split()[:12])
    found = index.hits(f"{other} and {whole} and {start_of_half} and one two three four five")
    assert [(hit.item, hit.rule) for hit in found] == [
        ("other", "13 words"),
        ("whole", "13 words"),
        ("short", "all its 5 words"),
        ("half", "62% of its runs of 8 words"),
    ]
    assert index.hits("nothing of the kind is in this text at all") == []


def test_an_index_is_read_back_and_equal_sets_are_equal_bytes(tmp_path: Path) -> None:
    items = {"a#0": ITEM, "b#0": OTHER, "b#1": "the answer is forty two"}
    data = Index.of(items).to_bytes()
    assert data == Index.of(items).to_bytes()
    found = Index.from_bytes(data, "x")
    assert found.names == list(items)
    assert str(found.hit(ITEM)) == str(Index.of(items).hit(ITEM))
    with pytest.raises(UserError, match="x: no index"):
        Index.from_bytes(b"PK", "x")


def test_sets_come_from_lines_and_parquet_and_say_what_is_missing(tmp_path: Path) -> None:
    rows = [{"q": ITEM, "a": "x"}, {"q": "no", "a": "y"}]
    (tmp_path / "s.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "s.parquet")
    sets = [
        EvaluationSet(name=name, path=tmp_path / name, fields=("q", "a"))
        for name in ("s.jsonl", "s.parquet")
    ]
    found = build_index(IndexConfig(out=tmp_path / "deep/i.npz", sets=tuple(sets)))
    assert found["sets"]["s.jsonl"] == found["sets"]["s.parquet"] == {"items": 2, "too_short": 1}
    wrong = sets[0].model_copy(update={"fields": ("question",)})
    with pytest.raises(UserError, match=r"item 0: no text in question; its fields are q, a"):
        build_index(IndexConfig(out=tmp_path / "i.npz", sets=(wrong,)))
    absent = sets[0].model_copy(update={"path": tmp_path / "absent"})
    with pytest.raises(UserError, match=r"absent: no such file"):
        build_index(IndexConfig(out=tmp_path / "i.npz", sets=(absent,)))


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """A configuration over clean pages and three that hold evaluation items."""
    clean = [f"Page {n} says nothing of interest. " + f"word{n} and more. " * 30 for n in range(40)]
    planted = [
        clean[0] + ITEM,
        f"{ITEM} " + clean[1],
        clean[2] + "He said: the answer is forty-two! " + clean[3],
    ]
    rows = [{"text": text, "url": f"https://a.org/{n}"} for n, text in enumerate(planted + clean)]
    (tmp_path / "pages.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    lines = [json.dumps({"q": text}) for text in (ITEM, "The answer is forty two")]
    (tmp_path / "set.jsonl").write_text("\n".join(lines))
    chosen = EvaluationSet(name="set", path=tmp_path / "set.jsonl", fields=("q",))
    build_index(IndexConfig(out=tmp_path / "index.npz", sets=(chosen,)))

    def config(**changes: object) -> PrepareConfig:
        table = {
            "out": str(tmp_path / "shards"),
            "source": {"kind": "jsonl", "path": str(tmp_path / "pages.jsonl")},
            "stages": [{"kind": "decontaminate", "index": str(tmp_path / "index.npz")}],
            "tokenizer": {"kind": "byte"},
            "split": {"dev": 0.1, "test": 0.1},
        }
        return PrepareConfig.model_validate_json(json.dumps(table | changes))

    return config


def test_planted_items_are_left_out_reported_and_looked_for_again(
    make: Make, tmp_path: Path
) -> None:
    manifest = prepare(make(), progress=False)
    assert manifest.drops == {"contaminated": 3}
    report = (tmp_path / "shards/dropped/contaminated.jsonl").read_text().splitlines()
    assert [json.loads(line)["where"][-1] for line in report] == ["0", "1", "2"]
    assert "set#1 by all its 5 words: the answer is forty two" in report[2]
    assert verify_folder(tmp_path / "shards")["evaluation_items"] == 2
    texts = [row.text for row in ShardFolder.open(tmp_path / "shards").split("train")]
    assert not any("thirteen" in text or "forty" in text for text in texts)


def test_a_corpus_without_an_index_is_refused_unless_told(make: Make, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="say without_decontamination = true"):
        prepare(make(stages=[]), progress=False)
    assert not (tmp_path / "shards").exists()
    missing = [{"kind": "decontaminate", "index": "absent.npz"}]
    with pytest.raises(UserError, match=r"index = absent\.npz: no such file"):
        prepare(make(stages=missing), progress=False)
    prepare(make(stages=[], without_decontamination=True), progress=False)
    with pytest.raises(UserError, match=r"holds set#. by .*prepare it with a decontaminate stage"):
        verify_folder(tmp_path / "shards", tmp_path / "index.npz")
    assert verify_folder(tmp_path / "shards")["evaluation_items"] == 0


def test_another_index_is_another_corpus(make: Make, tmp_path: Path) -> None:
    first = prepare(make(), progress=False)
    (tmp_path / "set.jsonl").write_text(json.dumps({"q": OTHER}))
    chosen = EvaluationSet(name="set", path=tmp_path / "set.jsonl", fields=("q",))
    build_index(IndexConfig(out=tmp_path / "index.npz", sets=(chosen,)))
    with pytest.raises(UserError, match="the corpus has changed"):
        prepare(make(), progress=False)
    second = prepare(make(), overwrite=True, progress=False)
    assert second.drops == {}
    assert read_manifest(tmp_path / "shards").hash == second.hash != first.hash


@pytest.mark.slow
def test_gsm8k_really_overlaps_and_web_pages_do_not(corpus: Path, tmp_path: Path) -> None:
    sets = [
        EvaluationSet(
            name="gsm8k", path=corpus / "eval-gsm8k/test.jsonl", fields=("question", "answer")
        ),
        EvaluationSet(
            name="humaneval",
            path=corpus / "eval-humaneval/HumanEval.jsonl.gz",
            fields=("prompt", "canonical_solution"),
        ),
    ]
    found = build_index(IndexConfig(out=tmp_path / "i.npz", sets=tuple(sets)))
    assert {name: row["items"] for name, row in found["sets"].items()} == {
        "gsm8k": 1319,
        "humaneval": 164,
    }
    index = Index.from_bytes((tmp_path / "i.npz").read_bytes(), "i")
    texts = {
        name: [json.loads(item[1]) for item in files.lines(corpus / name)]  # pyright: ignore
        for name in ("eval-gsm8k/train.jsonl", "eval-gsm8k/test.jsonl", "digitalgov.jsonl.zst")
    }
    train, test = (
        [index.hit(row["question"] + "\n" + row["answer"]) for row in texts[name]]
        for name in ("eval-gsm8k/train.jsonl", "eval-gsm8k/test.jsonl")
    )
    assert sum(hit is not None and hit.rule == "13 words" for hit in train) == 11
    assert all(test)
    assert not any(index.hit(row["text"]) for row in texts["digitalgov.jsonl.zst"][:500])
