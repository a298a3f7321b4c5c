"""One saved step again: its checkpoint, its groups, its update; beside what the run wrote down. Nothing is written."""

from contextlib import closing
from pathlib import Path
from typing import Any

from rlpt import checkpoint, dist
from rlpt.config import RunConfig
from rlpt.engines import EngineConfig, RolloutConfig
from rlpt.mixture import open_shards
from rlpt.policy.load import blueprint
from rlpt.rl_update import rl_step
from rlpt.runlog import RunLog, read_config, read_journal
from rlpt.session import Session
from rlpt.stages import RLStage
from rlpt.update import reduced
from rlpt_data.strict import UserError, parse

_CLOCKS = ("time/", "engine/")
"""Metrics of the machine, not of the step."""


def replay(run_dir: Path, step: int) -> dict[str, dict[str, float]]:
    """``{metric: {"run": x, "replay": y}}`` of one RL step, for every metric that both know.

    Needs the checkpoint of the step before (`checkpoint.every = 1` keeps all that `keep_last` allows) and the step's
    groups (`rollout.save_groups = true`). Raises UserError where one is missing or damaged.
    """
    cfg = _config(run_dir)
    path = checkpoint.find(f"{run_dir}@{step - 1}")
    shards = open_shards(cfg.data)
    plan = blueprint(cfg.policy, shards, cfg.longest_path, cfg.prompts.frame)
    with (
        dist.world() as world,
        closing(Session.open(cfg, shards, plan, world, RunLog(cfg, world))) as session,
    ):
        checkpoint.check_intact(path, world)
        progress = session.restored(checkpoint.read_progress(path).step)
        if progress.stage >= len(cfg.stage):
            raise UserError(f"{run_dir}: step {step - 1} was its last; replay an earlier one")
        stage = cfg.stage[progress.stage]
        if not isinstance(stage, RLStage):
            raise UserError(f"{run_dir}: step {step} is of stage {stage.name}, which has no groups")
        found = _again(session, stage, progress)
    written = {row["step"]: row for row in read_journal(run_dir / "metrics.jsonl")}.get(step, {})
    return {
        name: {"run": written[name], "replay": value}
        for name, value in sorted(found.items())
        if name in written and not name.startswith(_CLOCKS)
    }


def _again(session: Session, stage: RLStage, progress: checkpoint.Progress) -> dict[str, float]:
    work = session.begin(stage)
    assert work.supply is not None
    assert work.reward is not None
    batch = work.supply.take(progress.step, 1)
    stepped = rl_step(
        work.learner, batch.groups, work.reward, stage, progress.step, progress.stage_step
    )
    sums = stepped.sums | batch.sums
    return reduced(sums, stepped.extremes, session.world) | {"loss/grad_norm": stepped.grad_norm}


def _config(run_dir: Path) -> RunConfig:
    """The run's own configuration, except that groups come from its folder."""
    path = run_dir / "config.json"
    if not path.is_file():
        raise UserError(f"{path}: absent; name the folder of a run")
    table: dict[str, Any] = read_config(path)
    table["engine"] = EngineConfig().model_dump(mode="json")
    table["rollout"] = RolloutConfig(source="saved", saved=run_dir).model_dump(mode="json")
    return parse(RunConfig, table, str(path))
