"""rlpt's arms: one step with a sequence per thought (naive), with trunks and branches (shared), and in between."""

import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from problem import SEED, Problem
from torch import Tensor, nn

from rlpt import dist
from rlpt.config import (
    DataConfig,
    EngineConfig,
    EvaluationConfig,
    PromptConfig,
    RunConfig,
    ThoughtConfig,
)
from rlpt.flops import step_cost
from rlpt.optim import adamw
from rlpt.policy.load import Blueprint, load
from rlpt.policy.policy import Policy
from rlpt.policy.scoring import Scorer
from rlpt.reward.base import Kit
from rlpt.reward.likelihood import LikelihoodReward
from rlpt.rl_update import rl_step
from rlpt.rollout.engine import generate
from rlpt.rollout.sync import publish
from rlpt.rollout.transformers_engine import TransformersEngine
from rlpt.stages import RLStage, UpdateConfig
from rlpt.types import Group
from rlpt.update import Learner

OURS = {
    "naive": ("naive", "separate_pass"),
    "two_passes": ("shared", "separate_pass"),
    "shared": ("shared", "training_forward"),
}
"""Arm: (policy.layout, update.score_with)."""


class Step(NamedTuple):
    """Seconds of one step, and what it computed."""

    step: float
    generate: float
    score: float
    train: float
    score_train: float
    """Everything after the last thought was sampled."""
    step_cpu: float
    """Of this process's threads together: whoever else uses the machine takes none of it."""
    score_train_cpu: float
    reward: float
    """Mean over all thoughts: log p(continuation) per token, in rlpt minus that without a thought."""
    loss: float | None = None


class RlptArm:
    """A policy, an engine and an optimiser, used as `rlpt.train.rl_train_step` uses them."""

    def __init__(self, name: str, given: Problem, world: dist.World, tokens: int | None) -> None:
        cfg = configuration(name, given, tokens)
        plan = given.planned(cfg.policy.layout)
        assert plan.layout == cfg.policy.layout, plan.note
        self.name, self.given, self.device = name, given, world.device
        self.version = 0
        self.stage = cfg.stage[0]
        self.cost = step_cost(cfg, self.stage, plan.config, plan.layout)
        """Where cuts are spread, an upper bound: it counts the longest context for all."""
        self.policy = load(cfg.policy, plan, world, SEED)
        self.engine = engine(cfg, plan, world)
        optimizer = adamw(self.policy, self.stage.optimizer)
        self.learner = Learner(self.policy, optimizer, None, given.markers, world, SEED)
        batch = self.stage.micro_batch_tokens
        scorer = Scorer(self.policy, given.markers.ids, world, batch)
        kit = Kit({"policy": scorer}, given.markers, centred=True)
        self.reward = LikelihoodReward().build(kit)

    def step(self) -> Step:
        """publish -> generate -> reward, loss, update."""
        started, started_cpu = now(self.device), time.process_time()
        publish(self.policy, self.engine, self.version)
        groups = generate(self.engine, self.given.prompts, self.given.size.group, "bench")
        generated, generated_cpu = now(self.device), time.process_time()
        stepped = rl_step(self.learner, groups, self.reward, self.stage, self.version, self.version)
        finished, finished_cpu = now(self.device), time.process_time()
        self.version += 1
        check_lengths(groups, self.given.size.thought)
        value = {name: total / count for name, (total, count) in stepped.sums.items() if count}
        return Step(
            step=finished - started,
            generate=generated - started,
            score=value["time/score"],
            train=value["time/train"],
            score_train=finished - generated,
            step_cpu=finished_cpu - started_cpu,
            score_train_cpu=finished_cpu - generated_cpu,
            reward=value["reward/mean"],
            loss=value["loss/policy"],
        )


def configuration(name: str, given: Problem, tokens: int | None) -> RunConfig:
    """The run whose one step this is; what is not named is the pipeline's default."""
    layout, score_with = OURS[name]
    size = given.size
    stage = {
        "name": "bench",
        "kind": "rl",
        "steps": 1_000_000,
        "documents_per_step": size.documents,
        "group_size": size.group,
        "update": UpdateConfig(score_with=score_with),
    }
    return RunConfig(
        run_dir=given.shards.path,
        data=DataConfig(shards=given.shards.path),
        policy=given.policy.model_copy(update={"layout": layout}),
        prompts=PromptConfig(
            context_tokens=size.positions[-1],
            min_context_tokens=1,
            horizon_tokens=size.continuation,
            cuts_per_document=size.cuts,
        ),
        thought=ThoughtConfig(budget_tokens=size.thought),
        engine=EngineConfig(prompts_per_batch=len(given.prompts)),
        evaluation=EvaluationConfig(bits_per_byte_documents=0),
        stage=(RLStage(**stage | ({} if tokens is None else {"micro_batch_tokens": tokens})),),
    )


def engine(cfg: RunConfig, plan: Blueprint, world: dist.World) -> TransformersEngine:
    """The pipeline's engine, its closer's logit hopeless: all thoughts have full length, like the peer's."""
    made = TransformersEngine(
        config=plan.config,
        layout=plan.layout,
        markers=plan.vocabulary.markers,
        thought=cfg.thought,
        seed=SEED,
        prompts_per_batch=cfg.engine.prompts_per_batch,
        device=world.device,
    )

    def never_close(_head: nn.Module, _input: Any, logits_NTV: Tensor) -> Tensor:
        logits_NTV[..., plan.vocabulary.markers.closer] = -torch.inf
        return logits_NTV

    made.lm.lm_head.register_forward_hook(never_close)
    return made


def check_lengths(groups: list[Group], thought: int) -> None:
    lengths = {rollout.thought_len for group in groups for rollout in group.rollouts}
    assert lengths == {thought}, f"thoughts of {lengths} tokens"


def now(device: torch.device) -> float:
    """The clock, after a device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


# ---- where a step's time goes ------------------------------------------------------------------


def profile(arm: RlptArm) -> dict[str, float]:
    """Shares of one step: in the engine (of it, in its forwards), and in the policy's forwards and backwards.

    ``compute_share`` is that of forwards and backwards alone.
    """
    spent = dict.fromkeys(("engine", "engine_forward", "forward", "backward"), 0.0)
    clocked = (
        (arm.engine, "collect", "engine"),
        (arm.engine.lm, "forward", "engine_forward"),
        (Policy, "forward", "forward"),
        (Tensor, "backward", "backward"),
    )
    with ExitStack() as stack:
        for owner, method, name in clocked:
            timed = _timed(getattr(owner, method), spent, name, arm.device)
            stack.enter_context(patch.object(owner, method, timed))
        whole = arm.step().step
    share = {f"{name}_share": seconds / whole for name, seconds in spent.items()}
    parts = ("engine_forward", "forward", "backward")
    return share | {"compute_share": sum(share[f"{part}_share"] for part in parts)}


def _timed(
    call: Callable[..., Any], spent: dict[str, float], name: str, device: torch.device
) -> Callable[..., Any]:
    def timed(*args: Any, **kwargs: Any) -> Any:
        started = now(device)
        result = call(*args, **kwargs)
        spent[name] += now(device) - started
        return result

    return timed
