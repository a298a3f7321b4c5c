"""`rlpt checkpoint`: what lies there, whether it is what was saved, and nothing removed that a run could need."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rlpt import checkpoint
from rlpt.checkpoint import folders
from rlpt.checkpoint.keeping import dropped
from rlpt.checkpoint.metadata import entries
from rlpt.cli import main
from rlpt.lock import alone

Command = Callable[..., tuple[Any, str]]


@pytest.fixture
def rlpt(capsys: pytest.CaptureFixture[str]) -> Command:
    """Run `rlpt checkpoint ... --json`: the last line as an object, and what was said to people."""

    def call(*words: object, code: int = 0) -> tuple[Any, str]:
        with pytest.raises(SystemExit) as left:
            main(["checkpoint", *map(str, words), "--json"])
        output = capsys.readouterr()
        assert left.value.code == code, output.err
        assert "Traceback" not in output.err
        lines = output.out.splitlines()
        return json.loads(lines[-1]), "\n".join(lines[:-1]) + output.err

    return call


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    """A finished run: checkpoints 16, 18 and 20, the last between two stages."""
    return shutil.copytree(whole, tmp_path / "run")


def flipped(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "going"),
    [(1, 0, [2, 4, 6, 8]), (3, 0, [2, 4]), (1, 4, [2, 6]), (9, 0, []), (2, 3, [2, 4])],
)
def test_what_goes_is_older_than_the_newest_and_off_the_period(
    keep_last: int, keep_every: int, going: list[int]
) -> None:
    assert dropped([10, 2, 4, 6, 8], keep_last, keep_every) == going


def test_list_has_a_line_for_all_that_lies_there(rlpt: Command, copy: Path) -> None:
    (checkpoint.path_of(copy, 18) / "progress.json").write_text("{}")
    checkpoint.path_of(copy, 16).rename(copy / "checkpoints" / "step_000016.tmp")
    found, said = rlpt("list", copy)
    rows = {row["name"]: row for row in found["checkpoints"]}
    assert list(rows) == ["step_000016.tmp", "step_000018", "step_000020"]
    assert [row["state"] for row in rows.values()] == ["damaged", "damaged", "complete"]
    assert "progress.json has 2 bytes" in rows["step_000018"]["reason"]
    newest = rows["step_000020"]
    assert (newest["step"], newest["stage"], newest["stage_step"]) == (20, 2, 0)
    path = checkpoint.path_of(copy, 20)
    assert newest["bytes"] == sum(file.stat().st_size for file in path.iterdir())
    assert 0 <= newest["age_seconds"] < 3600
    assert f"{newest['bytes']:,}" in said


def test_verify_reads_every_hash_and_names_the_file(rlpt: Command, copy: Path) -> None:
    found, _ = rlpt("verify", copy)
    assert list(found["checkpoints"].values()) == [[], [], []]
    flipped(checkpoint.path_of(copy, 18) / "__0_0.distcp")
    found, said = rlpt("verify", copy, code=1)
    (defect,) = found["checkpoints"][str(checkpoint.path_of(copy, 18))]
    assert defect.startswith("__0_0.distcp has blake2b")
    assert said.count("intact") == 2
    assert rlpt("verify", f"{copy}@20")[0] == {
        "checkpoints": {str(checkpoint.path_of(copy, 20)): []}
    }
    rlpt("verify", f"{copy}@18", code=1)
    rlpt("verify", f"{copy}@last")


def test_verify_finds_a_tensor_that_is_not_what_the_metadata_says(
    runs, rlpt: Command, copy: Path
) -> None:
    """Where the hashes hold: it was saved so, or somebody made it so."""
    import pickle

    path = checkpoint.path_of(copy, 20)
    metadata = pickle.loads((path / ".metadata").read_bytes())
    first, second = [index for index in metadata.storage_data if index.fqn.endswith("weight")][:2]
    places = metadata.storage_data
    places[first], places[second] = places[second], places[first]
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    runs.sealed(path)
    found, _ = rlpt("verify", f"{copy}@20", code=1)
    assert "cannot be read: has (" in found["checkpoints"][str(path)][0]


def test_prune_removes_what_no_rule_keeps_and_what_is_left_over(rlpt: Command, copy: Path) -> None:
    leftover = copy / "checkpoints" / "step_000017.tmp"
    leftover.mkdir()
    (leftover / "__0_0.distcp").write_bytes(bytes(1000))
    shutil.copytree(checkpoint.path_of(copy, 16), copy / "checkpoints" / "step_000012.damaged")
    sizes = {name: checkpoint.path_of(copy, 16) for name in ("step_000012.damaged", "step_000016")}
    freed = 1000 + sum(
        sum(file.stat().st_size for file in path.iterdir()) for path in sizes.values()
    )
    before = names(copy)
    words = ("prune", copy, "--keep-last", 1, "--keep-every", 9)
    found, said = rlpt(*words, "--dry-run")
    assert names(copy) == before
    assert said.count("would remove") == 3
    assert rlpt(*words)[0] == found | {"dry_run": False}
    assert found["removed"] == ["step_000012.damaged", "step_000016", "step_000017.tmp"]
    assert found["kept"] == [18, 20]
    assert found["bytes"] == freed
    assert names(copy) == ["step_000018", "step_000020"]


def test_prune_keeps_the_newest_whose_hashes_hold(rlpt: Command, copy: Path) -> None:
    flipped(checkpoint.path_of(copy, 20) / "__0_0.distcp")
    found, _ = rlpt("prune", copy, "--keep-last", 1)
    assert found["kept"] == [18, 20]
    flipped(checkpoint.path_of(copy, 18) / "__0_0.distcp")
    assert "nothing was removed" in rlpt("prune", copy, "--keep-last", 1, code=2)[0]["error"]
    assert names(copy) == ["step_000018", "step_000020"]


def test_prune_leaves_files_and_links_and_a_checkpoint_that_was_being_replaced(
    rlpt: Command, copy: Path
) -> None:
    newest = checkpoint.path_of(copy, 20)
    newest.rename(newest.with_suffix(folders.REPLACED))
    (copy / "checkpoints" / "notes.txt").write_text("mine")
    (copy / "checkpoints" / "latest").symlink_to("step_000018")
    assert rlpt("prune", copy, "--keep-last", 1)[0]["removed"] == ["step_000016"]
    assert names(copy) == ["latest", "notes.txt", "step_000018", "step_000020.replaced"]


def test_reshard_makes_no_new_hashes_for_what_is_damaged(
    rlpt: Command, copy: Path, tmp_path: Path
) -> None:
    flipped(checkpoint.path_of(copy, 18) / "__0_0.distcp")
    words = ("reshard", f"{copy}@18", "--ranks", 1, "--out", tmp_path / "new")
    assert "has blake2b" in rlpt(*words, code=2)[0]["error"]
    assert not (tmp_path / "new").exists()


def test_prune_leaves_a_run_alone_that_is_at_work(rlpt: Command, copy: Path) -> None:
    with alone(copy):
        found, _ = rlpt("prune", copy, "--keep-last", 1, code=2)
    assert "another process is at work" in found["error"]
    assert names(copy) == ["step_000016", "step_000018", "step_000020"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["list", "{}/none"], "has no checkpoints folder"),
        (["verify", "{}/none"], "has no checkpoints folder"),
        (["verify", "{}@3"], "no such checkpoint"),
        (["verify", "{}@x"], "not a checkpoint"),
        (["prune", "{}/none", "--keep-last", "1"], "has no checkpoints folder"),
        (["prune", "{}", "--keep-last", "0"], "keep-last"),
        (["reshard", "{}@20", "--ranks", "2", "--out", "{}"], "exists already"),
        (["reshard", "{}@3", "--ranks", "2", "--out", "{}/new"], "no such checkpoint"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
@pytest.mark.filterwarnings("ignore:.*passed over")
def test_a_wrong_path_is_one_line_and_exit_2(
    rlpt: Command, whole: Path, words: list[str], said: str
) -> None:
    found, _ = rlpt(*(word.replace("{}", str(whole)) for word in words), code=2)
    assert said in found["error"]
    assert "\n" not in found["error"]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 3])
def test_reshard_gives_even_files_of_the_same_bits(
    rlpt: Command, copy: Path, tmp_path: Path, ranks: int
) -> None:
    source = checkpoint.path_of(copy, 18)
    found, _ = rlpt("reshard", f"{copy}@18", "--ranks", ranks, "--out", tmp_path / "new")
    path = Path(found["out"])
    assert path == checkpoint.path_of(tmp_path / "new", 18)
    sizes = [file.stat().st_size for file in path.glob("*.distcp")]
    assert len(sizes) == ranks
    assert max(sizes) < 1.5 * min(sizes)
    mine, theirs = dict(entries(path)), dict(entries(source))
    assert mine.keys() == theirs.keys()
    for name, value in theirs.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(mine[name], value), name
        else:
            assert mine[name] == value, name
    assert folders.read_progress(path) == replace(folders.read_progress(source), journals={})
    rlpt("verify", f"{tmp_path / 'new'}@18")
