"""A short turn of every target (`make fuzz` is the long one), and rejected inputs through the real commands."""

import json
import random
from pathlib import Path

import pytest
import run_targets
from all_targets import MODULES
from commands import COMMANDS, Command, called, rejected, wrong
from fuzzing import fuzz, input_of
from mutations import flipped, of_json, of_lines


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


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_a_rejected_input_is_one_line_and_exit_2_of_the_command(
    command: Command, tmp_path: Path
) -> None:
    scratch, place = tmp_path / "scratch", tmp_path / "place"
    scratch.mkdir()
    place.mkdir()
    inputs = rejected(command, scratch, 8)
    assert len(inputs) >= 6
    assert not list(wrong(command, place, inputs))


@pytest.mark.slow
def test_a_report_is_drawn_or_refused_whatever_a_file_holds(tmp_path: Path) -> None:
    run = run_targets.run_folder(tmp_path / "run")
    for n, (name, (data, mutate)) in enumerate(run_targets.FILES.items()):
        (run / name).write_bytes(mutate(random.Random(n), [data]))
        code, error = called(["report", str(run)])
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
