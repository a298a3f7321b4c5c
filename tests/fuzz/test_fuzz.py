"""A short turn of every target (`make fuzz` is the long one), and rejected inputs through the real commands."""

import json
import random
import sys
from pathlib import Path

import pytest
import run_targets
from all_targets import MODULES
from fuzzing import fuzz, input_of
from mutations import flipped, of_json, of_lines

from rlpt import cli


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_no_input_crashes_a_reader(module, tmp_path: Path) -> None:
    for target in module.targets(tmp_path):
        found = fuzz(target, range(12))
        assert not found.crashes, found.crashes
        assert found.accepted + found.rejected == 12


@pytest.mark.slow
@pytest.mark.fuzz
@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_no_input_crashes_a_reader_in_thousands(module, tmp_path: Path) -> None:
    for target in module.targets(tmp_path):
        found = fuzz(target, range(12, 400))
        assert not found.crashes, found.crashes


def test_an_input_is_found_again_by_its_number(tmp_path: Path) -> None:
    (target, *_) = run_targets.targets(tmp_path)
    assert [input_of(target, 3, n) for n in range(9)] == [input_of(target, 3, n) for n in range(9)]
    assert len({input_of(target, seed, 0) for seed in range(9)}) > 1


def told(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as stop:
        cli.main(words)
    assert isinstance(stop.value.code, int)
    return stop.value.code, capsys.readouterr().err


def rejected(module, name: str, folder: Path, count: int) -> list[bytes]:
    folder.mkdir()
    target = next(target for target in module.targets(folder) if target.name == name)
    return fuzz(target, range(40 * count), kept=count).refused


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "target", "file", "words"),
    [
        ("config_targets", "config: run", "c.toml", ["train", "--dry-run"]),
        ("config_targets", "config: run", "c.toml", ["engine"]),
        ("shard_targets", "shards: manifest.json", "manifest.json", ["data", "verify"]),
        ("run_targets", "fit: table", "table.csv", ["fit", "--x", "flops", "--y", "gain"]),
        ("run_targets", "fit: ladder", "ladder.json", ["fit", "--x", "flops"]),
    ],
    ids=["train", "engine", "verify", "fit-table", "fit-ladder"],
)
def test_a_rejected_input_is_one_line_and_exit_2_of_the_command(
    module: str, target: str, file: str, words: list[str], tmp_path: Path, capsys
) -> None:
    for data in rejected(sys.modules[module], target, tmp_path / "scratch", 8):
        (tmp_path / file).write_bytes(data)
        place = tmp_path if file == "manifest.json" else tmp_path / file
        code, error = told(capsys, *words, str(place))
        (line,) = error.splitlines()
        assert (code, "Traceback" in line) == (2, False), line


@pytest.mark.slow
def test_a_report_is_drawn_or_refused_whatever_a_file_holds(tmp_path: Path, capsys) -> None:
    run = run_targets.run_folder(tmp_path / "run")
    for n, (name, (data, mutate)) in enumerate(run_targets.FILES.items()):
        (run / name).write_bytes(mutate(random.Random(n), [data]))
        code, error = told(capsys, "report", str(run))
        assert code in (0, 2), error
        (run / name).write_bytes(data)


def test_mutations_of_json_are_mostly_json() -> None:
    sample = [json.dumps({"a": [1, 2, {"b": "c"}], "d": None}).encode()]
    found = [of_json(random.Random(n), sample) for n in range(200)]
    assert len(set(found)) > 100
    assert sum(_is_json(each) for each in found) > 150
    assert flipped(random.Random(1), sample) != of_lines(random.Random(1), sample)


def _is_json(data: bytes) -> bool:
    try:
        json.loads(data)
    except (ValueError, RecursionError):
        return False
    return True
