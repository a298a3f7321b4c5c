"""Locks, older shards, names that clash, and records that no file can hold: one line or one drop, nothing lost."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from rlpt_data.manifest import read_manifest
from rlpt_data.mixing import parts_of
from rlpt_data.plan import make_plan
from rlpt_data.prepare import PrepareConfig, inspect, prepare
from rlpt_data.shards import SPLITS, ShardFolder, verify_folder
from rlpt_data.sources.jsonl import JsonlConfig, units
from rlpt_data.sources.units import Unit
from rlpt_data.strict import UserError, parse
from rlpt_data.work import Alone

LINE = "The river went home again. Many small houses stood under the light of stones. "


def rows(count: int, *more: str) -> str:
    tables = [{"text": f"Page {n}. " + LINE * 3, "url": f"https://s{n}.org"} for n in range(count)]
    return "".join(json.dumps(table) + "\n" for table in tables) + "".join(f"{m}\n" for m in more)


def configured(tmp_path: Path, *more: str) -> PrepareConfig:
    """Sixty pages and some lines more."""
    (tmp_path / "pages.jsonl").write_text(rows(60, *more))
    table: dict[str, Any] = {
        "out": str(tmp_path / "out"),
        "without_decontamination": True,
        "source": {"kind": "jsonl", "path": str(tmp_path / "pages.jsonl")},
        "tokenizer": {"kind": "byte"},
        "cuts": {"min_context": 8, "min_continuation": 8},
    }
    return parse(PrepareConfig, table, "test")


def test_a_record_that_no_file_can_hold_costs_itself(tmp_path: Path) -> None:
    config = configured(
        tmp_path,
        '{"text": "\\ud800 in the text"}',
        '{"text": "in the URL", "url": "https://\\ud800.org"}',
        '{"\\ud800 in the name of a field": 1}',
        '"\\ud800 in what is no object"',
        json.dumps({"text": "One\u2028two\x85three.", "url": "https://short.org"}),
    )
    manifest = prepare(config, progress=False)
    verify_folder(config.out)
    assert manifest.drops == {"no_text": 1, "not_an_object": 1, "not_unicode": 2, "no_cut": 1}
    assert sum(manifest.counts[name].documents for name in SPLITS) == 60
    drops = inspect(config.out)["drops"]
    found = {reason: drop["samples"] for reason, drop in drops.items()}
    places = {row["where"] for row in found["not_unicode"]}
    assert "https://?.org" in places
    # The other has no URL: its id stands for it.
    (other,) = places - {"https://?.org"}
    assert len(bytes.fromhex(other)) == 16
    assert found["not_an_object"][0]["detail"] == "? in what is no object"
    assert found["no_cut"][0]["detail"] == "One\u2028two\x85three."


def test_whoever_waited_for_a_lock_that_was_taken_away_is_refused(tmp_path: Path) -> None:
    first = Alone(tmp_path / "out")
    with first:
        shutil.rmtree(first.path)
        with Alone(tmp_path / "out") as second:
            # The name was free again; what is there now is somebody else's.
            first.__exit__(None, None, None)
            assert (second.path / "lock").exists()
            with pytest.raises(UserError, match="another run is at work here"):
                Alone(tmp_path / "out").__enter__()
        first.__enter__()
    assert not list(tmp_path.iterdir())


def test_shards_of_another_recipe_are_read_and_not_replaced_unasked(tmp_path: Path) -> None:
    config = configured(tmp_path)
    manifest = prepare(config, progress=False)
    old = manifest.model_copy(update={"config": {**manifest.config, "recipe": 3}})
    (config.out / "manifest.json").write_text(json.dumps(old.to_json()))
    with pytest.raises(
        UserError, match=r"of another version; this .* \(recipe 3, now 4\); use them as"
    ):
        prepare(config, progress=False)
    assert len(ShardFolder.open(config.out).split("train")) == manifest.counts["train"].documents
    assert prepare(config, overwrite=True, progress=False) == manifest
    assert read_manifest(config.out) == manifest


def test_files_whose_names_have_brackets_are_inputs_of_their_own(tmp_path: Path) -> None:
    for number in range(2):
        (tmp_path / f"a[{number}].jsonl").write_text(rows(number))
    plan = make_plan(parts_of(JsonlConfig(kind="jsonl", path=tmp_path), ""), {}, {})
    assert [each.name for each in plan.inputs] == ["a[0].jsonl", "a[1].jsonl"]
    assert plan.inputs[0].blake2b != plan.inputs[1].blake2b
    assert Unit("a[0].gz[5:9]", tmp_path / "a[0].gz", 5, 9).file == "a[0].gz"


def test_a_file_name_that_is_no_unicode_is_one_line(tmp_path: Path) -> None:
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/a\xff.jsonl")).write_text("{}\n")
    with pytest.raises(UserError, match=r"a\\udcff\.jsonl: its name is not UTF-8; rename it"):
        units(JsonlConfig(kind="jsonl", path=tmp_path))


def test_shards_are_not_written_to_a_url(tmp_path: Path) -> None:
    config = configured(tmp_path).model_copy(update={"out": Path("s3://bucket/out")})
    with pytest.raises(UserError, match=r"^s3:/bucket/out: shards are written to this machine"):
        prepare(config, progress=False)


def test_a_kind_of_stage_stands_once(tmp_path: Path) -> None:
    table = configured(tmp_path).model_dump(mode="json") | {"stages": [{"kind": "pii"}] * 2}
    with pytest.raises(UserError, match=r"a kind of \[\[stages\]\] stands once; got pii, pii"):
        parse(PrepareConfig, {k: v for k, v in table.items() if v is not None}, "test")
