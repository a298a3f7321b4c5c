"""A module of known laws, and a run that follows one."""

from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def known(module_at) -> ModuleType:
    """The module `known_laws`."""
    return module_at(Path(__file__).with_name("known_laws.py"))


@pytest.fixture
def thinking_run(known: ModuleType, tmp_path: Path) -> Path:
    """100 steps of warm-up and 200 of thinking, evaluated every 20: gains on a known sigmoid without any noise."""
    stages = (("warm_up", "next_token"), ("think", "rl"))
    metrics = [
        {
            "step": step,
            "stage": "warm_up" if step <= 100 else "think",
            "reward/mean": float("nan") if step == 150 else step / 100,
            "tokens/train": 10.0,
            "time/step": 0.5,
        }
        | ({"tokens/rollout": 7.0} if step > 100 else {})
        for step in range(1, 301)
    ]
    evaluations = []
    for step in range(0, 301, 20):
        gain = float(known.sigmoid(step - 100, 60, 1.5, 0.2, -0.1)) if step > 100 else -0.1
        interval = {"mean": gain, "ci_low": gain - 0.0196, "ci_high": gain + 0.0196}
        stage = "warm_up" if step <= 100 else "think"
        evaluations.append((step, stage, {"gain_heldout": interval, "verdict": "harmful"}))
    return known.write_run(tmp_path / "run", evaluations, metrics, stages)
