"""Every method's preset runs: its rewards, advantages and objective in a small run, and it learns something finite."""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlpt.arms import Arm, arm_config, rl_stage
from rlpt.config import RunConfig
from rlpt.runlog import read_journal
from rlpt.train import run
from rlpt_data.strict import load

ROOT = Path(__file__).parents[2]
PRESETS = sorted((ROOT / "configs/methods").glob("*.toml"))
CHANGES = {
    "bow": ("stage.1.reward.foreign.path={model}",),
    "rmt": ("stage.1.gates.0.tokens=4",),
    "jepo": ("stage.1.objective.constant_tokens=4",),
    "verifree": ("stage.1.objective.constant_tokens=4",),
    "rlpt_segments": ("stage.1.reward.address={judge}",),
    "pretrainzero": (
        *("stage.1.masker.instruction='mask:'", "stage.1.masker.max_tokens=2"),
        "stage.1.masker.edge_tokens=1",
    ),
    "meta_rlmt": ("stage.1.reward.address={judge}", "stage.1.objective.constant_tokens=4"),
}
"""Of a small run; what is larger in the paper's."""
BASE = {
    "pretrainzero": (
        "prompts.segment='middle'",
        "prompts.cuts_per_document=1",
        "prompts.after_tokens=8",
    ),
}
"""Of the base run, where a method asks for something of its prompts."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, whole: Path) -> Path:
    """A policy folder with the shards' tokenizer: another model that scores."""
    from rlpt.export import export

    out = tmp_path_factory.mktemp("exported") / "model"
    export(whole, None, out)
    return out


@pytest.fixture(scope="module")
def judge(beside) -> Iterator[str]:
    """The address of a rule-based stand-in for a judge: the protocol is tested against a real server elsewhere."""
    module = beside("rule_judge")
    with module.served() as server:
        yield server.address


@pytest.mark.slow
@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_a_preset_runs_twenty_steps_and_every_reward_is_finite(
    path: Path, toml: Path, model: Path, judge: str, tmp_path: Path
) -> None:
    words = ["stage.0.steps=2", "stage.1.steps=20", "stage.1.group_size=4"]
    base = load(RunConfig, toml, [*words, *BASE.get(path.stem, ())])
    changes = tuple(
        change.format(model=model, judge=judge) for change in CHANGES.get(path.stem, ())
    )
    arm = Arm(name=path.stem, method=path, set=changes)
    cfg = arm_config(arm, base, tmp_path / "run", seed=0)
    run(cfg)
    rows = [r for r in read_journal(cfg.run_dir / "metrics.jsonl") if r["stage"] == "rl"]
    assert len(rows) == 20
    for name in ("reward/mean", "loss/policy", "loss/grad_norm"):
        assert all(math.isfinite(row[name]) for row in rows), name
    stored = json.loads((cfg.run_dir / "config.json").read_text())
    assert stored["stage"][1]["reward"]["kind"] == rl_stage(cfg, "arm").reward.kind


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_an_arm_takes_the_method_and_leaves_the_budget(path: Path, toml: Path) -> None:
    base = load(RunConfig, toml, ["stage.1.steps=12", *BASE.get(path.stem, ())])
    own = load(RunConfig, path)
    changes = tuple(change for change in CHANGES.get(path.stem, ()) if "{" not in change)
    cfg = arm_config(Arm(name="arm", method=path, set=changes), base, Path("runs/x"), seed=7)
    taken, given = rl_stage(cfg, "arm"), rl_stage(own, "preset")
    assert (taken.reward, taken.kl) == (given.reward, given.kl)
    assert taken.advantage == given.advantage
    assert (taken.steps, taken.group_size) == (12, 3)
    assert (cfg.seed, cfg.prompts) == (7, base.prompts)
    assert cfg.thought.temperature == own.thought.temperature
