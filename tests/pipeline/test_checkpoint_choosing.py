"""A run goes on from the newest checkpoint that is what was saved, says what it passes over, and deletes nothing."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from rlpt import checkpoint, dist
from rlpt.checkpoint import folders
from rlpt.checkpoint.choosing import damage
from rlpt_data.strict import UserError

WORDS = ("--set", "checkpoint.every=2")


@pytest.fixture
def copy(whole: Path, toml: Path) -> Path:
    """A finished run, to be damaged: checkpoints 16, 18 and 20."""
    return shutil.copytree(whole, toml.parent / "run")


def flipped(file: Path) -> None:
    """One bit in its middle; its size stays."""
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def test_a_flipped_bit_in_the_newest_costs_its_steps_and_nothing_else(
    runs, whole: Path, copy: Path, toml: Path
) -> None:
    bad = checkpoint.path_of(copy, 20)
    flipped(bad / "__0_0.distcp")
    expected = json.loads((bad / checkpoint.MARKER).read_text())["files"]["__0_0.distcp"]["blake2b"]
    found = folders.entry_of(bad / "__0_0.distcp").blake2b
    said = runs.finished(toml, *WORDS)
    assert f"WARNING: {bad}: __0_0.distcp has blake2b {found}, the manifest says {expected}" in said
    assert "going on from step 18; steps 19-20 are done again" in said
    assert runs.steps_of(copy) == runs.steps_of(whole)
    assert checkpoint.complete_steps(copy) == [16, 18, 20]
    kept = copy / "checkpoints" / "step_000020.damaged"
    assert folders.entry_of(kept / "__0_0.distcp").blake2b == found


@pytest.mark.parametrize("name", ["progress.json", ".metadata", "supply_0.jsonl.zst", "COMPLETE"])
def test_any_file_that_is_not_what_was_saved_is_found(
    whole: Path, copy: Path, world: dist.World, name: str
) -> None:
    path = checkpoint.path_of(copy, 20)
    if name.startswith("supply"):
        (path / name).write_bytes(b"rows of thoughts")
        marker = json.loads((path / "COMPLETE").read_text())
        marker["files"][name] = {"bytes": 16, "blake2b": "0" * 32}
        (path / "COMPLETE").write_text(json.dumps(marker))
    else:
        flipped(path / name)
    assert checkpoint.newest_intact(copy, world) == 18
    assert checkpoint.newest_intact(whole, world) == 20


def test_ranks_share_the_files_and_agree(copy: Path, on_ranks) -> None:
    path = checkpoint.path_of(copy, 20)
    names = sorted(folders.manifest(path))
    read: list[str] = []
    entry_of = folders.entry_of

    def noted(file: Path) -> folders.Entry:
        read.append(file.name)
        return entry_of(file)

    flipped(path / names[1])
    folders.entry_of = noted
    try:
        first, second = on_ranks(2, lambda world: damage(path, world))
    finally:
        folders.entry_of = entry_of
    assert sorted(read) == names
    assert first == second
    assert first is not None
    assert first.startswith(f"{names[1]} has blake2b")


def test_a_checkpoint_of_the_first_format_is_checked_by_sizes_and_that_is_said(
    runs, copy: Path, toml: Path, world: dist.World, capsys
) -> None:
    for step in (16, 18, 20):
        marker = checkpoint.path_of(copy, step) / checkpoint.MARKER
        sizes = {n: e["bytes"] for n, e in json.loads(marker.read_text())["files"].items()}
        marker.write_text(json.dumps({"files": sizes}))
    flipped(checkpoint.path_of(copy, 20) / "__0_0.distcp")
    assert checkpoint.newest_intact(copy, world) == 20
    assert capsys.readouterr().err.count("older format without hashes") == 1
    (checkpoint.path_of(copy, 20) / "__0_0.distcp").write_bytes(b"")
    assert checkpoint.newest_intact(copy, world) == 18


def test_nothing_intact_is_a_refusal_that_renames_nothing(runs, copy: Path, toml: Path) -> None:
    for step in (16, 18, 20):
        flipped(checkpoint.path_of(copy, step) / "__0_0.distcp")
    said = runs.finished(toml, *WORDS, code=2)
    assert said.count("WARNING") == 3
    assert "has no complete checkpoint but step_000020, which is damaged" in said
    names = sorted(path.name for path in (copy / "checkpoints").iterdir())
    assert names == ["step_000016", "step_000018", "step_000020"]


def _outside(path: Path) -> None:
    (path.parent / "elsewhere").write_bytes((path / "__0_0.distcp").read_bytes())
    (path / "__0_0.distcp").unlink()
    (path / "__0_0.distcp").symlink_to(path.parent / "elsewhere")


def _named(name: str) -> Callable[[Path], None]:
    def put(path: Path) -> None:
        marker = json.loads((path / "COMPLETE").read_text())
        marker["files"][name] = {"bytes": 0, "blake2b": "0" * 32}
        (path / "COMPLETE").write_text(json.dumps(marker))

    return put


def _marker(text: str) -> Callable[[Path], None]:
    return lambda path: (path / "COMPLETE").write_text(text) and None


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (_named("../../config.json"), r"names '../../config.json', which is not a file of this"),
        (_named("/etc/passwd"), "names '/etc/passwd'"),
        (_named(".."), r"names '\.\.'"),
        (_named("a\\..\\b"), "names"),
        (_outside, "names '__0_0.distcp'"),
        (_marker("[]"), "marker is damaged"),
        (_marker('{"files": {"a": -1}}'), "marker is damaged"),
        (_marker('{"files": {"a": NaN}}'), "marker is damaged"),
        (_marker('{"files": {"a": {"bytes": "4", "blake2b": "0"}}}'), "marker is damaged"),
        (_marker('{"format": 3, "files": {}}'), "marker is damaged"),
    ],
    ids=["up", "root", "parent", "backslash", "link", "list", "negative", "nan", "text", "later"],
)
def test_a_marker_that_is_wrong_or_leads_elsewhere_is_refused_by_name(
    copy: Path, harm: Callable[[Path], None], reason: str
) -> None:
    harm(checkpoint.path_of(copy, 20))
    with pytest.raises(UserError, match=reason):
        checkpoint.find(f"{copy}@20")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("step", value) for value in (-1, 1e400, "20", None, 2**60, True, 19)),
        *(("seconds", float("nan")), ("journals", {"metrics.jsonl": -5}), ("cursor", 1.5)),
        *(("stage", 7), ("unknown", 1), ("shards", 5)),
    ],
    ids=lambda value: str(value).replace(os.sep, "_"),
)
def test_a_progress_record_that_is_wrong_ends_in_one_line(
    runs, copy: Path, toml: Path, field: str, value: object
) -> None:
    path = checkpoint.path_of(copy, 20)
    table = json.loads((path / "progress.json").read_text())
    (path / "progress.json").write_text(json.dumps(table | {field: value}))
    runs.sealed(path)
    journal = (copy / "metrics.jsonl").read_bytes()
    said = runs.finished(toml, *WORDS, code=2)
    assert "use another checkpoint" in said.splitlines()[-1]
    assert "Traceback" not in said
    assert (copy / "metrics.jsonl").read_bytes() == journal
