"""Several folders as one: the documents of the union, once each, and nothing held out is trained on."""

import errno
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlpt_data.export import export_pairs
from rlpt_data.manifest import read_manifest
from rlpt_data.merging import merge
from rlpt_data.pairs import Limits
from rlpt_data.prepare import PrepareConfig, prepare
from rlpt_data.shards import CUT_KINDS, SPLITS, ShardFolder, verify_folder
from rlpt_data.stats import quantiles, stats
from rlpt_data.strict import UserError, parse
from rlpt_data.work import Alone

WORDS = ["river", "stone", "light", "under", "many", "small", "houses", "went", "home", "again"]
Make = Callable[..., Path]
Row = tuple[int, str, str | None]
"""The number of a text, its domain and, where the source says so, its split."""


def text(number: int) -> str:
    draw = random.Random(number)
    return " ".join(" ".join(draw.choices(WORDS, k=8)).capitalize() + "." for _ in range(8))


def page(number: int) -> Row:
    return number, f"d{number % 40}.org", None


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """A prepared folder of given rows."""

    def prepared(name: str, rows: list[Row], **changes: Any) -> Path:
        source = tmp_path / f"{name}.jsonl"
        tables = [
            {"text": text(n), "url": f"https://{domain[::-1]}/{n}", "domain": domain}
            | ({"split": split} if split else {})
            for n, domain, split in rows
        ]
        source.write_text("".join(json.dumps(table) + "\n" for table in tables) + "{\n")
        fields = {"domain": "domain"} | ({"split": "split"} if rows[0][2] else {})
        table = {
            "out": str(tmp_path / name),
            "without_decontamination": True,
            "source": {"kind": "jsonl", "path": str(source), "fields": fields},
            "tokenizer": {"kind": "byte"},
            "cuts": {"min_context": 8, "min_continuation": 8},
            "split": {"dev": 0.1, "test": 0.1, "by": "document"},
        }
        prepare(parse(PrepareConfig, table | changes, "test"), progress=False)
        return tmp_path / name

    return prepared


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def sides(place: Path) -> dict[int, str]:
    """number of a text -> its split."""
    known = {text(number): number for number in range(400)}
    folder = ShardFolder.open(place)
    names = [name for name in SPLITS if folder.has(name)]
    return {known[row.text]: name for name in names for row in folder.split(name)}


def test_merged_folders_are_the_prepared_union(make: Make, tmp_path: Path) -> None:
    one = make("one", [page(n) for n in range(60)])
    two = make("two", [page(n) for n in range(50, 130)])
    union = make("union", [page(n) for n in range(130)])
    manifest = merge(tmp_path / "out", [one, two])
    report = verify_folder(tmp_path / "out")
    assert sum(report[name] for name in SPLITS) == 130
    expected, found = contents(union), contents(tmp_path / "out")
    rows = [name for name in expected if name.endswith((".arrow", "tokenizer.json"))]
    assert len(rows) == 4
    assert {name: found[name] for name in rows} == {name: expected[name] for name in rows}
    assert manifest.drops == {"bad_json": 2, "duplicate": 10}
    assert manifest.stages is not None
    table = {row["stage"]: row for row in manifest.stages}
    assert table["read"]["in"] == 142
    assert table["merge"] == {
        "stage": "merge",
        "in": 140,
        "out": 130,
        "dropped": {"duplicate": 10},
    }
    assert len((tmp_path / "out/dropped/duplicate.jsonl").read_text().splitlines()) == 10


def test_the_order_of_the_folders_has_no_part_in_any_byte(make: Make, tmp_path: Path) -> None:
    places = [make(str(n), [page(k) for k in range(n, n + 50)]) for n in (0, 40, 80)]
    merge(tmp_path / "forward", places)
    merge(tmp_path / "backward", places[::-1])
    assert contents(tmp_path / "forward") == contents(tmp_path / "backward")


def test_merged_folders_merge_again(make: Make, tmp_path: Path) -> None:
    one, two, three = (make(str(n), [page(k) for k in range(n, n + 60)]) for n in (0, 60, 120))
    merge(tmp_path / "pair", [one, two])
    merge(tmp_path / "late", [tmp_path / "pair", three])
    merge(tmp_path / "at once", [one, two, three])
    late, once = contents(tmp_path / "late"), contents(tmp_path / "at once")
    assert {k: v for k, v in late.items() if k.endswith(".arrow")} == {
        k: v for k, v in once.items() if k.endswith(".arrow")
    }


def given(side: str, numbers: Any, domain: str = "") -> list[Row]:
    return [(n, domain or f"d{n}.org", side) for n in numbers]


def test_what_one_folder_holds_out_leaves_the_others_train(make: Make, tmp_path: Path) -> None:
    one = make(
        "one",
        given("train", range(20)) + given("dev", range(20, 25)) + given("test", range(25, 30)),
    )
    two = make(
        "two",
        given("train", {*range(18, 60)} - {20, 25, 29})
        + given("dev", [0, 25])
        + given("test", [1, 20, 29]),
    )
    manifest = merge(tmp_path / "out", [one, two])
    verify_folder(tmp_path / "out")
    found = sides(tmp_path / "out")
    assert {n for n, side in found.items() if side == "test"} == {1, 20, *range(25, 30)}
    assert {n for n, side in found.items() if side == "dev"} == {0, *range(21, 25)}
    assert found.keys() == set(range(60))
    # 0, 1, 21 to 24, 26 to 28 of train, 20 and 25 of dev; 18, 19 and 29 are twice.
    assert manifest.drops["held_out_elsewhere"] == 11
    assert manifest.drops["duplicate"] == 3


def test_a_domain_is_on_one_side(make: Make, tmp_path: Path) -> None:
    unknown = [(60, "", "test"), (61, "", "train")]
    held = unknown + given("test", range(5), "held.org") + given("dev", [45], "dev.org")
    loose = given("train", range(5, 10), "held.org") + given("train", [11, 12])
    same = given("train", [0, 50], "other.org") + given("test", [46]) + given("dev", [47])
    rows = [
        held + given("train", range(20, 30), "a.org"),
        loose + same + given("train", range(30, 40), "b.org"),
    ]
    places = [by_domain(make(str(n), given_rows)) for n, given_rows in enumerate(rows)]
    merge(tmp_path / "out", places)
    verify_folder(tmp_path / "out")
    found = sides(tmp_path / "out")
    # 0 is held out under another domain, which loses it and nothing else.
    assert found.keys() == {*range(5), 11, 12, *range(20, 40), 45, 46, 47, 50, 60, 61}
    assert (found[0], found[45], found[50]) == ("test", "dev", "train")


def by_domain(place: Path) -> Path:
    """As if the split were by domain."""
    manifest = read_manifest(place).model_copy(update={"split_by": "domain"})
    manifest = manifest.model_copy(update={"hash": manifest.content_hash()})
    (place / "manifest.json").write_text(json.dumps(manifest.to_json()))
    return place


def test_of_equal_texts_the_one_stays_that_prepare_would_keep(make: Make, tmp_path: Path) -> None:
    one = make("one", [(n, "az", None) for n in range(60)])
    two = make("two", [(n, "zb", None) for n in range(60)])
    merge(tmp_path / "out", [one, two])
    rows = ShardFolder.open(tmp_path / "out").split("train")
    # The URL counts before the domain, and there it is written backwards.
    assert set(rows.domains) == {"zb"}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"seed": 1}, r"its seed \(\d\) differs"),
        ({"tokenizer": {"kind": "bpe", "vocab_size": 260}}, "its tokenizer hash"),
        ({"split": {"dev": 0.2, "test": 0.1, "by": "document"}}, r"its \[split\]"),
    ],
    ids=["seed", "tokenizer", "split"],
)
def test_folders_that_do_not_fit_are_refused(
    make: Make, tmp_path: Path, changes: dict[str, Any], told: str
) -> None:
    one = make("one", [page(n) for n in range(60)])
    two = make("two", [page(n) for n in range(60, 120)], **changes)
    with pytest.raises(UserError, match=told):
        merge(tmp_path / "out", [one, two])
    with pytest.raises(UserError, match="the same shards as"):
        merge(tmp_path / "out", [one, one])
    with pytest.raises(UserError, match="already there"):
        merge(two, [one])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("keep")
    with pytest.raises(UserError, match="not a shard folder"):
        merge(tmp_path / "mine", [one], overwrite=True)
    assert not list(tmp_path.glob(".out*"))


def test_a_second_merge_into_one_folder_is_refused(make: Make, tmp_path: Path) -> None:
    one = make("one", [page(n) for n in range(60)])
    with (
        Alone(tmp_path / "out"),
        pytest.raises(UserError, match="another run is at work here"),
    ):
        merge(tmp_path / "out", [one])
    merge(tmp_path / "out", [one])
    assert not list(tmp_path.glob(".out*"))


def test_a_side_that_the_others_hold_out_whole_is_refused(make: Make, tmp_path: Path) -> None:
    rows = given("dev", range(20, 25)) + given("test", range(25, 30))
    one = make("one", given("train", range(5)) + rows)
    two = make("two", given("train", range(20, 30)) + given("dev", [30]) + given("test", range(5)))
    with pytest.raises(UserError, match=r"^\[split\] train: the other folders hold out every doc"):
        merge(tmp_path / "out", [one, two])
    assert not list(tmp_path.glob("*out*"))


def test_a_disk_that_is_full_is_one_line(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = make("one", [page(n) for n in range(60)])

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left on device; make room and run"):
        merge(tmp_path / "out", [one])
    limits = Limits(max_context=16)
    with pytest.raises(UserError, match="No space left on device; make room and run"):
        export_pairs(one, tmp_path / "pairs.parquet", "train", "trl", limits)
    assert not list(tmp_path.glob("*pairs*"))


def test_a_quantile_is_the_least_value_that_so_many_do_not_exceed() -> None:
    found = quantiles({1: 10, 5: 39, 7: 50, 100: 1})
    assert found == {
        **{"0": 1, "0.1": 1, "0.25": 5, "0.5": 7, "0.75": 7, "0.9": 7, "0.99": 7, "1": 100}
    }
    assert set(quantiles({3: 1}).values()) == {3}


def test_figures_are_those_of_the_documents(make: Make) -> None:
    place = make("one", [page(n) for n in range(80)], num_shards=3)
    found = stats(place)
    folder = ShardFolder.open(place)
    for name in SPLITS:
        rows, table = list(folder.split(name)), found["splits"][name]
        assert table["documents"] == len(rows)
        assert table["tokens"] == sum(row.num_tokens for row in rows)
        assert table["bytes"] == sum(len(row.text.encode()) for row in rows)
        assert table["bytes_per_token"] == table["bytes"] / table["tokens"]
        kinds = [CUT_KINDS[kind] for row in rows for kind in row.cut_kinds]
        assert table["cuts"] == {kind: kinds.count(kind) for kind in CUT_KINDS}
        lengths = sorted(row.num_tokens for row in rows)
        assert (table["document_tokens"]["0"], table["document_tokens"]["1"]) == (
            lengths[0],
            lengths[-1],
        )
        cuts = sorted(len(row.cuts) for row in rows)
        assert table["document_cuts"]["0.5"] == cuts[(len(cuts) + 1) // 2 - 1]
        domains = [row.domain for row in rows]
        assert table["num_domains"] == len(set(domains))
        for domain, share in table["domains"].items():
            assert share == domains.count(domain) / len(rows)
        shares = list(table["domains"].values())
        assert shares == sorted(shares, reverse=True)
