"""Several sources in one folder: exact shares of bytes, one owner a document, files read once."""

import json
import random
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from rlpt_data import sources
from rlpt_data.manifest import total
from rlpt_data.mixing import bytes_left
from rlpt_data.prepare import PrepareConfig, prepare
from rlpt_data.shards import SPLITS, ShardFolder, verify_folder
from rlpt_data.strict import UserError, parse
from rlpt_data.tokenizer import train_byte_pairs

WORDS = ["river", "stone", "light", "under", "many", "small", "houses", "went", "home", "again"]


def text(number: int) -> str:
    draw = random.Random(number)
    length = draw.randint(8, 30)
    return " ".join(" ".join(draw.choices(WORDS, k=8)).capitalize() + "." for _ in range(length))


def write(path: Path, numbers: range) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps({"text": text(n)}) + "\n" for n in numbers))


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., PrepareConfig]:
    """A configuration: 120 documents of web, 60 of books; 10 of the books are also in the web."""
    write(tmp_path / "web" / "a.jsonl", range(60))
    write(tmp_path / "web" / "b.jsonl", range(60, 120))
    write(tmp_path / "books" / "a.jsonl", range(110, 170))

    def configured(name: str = "shards", weights: tuple[float, ...] = (3, 1), **changes: Any):
        pairs = zip(("web", "books"), weights, strict=True)
        table = {
            "out": str(tmp_path / name),
            "without_decontamination": True,
            "sources": [
                {"name": n, "weight": w, "source": {"kind": "jsonl", "path": str(tmp_path / n)}}
                for n, w in pairs
            ],
            "tokenizer": {"kind": "byte"},
            "cuts": {"min_context": 8, "min_continuation": 8},
            "split": {"dev": 0.1, "test": 0.1},
        }
        return parse(PrepareConfig, table | changes, "test")

    return configured


def texts(config: PrepareConfig) -> dict[int, str]:
    """number of a text -> its split."""
    known = {text(number): number for number in range(400)}
    folder = ShardFolder.open(config.out)
    return {known[row.text]: name for name in SPLITS for row in folder.split(name)}


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def dropped(config: PrepareConfig, reason: str) -> list[str]:
    return (config.out / f"dropped/{reason}.jsonl").read_text().splitlines()


def size(numbers: Any) -> int:
    return sum(len(text(n)) for n in numbers)


def test_the_largest_total_is_kept_for_which_no_source_repeats() -> None:
    assert bytes_left({"a": 900, "b": 500}, {"a": 3, "b": 1}) == {"a": 900, "b": 300}
    assert bytes_left({"a": 900, "b": 200}, {"a": 3, "b": 1}) == {"a": 600, "b": 200}
    assert bytes_left({"a": 1000, "b": 1000}, {"a": 0.1, "b": 0.2}) == {"a": 500, "b": 1000}
    assert bytes_left({"a": 3, "b": 10}, {"a": 0.1, "b": 0.3}) == {"a": 3, "b": 9}
    assert bytes_left({"a": 7}, {"a": 0.3}) == {"a": 7}
    with pytest.raises(UserError, match=r"\[\[sources\]\] b: none of its documents"):
        bytes_left({"a": 7, "b": 0}, {"a": 1, "b": 1})


def test_shares_of_bytes_are_those_of_the_weights_to_within_a_document(
    make: Callable[..., PrepareConfig],
) -> None:
    config = make()
    manifest = prepare(config, progress=False)
    verify_folder(config.out)
    found = set(texts(config))
    # Equal texts belong to the source whose name comes first, when nothing else tells them apart.
    books, web = found & set(range(110, 170)), found & set(range(110))
    assert manifest.sources is not None
    assert manifest.sources["web"].bytes == size(web)
    assert manifest.sources["books"].bytes == size(books)
    assert manifest.sources["books"].documents == len(books)
    share = Fraction(size(range(110)), 3)
    assert len(web) == 110
    longest = max(len(text(n)) for n in range(170))
    assert share - longest < size(books) <= share
    assert total(manifest.sources.values()) == total(manifest.counts.values())
    assert manifest.drops["over_weight"] == 60 - len(books)
    assert sorted(books) != list(range(110, 110 + len(books)))
    samples = [json.loads(line)["detail"] for line in dropped(config, "over_weight")]
    assert set(samples) <= {text(n)[:160] for n in set(range(110, 170)) - books}
    assert manifest.drops["duplicate"] == 10


def test_every_document_of_a_mixture_is_accounted_for(make: Callable[..., PrepareConfig]) -> None:
    config = make(stages=[{"kind": "pii"}])
    manifest = prepare(config, progress=False)
    assert manifest.stages is not None
    for first, second in zip(manifest.stages, manifest.stages[1:], strict=False):
        assert first["out"] == second["in"], (first["stage"], second["stage"])
    assert [row["stage"] for row in manifest.stages][-2:] == ["mixture", "encode"]
    assert manifest.stages[0]["in"] == 180
    assert manifest.stages[-1]["out"] == total(manifest.counts.values()).documents
    assert len(dropped(config, "over_weight")) == min(20, manifest.drops["over_weight"])


def test_what_is_left_of_a_source_is_spread_over_the_whole_order(
    make: Callable[..., PrepareConfig],
) -> None:
    config = make(weights=(1, 8), split={"dev": 0.05, "test": 0.05})
    prepare(config, progress=False)
    order = [number for number, side in texts(config).items() if side == "train"]
    places = [place for place, number in enumerate(order) if number < 110]
    assert 3 < len(places) < 15
    assert max(places) > len(order) / 2
    samples = [json.loads(line)["detail"] for line in dropped(config, "over_weight")]
    assert set(samples) <= {text(n)[:160] for n in range(110)}


@pytest.mark.slow
def test_the_order_of_sources_files_and_workers_has_no_part_in_any_byte(
    make: Callable[..., PrepareConfig], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = make()
    prepare(config, progress=False)
    once = contents(config.out)
    table = json.loads(make("other", workers=2).model_dump_json())
    table["sources"].reverse()
    listed = sources.units
    monkeypatch.setattr(sources, "units", lambda config: listed(config)[::-1])
    prepare(parse(PrepareConfig, table, "test"), progress=False)
    assert contents(tmp_path / "other") == once


def test_another_weight_keeps_the_sides_of_documents(make: Callable[..., PrepareConfig]) -> None:
    found = []
    for name, weights in (("one", (3.0, 1.0)), ("two", (1.0, 1.0))):
        config = make(name, weights)
        prepare(config, progress=False)
        found.append(texts(config))
    one, two = found
    assert {n: one[n] for n in one.keys() & two} == {n: two[n] for n in one.keys() & two}
    # More of the books are wanted, so those that were there stay.
    assert {n for n in one if n >= 110} < {n for n in two if n >= 110}


def test_one_more_file_or_a_changed_one_is_read_alone(
    make: Callable[..., PrepareConfig], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    read = sources.read
    seen: list[str] = []

    def counted(source: Any, unit: Any) -> Any:
        seen.append(f"{Path(source.path).name}/{unit.name}")
        return read(source, unit)

    def interrupted(config: PrepareConfig) -> list[str]:
        seen.clear()
        with monkeypatch.context() as patch:
            patch.setattr("rlpt_data.prepare.tokenizer_of", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                prepare(config, progress=False)
        return list(seen)

    monkeypatch.setattr(sources, "read", counted)
    assert interrupted(make()) == ["books/a.jsonl", "web/a.jsonl", "web/b.jsonl"]
    write(tmp_path / "web" / "aa.jsonl", range(200, 220))
    assert interrupted(make()) == ["web/aa.jsonl"]
    write(tmp_path / "web" / "a.jsonl", range(220, 260))
    assert interrupted(make()) == ["web/a.jsonl"]
    (tmp_path / "web" / "b.jsonl").unlink()
    assert interrupted(make(weights=(1, 1), seed=3)) == []
    for vocabulary in (257, 258):
        table = train_byte_pairs([text(0)], vocabulary)
        (tmp_path / "tokenizer.json").write_bytes(table)
        path = str(tmp_path / "tokenizer.json")
        assert interrupted(make(tokenizer={"kind": "file", "path": path})) == []
    assert interrupted(make(stages=[{"kind": "pii"}])) == [
        "books/a.jsonl",
        "web/a.jsonl",
        "web/aa.jsonl",
    ]
    seen.clear()
    prepare(make(stages=[{"kind": "pii"}]), progress=False)
    assert seen == []
    prepare(make("fresh", stages=[{"kind": "pii"}]), progress=False)
    assert contents(tmp_path / "shards") == contents(tmp_path / "fresh")


SOURCE = {"kind": "folder", "path": "x"}


@pytest.mark.parametrize(
    ("table", "told"),
    [
        ({}, "exactly one of"),
        (
            {"source": SOURCE, "sources": [{"name": "a", "weight": 1, "source": SOURCE}]},
            "exactly one of",
        ),
        ({"sources": [{"name": "a", "weight": 0, "source": SOURCE}]}, "weight = 0"),
        ({"sources": [{"name": "a", "weight": 1, "source": SOURCE}] * 2}, "must differ"),
        ({"sources": [{"name": "a/b", "weight": 1, "source": SOURCE}]}, "without a slash"),
        ({"sources": [{"name": "a", "weight": 1}]}, "key 'source' of WeightedSource is missing"),
    ],
    ids=["neither", "both", "nothing", "names", "slash", "no source"],
)
def test_sources_that_are_no_mixture_are_refused(table: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        parse(PrepareConfig, {"out": "out", **table}, "prepare.toml")
