"""The pipeline, top to bottom: shards -> prompts -> rollouts -> reward -> advantage -> loss -> update -> evaluation.

torchrun --nproc-per-node N -m rlpt.train CONFIG [--set k=v]...      or      rlpt train CONFIG
"""

import time
from contextlib import closing
from typing import Any

from rlpt import dist
from rlpt.checkpoint import Progress
from rlpt.config import RunConfig
from rlpt.console import progress as progress_bar
from rlpt.journal import describe, one_line, record_rollouts, write_summary
from rlpt.lock import only_one
from rlpt.mixture import open_shards
from rlpt.phases import CLOCK, phase
from rlpt.policy.load import blueprint
from rlpt.preemption import Stop, stoppable
from rlpt.preflight import check
from rlpt.rl_update import rl_score, rl_step
from rlpt.rlvr import RLVRStage
from rlpt.runlog import check_folder, open_log
from rlpt.session import Session
from rlpt.stages import NextTokenStage, RLStage, Stage
from rlpt.update import Stepped, next_token_step
from rlpt.watchdog import watched
from rlpt.work import Work
from rlpt_data.strict import UserError


def run(cfg: RunConfig, resume: str = "auto", dry_run: bool = False) -> dict[str, Any]:
    """Train all stages of a configuration, from where the run folder stands; returns the summary.

    Raises UserError for a mistake in the configuration, the shards or the run folder, FaultError where the run's own
    numbers leave the limits of [guards] or [mismatch]; the last checkpoint is kept either way.
    """
    shards = open_shards(cfg.data)
    plan = blueprint(cfg.policy, shards, cfg.longest_path, cfg.prompts.frame)
    check(cfg, shards, plan)
    if dry_run:
        check_folder(cfg)
        return describe(cfg, shards, plan)
    supervision = cfg.supervision
    with (
        stoppable(supervision.stop_seconds) as stop,
        dist.world() as world,
        only_one(cfg.run_dir, world),
        watched(supervision.hang_seconds, cfg.run_dir, world),
        open_log(cfg, world) as log,
        closing(Session.open(cfg, shards, plan, world, log)) as session,
    ):
        progress = session.resume(resume)
        log.start(session.checks)
        for stage in cfg.stage[progress.stage :]:
            run_stage(session, stage, progress, stop)
        return write_summary(session, progress)


def run_stage(session: Session, stage: Stage, progress: Progress, stop: Stop) -> None:
    """Evaluate where it matters, take the steps, evaluate again, save."""
    check_start(session, stage, progress)
    work = session.begin(stage)
    with stop.deferred():
        take_steps(session, work, stage, progress, stop)
        work.close()
        evaluate(session, stage, progress)
        progress.stage, progress.stage_step, progress.cursor = progress.stage + 1, 0, 0
        session.save(progress, None)
        session.settle()
        if asked(stop, session.world):
            raise stop.stopped(f"at step {progress.step}")


def take_steps(session: Session, work: Work, stage: Stage, progress: Progress, stop: Stop) -> None:
    """The steps that are left, with evaluations and checkpoints between them."""
    began, period = progress.step, session.cfg.checkpoint.every
    with progress_bar(
        stage.name, stage.steps, progress.stage_step, session.world.is_main
    ) as report:
        while progress.stage_step < stage.steps and not goal_reached(session, stage, progress):
            if period and progress.stage_step % period == 0 and progress.step > began:
                session.save(progress, work)
            metrics = run_step(session, work, stage, progress)
            session.saver.look()
            report(progress.stage_step, one_line(metrics))
            if asked(stop, session.world):
                session.save(progress, work)
                session.settle()
                raise stop.stopped(f"at step {progress.step}")


def asked(stop: Stop, world: dist.World) -> bool:
    """Whether the run is to end: a signal may have reached only one of the ranks. Collective."""
    found = dist.largest(stop.asked, world)
    # Without a signal nothing is written: one that has come meanwhile, to this rank alone, is for the next time.
    if found:
        stop.asked = found
    return found > 0


def run_step(session: Session, work: Work, stage: Stage, progress: Progress) -> dict[str, float]:
    """One optimiser step and its line of metrics."""
    started = time.perf_counter()
    if isinstance(stage, RLStage):
        stepped = rl_train_step(session, work, stage, progress)
    else:
        stepped = next_token_train_step(session, work, stage, progress)
    progress.step += 1
    progress.stage_step += 1
    CLOCK.step = progress.step
    taken = work.supply.next if work.supply else progress.cursor + stage.documents_per_step
    progress.cursor = taken
    values = {"loss/grad_norm": stepped.grad_norm, "time/step": time.perf_counter() - started}
    values |= work.stream.shares(taken)
    if work.learner.scale.moves:
        values["loss/scale"] = work.learner.scale.value
    if isinstance(stage, RLStage):
        waited = stepped.sums.get("time/wait", (0.0, 1.0))[0]
        stepped.sums.update(
            session.engine.counters(), **{"time/idle_share": (waited, values["time/step"])}
        )
    return session.sentry.step(stage.name, progress.step, stepped, values)


def next_token_train_step(
    session: Session, work: Work, stage: NextTokenStage, progress: Progress
) -> Stepped:
    """documents -> framed sequences -> loss -> update."""
    assert work.framer is not None
    world = session.world
    samples = work.stream.take(progress.cursor, stage.documents_per_step, world.rank, world.size)
    frames = [work.framer.frame(epoch, document) for epoch, document in samples]
    with phase("update"):
        return next_token_step(work.learner, frames, stage, progress.stage_step)


def rl_train_step(session: Session, work: Work, stage: RLStage, progress: Progress) -> Stepped:
    """weights -> engine; documents -> prompts -> rollouts -> reward -> advantage -> loss -> update."""
    assert work.reward is not None
    assert work.supply is not None
    cfg = session.cfg
    started = time.perf_counter()
    if work.supply.samples:
        session.publish(progress.step)
    with phase("generate"):
        batch = work.supply.take(progress.step, stage.steps - progress.stage_step)
        session.engine.rest()
    generated = time.perf_counter() - started
    update = rl_step if cfg.rollout.train else rl_score
    with phase("update"):
        stepped = update(
            work.learner, batch.groups, work.reward, stage, progress.step, progress.stage_step
        )
    assert stepped.rewarded is not None
    if not stepped.skipped:
        work.supply.rated(batch, stepped.rewarded)
    work.supply.trained(batch)
    work.renew_reference(stage, progress.stage_step + 1)
    stepped.sums.update(batch.sums, **{"time/generate": (generated, 1.0)})
    record_rollouts(session, batch, stepped, progress)
    return stepped


def goal_reached(session: Session, stage: Stage, progress: Progress) -> bool:
    """Periodic evaluation inside a stage; True where the stage has reached its goal."""
    every = session.cfg.evaluation.every
    if not every or progress.stage_step == 0 or progress.stage_step % every:
        return False
    gain = evaluate(session, stage, progress)
    goal = stage.until_gain if isinstance(stage, NextTokenStage) else None
    return goal is not None and gain >= goal


def evaluate(session: Session, stage: Stage, progress: Progress) -> float:
    """Held-out questions, if the stage has some, and held-out text; returns the gain there, nats per token."""
    with phase("evaluate"):
        if isinstance(stage, RLVRStage):
            session.answer(stage, progress.step)
        return session.evaluate(stage.name, progress.step).gain


def check_start(session: Session, stage: Stage, progress: Progress) -> None:
    """The evaluation that a run is compared with (where RL begins, or where all begins), and the gate of the stage."""
    rl = isinstance(stage, RLStage)
    alone = not any(isinstance(other, RLStage) for other in session.cfg.stage)
    if progress.stage_step > 0 or not (rl or (alone and progress.step == 0)):
        return
    gain = evaluate(session, stage, progress)
    if rl and stage.require_gain is not None and gain < stage.require_gain:
        raise UserError(
            f"stage {stage.name}: held-out gain is {gain:.3f} nats per token, require_gain = {stage.require_gain}; "
            "lower it and repeat the command, or start another run with a longer stage before this one"
        )


def main() -> None:
    """`python -m rlpt.train CONFIG`: the command `rlpt train`, for torchrun."""
    import sys

    from rlpt.cli import main as command_line

    command_line(["train", *sys.argv[1:]])


if __name__ == "__main__":
    main()
