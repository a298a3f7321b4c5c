"""What a run tells: its plan, a line per step, the rollout dump and the summary."""

import resource
import time
from collections.abc import Mapping, Sequence
from typing import Any

from rlpt import dist, flops
from rlpt.checkpoint import Progress
from rlpt.config import RunConfig
from rlpt.evaluate import answers, files
from rlpt.evaluate.evaluation import Evaluation, headline
from rlpt.evaluate.subject import Decode, decoder
from rlpt.lots import Batch, lot_row
from rlpt.policy.load import Blueprint, meta_model
from rlpt.rollout.records import packed
from rlpt.runlog import read_journal
from rlpt.saved_supply import groups_path
from rlpt.session import Session
from rlpt.stages import RLStage
from rlpt.types import Group, Scores
from rlpt.update import Stepped
from rlpt_data.shards import ShardFolder

_CONTEXT_SHOWN = 96


def describe(cfg: RunConfig, shards: ShardFolder, plan: Blueprint) -> dict[str, Any]:
    """The resolved plan of `--dry-run`; no weight is allocated."""
    lm = meta_model(plan.config)
    return {
        "run_dir": str(cfg.run_dir),
        "shards": {
            "path": str(shards.path),
            "hash": shards.manifest.hash,
            "counts": shards.manifest.counts,
        },
        "policy": {
            "model": type(lm).__name__,
            "parameters": sum(parameter.numel() for parameter in lm.parameters()),
            "vocabulary": plan.vocabulary.size,
            "opener": plan.vocabulary.markers.opener,
            "closer": plan.vocabulary.markers.closer,
        },
        "steps": cfg.total_steps,
        "stages": flops.plan(cfg, plan.config, plan.layout),
    }


def one_line(metrics: Mapping[str, float]) -> str:
    """What to say beside the progress bar."""
    shown = {
        "loss": "loss/next_token",
        "gain": "gain/mean",
        "reward": "reward/mean",
        "thought": "thought/length",
    }
    return "  ".join(
        f"{label} {metrics[name]:.3f}" for label, name in shown.items() if name in metrics
    )


def record_rollouts(session: Session, batch: Batch, stepped: Stepped, progress: Progress) -> None:
    """The files of one step: some rollouts for people to read, all of them for a later run. Collective.

    Both are named like the line of metrics that the update in hand will get.
    """
    cfg, step = session.cfg, progress.step + 1
    if cfg.log.rollouts_every and progress.stage_step % cfg.log.rollouts_every == 0:
        session.log.rollouts(step, rollout_rows(session, batch, stepped, step))
    if cfg.rollout.save_groups:
        mine = [lot_row(lot, "trained") for lot in batch.lots]
        rows = [row for part in dist.gathered(mine, session.world) for row in part]
        session.log.groups(groups_path(cfg.run_dir, step), packed(rows))


def rollout_rows(
    session: Session, batch: Batch, stepped: Stepped, step: int
) -> list[dict[str, Any]]:
    """The first groups of the step, over all ranks, as text and numbers for people to read. Collective."""
    kept, groups = session.cfg.log.rollouts_kept, batch.groups
    # One reader for all rows: making it parses the tokenizer.
    read = decoder(session.shards)
    whole = batch.places
    mine = {
        position: [_row(groups, stepped, p, step, read) for p in whole[position]]
        for position in sorted(whole)[:kept]
    }
    rows: dict[int, list[dict[str, Any]]] = {}
    for part in dist.gathered(mine, session.world):
        rows |= part
    return [row for position in sorted(rows) for row in rows[position]][:kept]


def _row(
    groups: Sequence[Group], stepped: Stepped, p: int, step: int, read: Decode
) -> dict[str, Any]:
    assert stepped.rewarded is not None
    prompt, detail = groups[p].prompt, stepped.rewarded.detail
    no_think = detail.get("no_think")
    return {
        "step": step,
        "epoch": prompt.trunk.epoch,
        "document": prompt.trunk.document,
        "domain": prompt.trunk.domain,
        "cut": prompt.key[2],
        "hinted": groups[p].hinted,
        "context": read(prompt.context_ids[-_CONTEXT_SHOWN:].tolist()),
        "continuation_tokens": [read([index]) for index in prompt.continuation_ids.tolist()],
        "no_think_logp": _plain(no_think[p]) if no_think else None,
        "rollouts": [
            _rollout(groups[p], g, p, stepped, read) for g in range(len(groups[p].rollouts))
        ],
    }


def _rollout(group: Group, g: int, p: int, stepped: Stepped, read: Decode) -> dict[str, Any]:
    assert stepped.rewarded is not None
    assert stepped.advantage_PG is not None
    rollout, detail = group.rollouts[g], stepped.rewarded.detail
    scores = detail["thought"][p * len(group.rollouts) + g] if "thought" in detail else None
    return {
        "thought": read(rollout.thought_ids.tolist()),
        "thought_tokens": rollout.thought_len,
        "ids": rollout.ids.tolist(),
        "prediction": read(rollout.prediction_ids.tolist()),
        "behaviour_logp": [float(value) for value in rollout.logp],
        "version": int(rollout.version[0]),
        "finish": rollout.finish,
        "logp": _plain(scores) if scores is not None else None,
        "gain": detail["gain"][p][g] if "gain" in detail else None,
        "reward": float(stepped.rewarded.reward_PG[p, g]),
        "advantage": float(stepped.advantage_PG[p, g]),
    }


def _plain(scores: Scores) -> list[float]:
    return [float(value) for value in scores.logp]


def write_summary(session: Session, progress: Progress) -> dict[str, Any]:
    """summary.json: both ends of the run, paired, and what it took."""
    before, after = _ends(session)
    took = progress.seconds + time.perf_counter() - session.started
    summary = headline(before, after) | {
        "steps": progress.step,
        "wall_seconds": took,
        "peak_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "parameters": sum(parameter.numel() for parameter in session.policy.parameters()),
    }
    summary |= _answers(session.cfg) | _throughput(
        read_journal(session.cfg.run_dir / "metrics.jsonl")
    )
    session.log.summary(summary)
    dist.barrier(session.world)
    return summary


def _ends(session: Session) -> tuple[Evaluation, Evaluation]:
    """The evaluation at the start of the first RL stage (else the first one), and the last one."""
    rows = read_journal(session.cfg.run_dir / "evaluations.jsonl")
    rl = {stage.name for stage in session.cfg.stage if isinstance(stage, RLStage)}
    metrics = read_journal(session.cfg.run_dir / "metrics.jsonl")
    start = min((row["step"] - 1 for row in metrics if row["stage"] in rl), default=rows[0]["step"])
    return tuple(
        files.load(files.path_of(session.cfg.run_dir, step)) for step in (start, rows[-1]["step"])
    )  # pyright: ignore[reportReturnType]


def _answers(cfg: RunConfig) -> dict[str, Any]:
    """Accuracy on held-out questions at both ends of the last stage that has some, paired question by question."""
    rows = read_journal(cfg.run_dir / "answers.jsonl")
    if not rows:
        return {}
    before, after = (
        next(r for r in each if r["stage"] == rows[-1]["stage"]) for each in (rows, rows[::-1])
    )
    records = (
        answers.load(answers.path_of(cfg.run_dir, r["stage"], r["step"])) for r in (before, after)
    )
    changes = answers.change(*records, draws=cfg.evaluation.bootstrap, seed=cfg.seed)
    moved = {name: change.as_dict() for name, change in changes.items()}
    return {"rlvr": {"before": before, "after": after, **moved}}


def _throughput(metrics: Sequence[Mapping[str, float]]) -> dict[str, float | None]:
    return {
        "rollout_tokens_per_second": _rate(metrics, "tokens/rollout", "time/generate"),
        "train_tokens_per_second": _rate(metrics, "tokens/train", "time/train"),
    }


def _rate(metrics: Sequence[Mapping[str, float]], tokens: str, seconds: str) -> float | None:
    rows = [row for row in metrics if tokens in row and seconds in row]
    spent = sum(row[seconds] for row in rows)
    return sum(row[tokens] for row in rows) / spent if spent else None
