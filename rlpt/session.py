"""What a run holds while it trains: policy, engine, journals, the parts of the current stage and their checkpoints.

`rlpt.train` reads as the pipeline; this is what its words stand for.
"""

import time
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from rlpt import checkpoint, dist
from rlpt.agreement import Trial
from rlpt.checkpoint import Progress, Saver
from rlpt.config import RunConfig
from rlpt.console import say
from rlpt.evaluate import answers, files
from rlpt.evaluate.evaluation import Evaluation
from rlpt.evaluate.subject import Subject, decoder, evaluate_subject
from rlpt.frames import Framer
from rlpt.guards import coarser
from rlpt.hints import HintedSupply, hint_of
from rlpt.masker import MaskerSupply, masker_of
from rlpt.mixture import stage_stream
from rlpt.optim import adamw
from rlpt.phases import CLOCK, phase
from rlpt.policy import load
from rlpt.policy.load import Blueprint
from rlpt.policy.policy import Policy
from rlpt.preflight import check_shares
from rlpt.prompts import Samples
from rlpt.questions import evidence, held_out_questions, in_words, question_prompts, questions_of
from rlpt.reward.base import Kit, Reward
from rlpt.rlvr import RLVRStage
from rlpt.rollout import sync
from rlpt.rollout.engine import Engine
from rlpt.rollout.records import packed, supply_rows
from rlpt.rollout.start import open_engine
from rlpt.runlog import RunLog, has_work, read_journal
from rlpt.saved_supply import SavedSupply
from rlpt.sentry import Sentry
from rlpt.stages import NextTokenStage, RLStage, Stage
from rlpt.supply import Supply
from rlpt.types import Markers
from rlpt.update import Learner, LossScale
from rlpt.work import Outfit, Work
from rlpt_data.shards import ShardFolder
from rlpt_data.strict import UserError

_SUPPLY = "supply_"
"""Files of a checkpoint with the rollouts in hand, one a rank."""


@dataclass
class Session:
    cfg: RunConfig
    shards: ShardFolder
    plan: Blueprint
    world: dist.World
    log: RunLog
    policy: Policy
    engine: Engine
    saver: Saver
    started: float = field(default_factory=time.perf_counter)
    unfinished: Progress | None = None
    """Progress of a checkpoint inside a stage, whose other parts `begin` restores."""
    checks: dict[str, Any] = field(default_factory=dict)
    """What the trial before the first step measured."""
    sentry: Sentry = field(init=False)

    def __post_init__(self) -> None:
        dtype = coarser(self.cfg.policy.compute_dtype, self.engine.dtype)
        self.sentry = Sentry(self.cfg, self.world, self.log, dtype)

    @property
    def markers(self) -> Markers:
        return self.plan.vocabulary.markers

    @classmethod
    def open(
        cls, cfg: RunConfig, shards: ShardFolder, plan: Blueprint, world: dist.World, log: RunLog
    ) -> "Session":
        """The policy as the configuration starts it, and an engine without weights."""
        check_shares(cfg, world, plan.layout)
        policy = load.load(cfg.policy, plan, world, cfg.seed)
        saver = Saver(cfg.run_dir, cfg.checkpoint, world)
        engine = open_engine(
            *(cfg.engine, cfg.policy, plan, cfg.thought, cfg.longest_branch),
            *(str(shards.manifest.tokenizer_hash), cfg.run_dir / "engine", cfg.seed, world),
        )
        return cls(cfg, shards, plan, world, log, policy, engine, saver)

    def resume(self, how: str) -> Progress:
        """Progress of the newest complete checkpoint, its weights loaded; a fresh start where there is none."""
        if how == "never" and has_work(self.cfg.run_dir):
            raise UserError(
                f"{self.cfg.run_dir}: holds a run already; use --resume auto or another run_dir"
            )
        step = checkpoint.newest_intact(self.cfg.run_dir, self.world)
        progress = self._fresh() if step is None else self.restored(step)
        say(self.plan.note, self.world.is_main)
        trial = Trial(self.cfg, self.shards, self.plan, self.world)
        # A copy in float32 has no gradients of its own yet.
        trial.layout(self._in_fp32().requires_grad_(True))
        if not self.engine.is_reference:
            self.publish(progress.step)
            trial.engine(self.engine, self._in_fp32())
        self.checks = trial.found
        if self.world.is_main:
            checkpoint.set_aside(self.cfg.run_dir, progress.step)
        # No rank may read a journal before rank 0 has cut it back.
        self.log.truncate(progress.journals, progress.step)
        dist.barrier(self.world)
        self.sentry.recall()
        CLOCK.step = progress.step
        return progress

    def _fresh(self) -> Progress:
        if self.cfg.init_from is not None:
            tokenizer = str(self.shards.manifest.tokenizer_hash)
            path = checkpoint.find(self.cfg.init_from)
            checkpoint.load_weights(path, self.policy, tokenizer, self.world)
        manifest = self.shards.manifest
        return Progress(shards=manifest.hash, tokenizer=str(manifest.tokenizer_hash))

    def restored(self, step: int) -> Progress:
        """The weights of a checkpoint; its other parts come with `begin`."""
        path = checkpoint.path_of(self.cfg.run_dir, step)
        progress = checkpoint.read_progress(path)
        self._check_shards(progress.shards)
        steps = [stage.steps for stage in self.cfg.stage] + [0]
        if progress.stage >= len(steps) or progress.stage_step > steps[progress.stage]:
            raise UserError(
                f"{path}: says step {progress.stage_step} of stage {progress.stage}, which this run does not have; use "
                "another checkpoint"
            )
        checkpoint.restore(path, {"policy": self.policy})
        say(f"resuming {self.cfg.run_dir} at step {progress.step}", self.world.is_main)
        if progress.stage_step > 0:
            self.unfinished = progress
        return progress

    def _check_shards(self, known: str) -> None:
        found = self.shards.manifest.hash
        if known != found:
            raise UserError(
                f"{self.cfg.run_dir}: was trained on shards with hash {known}, {self.shards.path} now has {found}; "
                "put the old shards back, or choose another run_dir"
            )

    def begin(self, stage: Stage) -> Work:
        """Optimiser, replicas, order and reward of a stage; restored where the run was cut off inside it."""
        ema = self._copy() if isinstance(stage, RLStage) and "ema" in stage.replicas else None
        learner = Learner(
            self.policy,
            adamw(self.policy, stage.optimizer),
            ema,
            self.markers,
            self.world,
            self.cfg.seed,
            self.cfg.thought.temperature,
            LossScale(self.cfg.policy.compute_dtype),
        )
        work = (
            self._next_token(stage, learner)
            if isinstance(stage, NextTokenStage)
            else self._rl(stage, learner)
        )
        if (unfinished := self.unfinished) is not None:
            path = checkpoint.path_of(self.cfg.run_dir, unfinished.step)
            checkpoint.restore(path, work.parts())
            self.unfinished = None
            if work.supply is not None:
                self.publish(unfinished.step)
                found = checkpoint.files(path, _SUPPLY)
                rows = [row for name, data in found for row in supply_rows(data, name)]
                work.supply.restore(rows, unfinished.cursor, str(path))
        return work

    def _copy(self) -> Policy:
        policy = load.sharded(self.cfg.policy, self.plan, self.world).requires_grad_(False)
        load.copy_weights(policy, self.policy)
        return policy

    def _next_token(self, stage: NextTokenStage, learner: Learner) -> Work:
        cfg = self.cfg
        stream = stage_stream(self.shards, cfg, stage)
        framer = Framer(
            stage.mix,
            cfg.prompts,
            stage.window_tokens,
            cfg.thought.budget_tokens,
            self.markers,
            cfg.seed,
        )
        return Work(learner, stream, framer=framer)

    def _rl(self, stage: RLStage, learner: Learner) -> Work:
        cfg = self.cfg
        stream = stage_stream(self.shards, cfg, stage)
        frozen = self._copy() if "frozen" in stage.replicas else None
        outfit = Outfit(cfg, self.shards, self.plan, self.world, stage, learner, frozen)
        reward = outfit.reward()
        say(f"stage {stage.name}: {stage.arrangement}", self.world.is_main)
        if isinstance(stage, RLVRStage):
            found = evidence(stage.questions, *questions_of(stage, cfg.prompts, self.shards))
            say(f"stage {stage.name}: {in_words(found)}", self.world.is_main)
            self.log.questions(stage.name, found)
        supply = self._supply(stage, stream, reward)
        return Work(outfit.learner_with_reference(), stream, None, reward, frozen, supply)

    def _supply(self, stage: RLStage, stream: Samples, reward: Reward) -> Supply | SavedSupply:
        cfg = self.cfg
        if cfg.rollout.saved is not None:
            own = cfg.rollout.saved.resolve() == cfg.run_dir.resolve()
            return SavedSupply(
                *(
                    cfg.rollout.saved,
                    own,
                    stream,
                    cfg.prompts,
                    stage,
                    self.markers,
                    cfg.seed,
                    self.world,
                )
            )
        own = cfg.longest_branch - cfg.prompts.context_tokens
        parts = (
            *(self.engine, stream, cfg.prompts, cfg.rollout, stage, self.markers, cfg.seed),
            *(stage.group_size * own, self.world, reward),
        )
        if stage.hint is not None:
            hint = hint_of(stage.hint, cfg.policy, self.shards, self.plan)
            return HintedSupply(hint, reward, *parts)
        if stage.masker is None:
            return Supply(*parts)
        return MaskerSupply(masker_of(cfg, stage.masker, self.shards, self.plan), *parts)

    def publish(self, step: int) -> None:
        """Send the weights to the engine, once per version."""
        if self.engine.version == step:
            return
        with phase("publish"):
            sync.publish(self.policy, self.engine, step)

    def evaluate(self, stage: str, step: int) -> Evaluation:
        """Held-out evaluation of the current weights, journalled; read back where this step was evaluated before."""
        path = files.path_of(self.cfg.run_dir, step)
        if self._evaluated(step):
            return files.load(path)
        self.publish(step)
        tokens = self.cfg.evaluation.batch_tokens
        subject = Subject.of(self._in_fp32(), self.engine, self.markers, self.world, tokens)
        found = evaluate_subject(self.cfg, self.shards, subject, self.world)
        if self.world.is_main:
            files.save(path, found)
        self.log.evaluation(step, stage, found.summary)
        dist.barrier(self.world)
        gain = found.summary["gain_heldout"]["mean"]
        say(
            f"step {step} ({stage}): held-out gain {gain:+.4f} nats/token, verdict {found.summary['verdict']}",
            self.world.is_main,
        )
        self.sentry.evaluated(stage, step, found.summary)
        return found

    def answer(self, stage: RLVRStage, step: int) -> None:
        """Accuracy of the current weights on the held-out questions, journalled; once a step."""
        done = read_journal(self.cfg.run_dir / "answers.jsonl")
        if any((row["stage"], row["step"]) == (stage.name, step) for row in done):
            return
        self.publish(step)
        _, test = questions_of(stage, self.cfg.prompts, self.shards)
        prompts = question_prompts(
            held_out_questions(test, stage.questions), self.cfg.prompts, self.markers
        )
        token_bytes = partial(self.plan.token_bytes, self.shards)
        reward = stage.reward.build(Kit({}, self.markers, True, token_bytes))
        found = answers.answer(
            *(self.engine, prompts, reward, self.markers, stage.questions.samples),
            *(self.cfg.thought.prediction_tokens, decoder(self.shards), self.world),
        )
        values = answers.summarise(found, draws=self.cfg.evaluation.bootstrap, seed=self.cfg.seed)
        if self.world.is_main:
            answers.save(answers.path_of(self.cfg.run_dir, stage.name, step), found)
        self.log.answers(step, stage.name, values)
        dist.barrier(self.world)
        say(f"step {step} ({stage.name}): {answers.in_words(values)}", self.world.is_main)

    def _in_fp32(self) -> Policy:
        """The policy for evaluation: bf16 noise is larger than many gains (MEASURING, section 4)."""
        if self.cfg.policy.compute_dtype == "float32":
            return self.policy
        exact = self.cfg.policy.model_copy(update={"compute_dtype": "float32"})
        policy = load.sharded(exact, self.plan, self.world).requires_grad_(False)
        load.copy_weights(policy, self.policy)
        return policy

    def _evaluated(self, step: int) -> bool:
        return any(
            row["step"] == step for row in read_journal(self.cfg.run_dir / "evaluations.jsonl")
        )

    def close(self) -> None:
        """End the save in flight, and the engine: its processes, files and memory."""
        try:
            self.saver.close()
        finally:
            self.engine.close()

    @phase("save")
    def save(self, progress: Progress, work: Work | None) -> None:
        """A checkpoint: all parts inside a stage, the weights alone between two stages."""
        progress.seconds += time.perf_counter() - self.started
        self.started = time.perf_counter()
        progress.journals = self.log.sizes()
        parts = work.parts() if work is not None else {"policy": self.policy}
        rows = work.supply.rows() if work is not None and work.supply is not None else []
        own = {f"{_SUPPLY}{self.world.rank}.jsonl.zst": packed(rows)} if rows else {}
        self.saver.save(progress, parts, own)

    @phase("save")
    def settle(self) -> None:
        """Wait for the save in flight. Raises FaultError, on every rank, where it failed on any."""
        self.saver.settle()
