"""Middle segments, budgets, dynamic sampling and the difficulty window through a whole run, cut off and taken up."""

import json
from pathlib import Path

import pytest

from rlpt.config import RunConfig
from rlpt.runlog import read_journal
from rlpt.train import run
from rlpt_data.strict import load

WORDS = [
    "stage.0.steps=2", "stage.1.steps=6", "stage.1.documents_per_step=4", "evaluation.every=0",
    "stage.1.reward={kind='match',how='first_token'}", "thought.prediction_tokens=2",
    "stage.1.objective={}", "stage.1.advantage={}",
    "prompts.cuts_per_document=1", "prompts.segment='middle'", "prompts.after_tokens=8",
    "stage.1.budget={kind='decay',start=5}",
    "stage.1.sampling={kind='dynamic',rounds=2,no_positive_resampling=0.9}",
    "stage.1.difficulty={low=0.0,high=0.5}",
    "checkpoint.every=2", "rollout.save_groups=true",
]  # fmt: skip


def _rows(run_dir: Path) -> list[dict]:
    rows = [row for row in read_journal(run_dir / "metrics.jsonl") if row["stage"] == "rl"]
    clocks = ("time/", "engine/")
    return [{name: v for name, v in row.items() if not name.startswith(clocks)} for row in rows]


@pytest.mark.slow
def test_what_is_sampled_again_or_passed_over_is_in_the_log_and_resumes_exactly(
    runs, toml: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(load(RunConfig, toml, WORDS))
    whole, run_dir = _rows(toml.parent / "run"), toml.parent / "run"
    group_size = 3
    for row in whole:
        sampled, thrown = row["sampling/rollouts_sampled"], row["sampling/rollouts_thrown"]
        assert sampled - thrown == 4 * group_size
        assert row["sampling/filled_groups"] <= 4
        assert row["thought/length"] <= 5 * 0.2 ** ((row["step"] - 3) / 6)
    assert sum(row["sampling/rollouts_thrown"] for row in whole) > 0
    assert whole[-1]["difficulty/rated"] > 0
    progress = json.loads((run_dir / "checkpoints" / "step_000006" / "progress.json").read_text())
    assert progress["cursor"] > 4 * 4
    again = toml.parent / "again"
    words = [f"run_dir='{again}'", *WORDS]
    runs.cut_off_and_resumed(load(RunConfig, toml, words), 6, monkeypatch)
    assert _rows(again) == whole
