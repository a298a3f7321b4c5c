"""A run that ended goes on where it was, bit for bit, or is refused; its folder stays what it was."""

import json
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from rlpt import checkpoint, train
from rlpt_data.strict import UserError


@pytest.mark.slow
@pytest.mark.parametrize("kill_after_step", [15, 7])
def test_a_killed_run_goes_on_bit_for_bit(
    runs, whole: Path, toml: Path, kill_after_step: int
) -> None:
    process = runs.started(toml, "--set", "checkpoint.every=2")
    metrics = toml.parent / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 90
    while not (metrics.exists() and metrics.read_text().count("\n") >= kill_after_step):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()[1].decode()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert "resuming" in runs.finished(toml, "--set", "checkpoint.every=2")
    resumed = toml.parent / "run"
    assert json.dumps(runs.steps_of(resumed)) == json.dumps(runs.steps_of(whole))
    assert runs.thoughts_of(resumed) == runs.thoughts_of(whole)
    expected = runs.weights_of(whole, 20)
    for name, tensor in runs.weights_of(resumed, 20).items():
        assert torch.equal(tensor, expected[name]), name


def test_a_run_with_nothing_but_a_damaged_checkpoint_is_not_started_over(
    runs, whole: Path, toml: Path
) -> None:
    copy = toml.parent / "run"
    shutil.copytree(whole, copy)
    for step in (16, 18, 20):
        (checkpoint.path_of(copy, step) / checkpoint.MARKER).unlink()
    journal = (copy / "metrics.jsonl").read_bytes()
    assert "is damaged" in runs.finished(toml, "--set", "checkpoint.every=2", code=2)
    assert (copy / "metrics.jsonl").read_bytes() == journal


def test_shards_that_changed_under_a_run_are_refused(runs, whole: Path, toml: Path) -> None:
    copy = toml.parent / "run"
    shutil.copytree(whole, copy)
    path = checkpoint.path_of(copy, 20)
    table = json.loads((path / "progress.json").read_text())
    table["shards"] = "f" * len(table["shards"])
    (path / "progress.json").write_text(json.dumps(table))
    runs.sealed(path)
    assert "was trained on shards with hash fff" in runs.finished(
        toml, "--set", "checkpoint.every=2", code=2
    )


def test_a_journal_that_lost_lines_is_refused_and_not_filled_up(
    runs, whole: Path, toml: Path
) -> None:
    copy = toml.parent / "run"
    shutil.copytree(whole, copy)
    journal = copy / "metrics.jsonl"
    short = b"".join(journal.read_bytes().splitlines(keepends=True)[:-1])
    journal.write_bytes(short)
    said = runs.finished(toml, "--set", "checkpoint.every=2", code=2)
    assert f"metrics.jsonl: has {len(short)} bytes, the checkpoint knows" in said
    assert journal.read_bytes() == short


def test_a_finished_run_is_not_trained_again(runs, whole: Path) -> None:
    before = (whole / "metrics.jsonl").read_bytes()
    runs.finished(whole.parent / "run.toml", "--set", "checkpoint.every=2")
    assert (whole / "metrics.jsonl").read_bytes() == before


def test_a_folder_of_another_configuration_is_refused(runs, whole: Path) -> None:
    errors = runs.finished(whole.parent / "run.toml", "--set", "seed=3", code=2)
    assert "holds a run with" in errors
    assert "Traceback" not in errors


@pytest.mark.slow
def test_nothing_draws_from_the_generator_that_no_checkpoint_has(
    runs, whole: Path, toml: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every draw has a key of its own: ranks and sessions may have torch's generator in any state."""
    states = []
    take = train.run_step

    def noted(*words):
        before = torch.get_rng_state()
        found = take(*words)
        states.append(torch.equal(torch.get_rng_state(), before))
        return found

    monkeypatch.setattr(train, "run_step", noted)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        runs.finished(toml, "--set", "checkpoint.every=2")
    assert states == [True] * 20
    assert runs.steps_of(toml.parent / "run") == runs.steps_of(whole)


def test_the_oldest_checkpoints_go(whole: Path) -> None:
    assert checkpoint.complete_steps(whole) == [16, 18, 20]


def test_a_checkpoint_without_its_marker_is_none(whole: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(whole, copy)
    (checkpoint.path_of(copy, 20) / checkpoint.MARKER).unlink()
    with pytest.warns(UserWarning, match="step_000020: no COMPLETE marker"):
        assert checkpoint.complete_steps(copy) == [16, 18]
    with pytest.raises(UserError, match=r"no COMPLETE marker.*last"):
        checkpoint.find(f"{copy}@20")
    with (
        pytest.raises(UserError, match="no such checkpoint; complete ones: 16, 18"),
        pytest.warns(UserWarning, match="passed over"),
    ):
        checkpoint.find(f"{copy}@3")
    file = next(checkpoint.path_of(copy, 18).glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:-1])
    assert "bytes, the marker says" in str(checkpoint.defect(checkpoint.path_of(copy, 18)))
