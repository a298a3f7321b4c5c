"""Two trainers never share a run folder."""

import json
import os
import signal
import time
from pathlib import Path

import pytest

from rlpt import lock

# A policy that has not learned to end its thoughts is halted after 100 steps, which take few seconds.
ENDLESS = ("--set", "stage.1.steps=100000", "--set", "guards.truncation_halt=1.0")


def test_a_second_trainer_is_refused_and_touches_nothing(runs, toml: Path) -> None:
    run_dir = toml.parent / "run"
    with lock.alone(run_dir):
        (run_dir / "metrics.jsonl").write_text('{"step": 1}\n')
        said = runs.finished(toml, code=2)
        assert said.splitlines()[-1].startswith(f"{run_dir}: another process is at work here (pro")
        assert sorted(os.listdir(run_dir)) == [".lock", "metrics.jsonl"]


def test_a_run_leaves_no_lock(whole: Path) -> None:
    assert not (whole / lock.NAME).exists()


@pytest.mark.slow
def test_all_ranks_are_refused_and_a_killed_trainer_refuses_nobody(runs, toml: Path) -> None:
    first = runs.started(toml, *ENDLESS, ranks=2)
    metrics = toml.parent / "run" / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().count("\n") > 12):
        time.sleep(0.05)
    second = runs.started(toml, *ENDLESS, ranks=2)
    said = second.communicate(timeout=100)[1].decode()
    assert said.count("another process is at work here (process") >= 2
    assert "[rank 1] rank 0: " in said
    holder = json.loads((toml.parent / "run" / lock.NAME).read_text())["pid"]
    assert f"process {holder} on" in said
    assert first.poll() is None
    os.kill(holder, signal.SIGKILL)
    first.communicate(timeout=100)
    third = runs.started(toml, *ENDLESS, ranks=2)
    steps = metrics.read_text().count("\n")
    while metrics.read_text().count("\n") <= steps:
        assert third.poll() is None
        time.sleep(0.05)
    third.send_signal(signal.SIGTERM)
    said = third.communicate(timeout=100)[1].decode()
    assert "resuming" in said
    assert "[rank 0] stopped at step" in said
