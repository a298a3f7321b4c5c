"""`kill -9` of the engine, again and again: the run completes, and every group is trained once."""

import random
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from rlpt.rollout.records import unpacked
from rlpt.saved_supply import groups_path

DOCUMENTS = 32


def engine_of(process: subprocess.Popen) -> psutil.Process | None:
    """The engine process of a trainer, once there is one."""
    try:
        children = psutil.Process(process.pid).children(recursive=True)
        return next((c for c in children if "rlpt.rollout.serve" in " ".join(c.cmdline())), None)
    except psutil.Error:
        return None


def steps_done(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def kill_at(process: subprocess.Popen, run_dir: Path, step: int, draw: random.Random) -> bool:
    """Wait for the step, then a random part of one, then kill the engine that runs."""
    while steps_done(run_dir) < step:
        if process.poll() is not None:
            return False
        time.sleep(0.01)
    time.sleep(draw.uniform(0.0, 0.3))
    while (engine := engine_of(process)) is None and process.poll() is None:
        time.sleep(0.05)
    if engine is None:
        return False
    engine.kill()
    # The next one has another pid: it must not be hit by the same kill.
    engine.wait(timeout=30)
    return True


@pytest.mark.parametrize(
    ("staleness", "last", "kills"),
    [
        (2, 16, 4),
        pytest.param(0, 60, 20, marks=pytest.mark.slow),
        pytest.param(2, 60, 20, marks=pytest.mark.slow),
    ],
)
def test_a_run_survives_the_death_of_its_engine(
    train, tmp_path: Path, staleness: int, last: int, kills: int
) -> None:
    draw = random.Random(staleness)
    steps = sorted(draw.sample(range(1, last - 1), kills))
    words = (
        f"rollout.max_staleness={staleness}",
        f"stage.0.steps={last}",
        "rollout.save_groups=true",
    )
    run_dir = tmp_path / "run"
    process = train(run_dir, "engine.vllm.placement=separate", *words).start(tmp_path / "log")
    try:
        killed = [kill_at(process, run_dir, step, draw) for step in steps]
        # Each restart takes seconds; nothing may wait for its timeout of 120 s.
        assert process.wait(timeout=240) == 0, (tmp_path / "log").read_text()[-3000:]
    finally:
        process.kill()
    assert sum(killed) == kills
    trained = [
        row["position"]
        for step in range(1, last + 1)
        for row in unpacked(groups_path(run_dir, step).read_bytes(), "test")
    ]
    assert trained == list(range(last * DOCUMENTS))
    assert (tmp_path / "log").read_text().count("starting it again") >= kills
