"""What a run writes down for people to read later: its checks before the first step, and whole rollouts."""

import json
from pathlib import Path

from rlpt.config import RunConfig
from rlpt.policy.selfcheck import LARGEST_ERROR
from rlpt.report.evidence import evidence
from rlpt.report.run import read
from rlpt.train import run
from rlpt_data.strict import load


def test_a_run_writes_down_what_it_checked_and_how_long_its_thoughts_were(toml: Path) -> None:
    cfg = load(RunConfig, toml)
    run(cfg)
    layout = json.loads((cfg.run_dir / "environment.json").read_text())["checks"]["layout"]
    assert 0 < layout["largest"] <= layout["bar"] == LARGEST_ERROR
    known = read(cfg.run_dir)
    assert (
        f"{layout['largest']:.1e} nats" in dict(evidence(known))["shared layout against one by one"]
    )
    rollouts = [each for group in known.rollouts for each in group["rollouts"]]
    assert rollouts
    for each in rollouts:
        # Thought, closer and, where the frame asks for it, a prediction.
        assert 0 <= each["thought_tokens"] < len(each["ids"])
        assert bool(each["thought"]) <= bool(each["thought_tokens"])
    closers = {each["ids"][each["thought_tokens"]] for each in rollouts}
    assert len(closers) == 1
