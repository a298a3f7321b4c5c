"""Everything a configuration can have wrong that only the shards, other runs, the number of ranks or a judge can tell:
refused before any training.
"""

from pathlib import Path
from typing import Any

from rlpt import checkpoint, dist
from rlpt.config import RunConfig
from rlpt.flops import document_tokens
from rlpt.hints import hint_of
from rlpt.masker import masker_of
from rlpt.mixture import stage_stream
from rlpt.policy.foreign import described
from rlpt.policy.load import Blueprint
from rlpt.policy.packing import Layout
from rlpt.prompts import held_out
from rlpt.questions import questions_of
from rlpt.rlvr import RLVRStage
from rlpt.runlog import has_work, read_config, read_questions
from rlpt.stages import RLStage
from rlpt_data.shards import ShardFolder
from rlpt_data.strict import UserError


def check(cfg: RunConfig, shards: ShardFolder, plan: Blueprint) -> None:
    """Everything wrong that only the shards, other runs and a judge can tell. Raises UserError."""
    for stage in cfg.stage:
        stage_stream(shards, cfg, stage)
        if isinstance(stage, RLVRStage):
            _check_questions(cfg, shards, stage)
        if isinstance(stage, RLStage):
            stage.reward.refuse_unready()
            if stage.masker is not None:
                masker_of(cfg, stage.masker, shards, plan)
            if stage.hint is not None:
                hint_of(stage.hint, cfg.policy, shards, plan)
            if (other := getattr(stage.reward, "foreign", None)) is not None:
                described(other.path, plan, cfg.longest_path)
    held_out(
        shards.split(cfg.evaluation.split),
        cfg.prompts,
        plan.vocabulary.markers,
        1,
        cfg.seed,
        cfg.evaluation.domains,
    )
    if cfg.rollout.saved is not None:
        _check_saved(cfg, cfg.rollout.saved)
    if cfg.init_from is not None and not has_work(cfg.run_dir):
        checkpoint.find(cfg.init_from)


def _check_questions(cfg: RunConfig, shards: ShardFolder, stage: RLVRStage) -> None:
    """Both files can be asked, and are those that the run began with."""
    known = read_questions(cfg.run_dir, stage.name)
    for name, found in zip(
        ("train", "test"), questions_of(stage, cfg.prompts, shards), strict=True
    ):
        if known is not None and known[name]["hash"] != found.digest:
            raise UserError(
                f"{cfg.run_dir}: stage {stage.name} was trained with questions of hash {known[name]['hash']}, "
                f"{found.name} now has {found.digest}; put the old file back, or choose another run_dir"
            )


def check_shares(cfg: RunConfig, world: dist.World, layout: Layout) -> None:
    for stage in cfg.stage:
        if stage.documents_per_step % world.size:
            raise UserError(
                f"stage {stage.name}: documents_per_step = {stage.documents_per_step} must be divisible by the "
                f"number of ranks, {world.size}"
            )
        if isinstance(stage, RLStage):
            _check_reuse(cfg, stage, stage.documents_per_step // world.size)
        if isinstance(stage, RLStage) and stage.update.score_with == "training_forward":
            _check_one_forward(cfg, stage, world, layout)


def _check_reuse(cfg: RunConfig, stage: RLStage, share: int) -> None:
    """Every rank takes as many documents again as leaves each of them `max_reuse` uses."""
    reuse = cfg.rollout.max_reuse
    if share % reuse:
        raise UserError(
            f"stage {stage.name}: rollout.max_reuse = {reuse} must divide the documents of a step on one rank, "
            f"{share}; change documents_per_step or the number of ranks"
        )


def _check_saved(cfg: RunConfig, saved: Path) -> None:
    """Saved groups are of the prompts and the distribution that this run would have sampled."""
    path = saved / "config.json"
    if not path.is_file():
        raise UserError(f"rollout.saved = {saved}: has no config.json; name the folder of a run")
    theirs, mine = read_config(path), cfg.model_dump(mode="json")
    for name in ("seed", "prompts", "thought"):
        if theirs.get(name) != mine[name]:
            raise UserError(
                f"rollout.saved = {saved}: was sampled with {name} = {theirs.get(name)}, this run has {mine[name]}"
            )
    if _pace(theirs) != _pace(mine):
        raise UserError(
            f"rollout.saved = {saved}: its curriculum gave other cuts; use that run's data.cuts and its stages' name, "
            "curriculum, steps and documents_per_step, and groups of a run with rollout.max_reuse = 1"
        )


def _pace(table: dict[str, Any]) -> list[Any]:
    """What the cuts of a run's curricula hang on."""
    keys = ("name", "curriculum", "steps", "documents_per_step")
    return [
        (table["data"].get("cuts"), table["rollout"]["max_reuse"], *(stage[key] for key in keys))
        for stage in table["stage"]
        if stage.get("curriculum")
    ]


def _check_one_forward(cfg: RunConfig, stage: RLStage, world: dist.World, layout: Layout) -> None:
    """A step whose rewards must all be known before any loss has to fit one micro-batch."""
    reason = stage.why_separate(whole=False)
    most = document_tokens(cfg, stage, layout, continuations=True)
    most *= stage.documents_per_step // world.size
    if reason is not None and most > stage.micro_batch_tokens:
        raise UserError(
            f"stage {stage.name}: update.score_with = 'training_forward': {reason}, unless a rank's share of a step is "
            f"one micro-batch; raise micro_batch_tokens from {stage.micro_batch_tokens} to {most}, or use 'auto'"
        )
