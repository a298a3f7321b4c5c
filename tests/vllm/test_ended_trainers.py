"""Engines end with their trainer, however that ends."""

import signal
import time
from pathlib import Path

import psutil
import pytest

from rlpt import checkpoint


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, 143), (signal.SIGKILL, -9)],
    ids=["SIGTERM", "SIGKILL"],
)
def test_no_engine_is_left_of_a_trainer_that_ended(
    train, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    run_dir, log = tmp_path / "run", tmp_path / "log"
    words = ("engine.vllm.placement=separate", "rollout.max_staleness=2", "stage.0.steps=10000")
    trainer = train(run_dir, *words).start(log)
    metrics = run_dir / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().count("\n") >= 3):
        assert trainer.poll() is None, log.read_text()[-3000:]
        time.sleep(0.05)
    family = psutil.Process(trainer.pid).children(recursive=True)
    assert any("rlpt.rollout.serve" in one.cmdline() for one in family)
    trainer.send_signal(number)
    assert trainer.wait(timeout=60) == code, log.read_text()[-3000:]
    _, alive = psutil.wait_procs(family, timeout=10)
    assert not alive
    saved = checkpoint.complete_steps(run_dir)
    assert bool(saved) == (number == signal.SIGTERM)
    if saved:
        assert f"stopped at step {saved[-1]} after SIGTERM" in log.read_text()
