"""A clock on the wall that is put forward and back while a run trains has no part in it."""

import json
import random
import time
from pathlib import Path

import pytest
import torch


def test_a_clock_that_jumps_changes_nothing_and_no_step_takes_less_than_no_time(
    runs, whole: Path, toml: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, draw, asked = time.time, random.Random(0), []

    def jumping() -> float:
        asked.append(draw.choice((-1e9, -3600.0, 0.0, 1e6)))
        return now() + asked[-1]

    with monkeypatch.context() as patched:
        patched.setattr(time, "time", jumping)
        runs.finished(toml, "--set", "checkpoint.every=2")
    assert asked
    run_dir = toml.parent / "run"
    assert json.dumps(runs.steps_of(run_dir)) == json.dumps(runs.steps_of(whole))
    expected = runs.weights_of(whole, 20)
    assert all(
        torch.equal(each, expected[name]) for name, each in runs.weights_of(run_dir, 20).items()
    )
    clocks = [
        (name, value)
        for row in runs.steps_of(run_dir, drop=())
        for name, value in row.items()
        if name.startswith("time/")
    ]
    assert clocks
    assert all(0 <= seconds < 60 for _, seconds in clocks), clocks
    assert 0 < json.loads((run_dir / "summary.json").read_text())["wall_seconds"] < 600
