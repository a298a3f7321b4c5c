"""FLOPs and tokens of a step, held against torch's counter on steps that are really taken."""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch.utils.flop_counter import (
    FlopCounterMode,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

from rlpt import dist, flops
from rlpt.config import (
    DataConfig,
    EngineConfig,
    FreshPolicy,
    PolicyConfig,
    PromptConfig,
    RunConfig,
    ThoughtConfig,
)
from rlpt.flops import Layout, Work, step_cost
from rlpt.frames import Framer
from rlpt.optim import adamw
from rlpt.policy import load
from rlpt.policy.policy import Policy
from rlpt.policy.scoring import Scorer
from rlpt.prompts import prompts_of
from rlpt.reward.base import Kit, Rewarded
from rlpt.reward.likelihood import LikelihoodReward
from rlpt.reward.shapes import Clip
from rlpt.rl_update import rl_step
from rlpt.rollout import sync
from rlpt.rollout.engine import generate
from rlpt.rollout.transformers_engine import TransformersEngine
from rlpt.stages import NextTokenStage, RLStage, Stage
from rlpt.types import Group, Markers, Rollout, Trunk
from rlpt.update import Learner, next_token_step
from rlpt_data.shards import ShardFolder
from rlpt_kernels.ops import linear_logprob_backward_op, linear_logprob_op
from rlpt_kernels.policy_op import linear_policy_loss_op

DOCUMENTS, GROUP, CONTEXT = 4, 2, 11
FRESH = FreshPolicy(layers=2, width=32, heads=4, kv_heads=2, mlp_width=48, init_std=0.3)
LAYOUTS: tuple[Layout, ...] = ("naive", "shared")


# ---- torch's counter, and what it has to be told -------------------------------------------------


def attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def attention_backward(grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(grad, query, key, value)


def inside(op: Any) -> Callable[..., int]:
    """The products inside an operator that is opaque to the counter."""

    def count(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
        in_place = {torch.ops.aten.addmm_: lambda _, a, b, **__: 2 * a[0] * a[1] * b[1]}
        with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
            op._init_fn(*args, **kwargs)
        return counter.get_total_flops()

    count._get_raw = True  # pyright: ignore[reportFunctionMemberAccess]
    return count


def counted(run: Callable[[], object]) -> int:
    """FLOPs of everything that ``run`` does."""
    aten, ours = torch.ops.aten, torch.ops.rlpt_kernels
    told = {
        aten._scaled_dot_product_flash_attention_for_cpu: attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
        ours.linear_logprob: inside(linear_logprob_op),
        ours.linear_logprob_backward: inside(linear_logprob_backward_op),
        ours.linear_policy_loss: inside(linear_policy_loss_op),
    }
    with FlopCounterMode(display=False, custom_mapping=told) as counter:
        run()
    return counter.get_total_flops()


@pytest.fixture(autouse=True)
def no_full_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A head as small as a test's would keep its logits, and not compute them again."""
    monkeypatch.setattr(import_module("rlpt_kernels.linear_logprob"), "FULL_LOGITS", 0)


# ---- steps at their longest ----------------------------------------------------------------------


def run(stage: Stage, **changes: Any) -> RunConfig:
    table = {
        "run_dir": Path("run"),
        "data": DataConfig(shards=Path("shards")),
        "policy": PolicyConfig(fresh=FRESH),
        "prompts": prompt_config(),
        "thought": ThoughtConfig(budget_tokens=7),
        "stage": (stage,),
    }
    return RunConfig(**(table | changes))


def prompt_config(cuts: int = 1, horizon: int = 5) -> PromptConfig:
    return PromptConfig(
        context_tokens=CONTEXT, min_context_tokens=4, horizon_tokens=horizon, cuts_per_document=cuts
    )


def rl(**changes: Any) -> RLStage:
    sizes = {"steps": 1, "documents_per_step": DOCUMENTS, "group_size": GROUP}
    return RLStage.model_validate({"name": "rl", "kind": "rl"} | sizes | changes)


def groups(cfg: RunConfig, markers: Markers) -> list[Group]:
    """The longest contexts and thoughts that the configuration allows, all cuts at the end of the context."""
    size = cfg.prompts.context_tokens + cfg.prompts.horizon_tokens
    draw = np.random.default_rng(0)
    ids, offsets = draw.integers(300, size=(DOCUMENTS, size)), np.arange(size + 1)
    cuts = (CONTEXT,) * cfg.prompts.cuts_per_document
    trunks = [Trunk(str(n), "", 0, 0, ids[n], offsets, cuts) for n in range(DOCUMENTS)]
    prompts = [prompt for trunk in trunks for prompt in prompts_of(trunk, cfg.prompts, markers)]
    return [Group(p, tuple(rollout(cfg, markers, draw) for _ in range(GROUP))) for p in prompts]


def rollout(cfg: RunConfig, markers: Markers, draw: np.random.Generator) -> Rollout:
    """A thought that has spent its budget, its forced closer, and a prediction."""
    budget = cfg.thought.budget_tokens
    ids = draw.integers(300, size=budget + 1 + cfg.thought.prediction_tokens)
    ids[budget] = markers.closer
    numbers = np.full(len(ids), -6.0, dtype=np.float32)
    action = np.arange(len(ids)) != budget
    return Rollout(ids, action, numbers, np.zeros(len(ids), dtype=np.int64), budget, "budget")


class Taken:
    """A policy that takes steps, and how many tokens its forwards compute."""

    def __init__(self, cfg: RunConfig, layout: Layout, shards: ShardFolder, world: dist.World):
        policy = cfg.policy.model_copy(update={"layout": layout})
        self.cfg, self.world = cfg, world
        self.layout: Layout = layout
        self.plan = load.blueprint(policy, shards, 64)
        self.scored = self.trained = 0
        self.policy = self.made(policy)
        self.markers = self.plan.vocabulary.markers

    def made(self, cfg: PolicyConfig) -> Policy:
        policy = load.load(cfg, self.plan, self.world, seed=0)
        policy.register_forward_pre_hook(self._count)
        return policy

    def _count(self, policy: Policy, args: tuple) -> None:
        name = "trained" if torch.is_grad_enabled() else "scored"
        setattr(self, name, getattr(self, name) + args[0].ids_NT.numel())

    @property
    def learner(self) -> Learner:
        stage = self.cfg.stage[0]
        optimizer = adamw(self.policy, stage.optimizer)
        return Learner(self.policy, optimizer, None, self.markers, self.world, seed=0)

    def rl_step(self) -> None:
        (stage,) = self.cfg.stage
        assert isinstance(stage, RLStage)
        found, reward = groups(self.cfg, self.markers), stage.reward
        if reward.kind != "likelihood":
            return self._step(found, stage, match_at_random)
        policies = {
            name: self.made(self.cfg.policy)
            for name in {reward.scorer, reward.baseline} & {"ema", "frozen"}
        }
        scorers = {
            name: Scorer(policy, self.markers.ids, self.world, stage.micro_batch_tokens)
            for name, policy in (policies | {"policy": self.policy}).items()
        }
        centred = stage.advantage.baseline != "none"
        self._step(found, stage, reward.build(Kit(scorers, self.markers, centred)))

    def _step(self, found: list[Group], stage: RLStage, reward: Any) -> None:
        rl_step(self.learner, found, reward, stage, 0, 0)

    def cost(self) -> flops.Cost:
        return step_cost(self.cfg, self.cfg.stage[0], self.plan.config, self.layout)


def match_at_random(found: list[Group], policy: object = None) -> Rewarded:
    return Rewarded(np.random.default_rng(1).normal(size=(len(found), GROUP)), {})


# ---- what a layer costs --------------------------------------------------------------------------

MODELS = {
    "tied": ("Llama", {"tie_word_embeddings": True}),
    "untied": ("Llama", {"tie_word_embeddings": False}),
    "biases": ("Qwen2", {"tie_word_embeddings": True}),
    "wide_heads": ("Qwen3", {"head_dim": 12}),
}


def model(name: str, **changes: Any) -> Any:
    sizes = {
        "vocab_size": 70,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "pad_token_id": None,
    }
    config = getattr(transformers, f"{name}Config")(**(sizes | changes))
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")


@pytest.mark.parametrize("kind", MODELS)
def test_a_token_costs_twice_its_matrices_and_a_pair_four_times_the_queries(kind: str) -> None:
    name, changes = MODELS[kind]
    lm = model(name, **changes)
    # `parameters` names a tied head once; biases and norms have one dimension.
    matrices = sum(weight.numel() for weight in lm.parameters() if weight.ndim == 2)
    if not lm.config.tie_word_embeddings:
        matrices -= lm.model.embed_tokens.weight.numel()
    head_dim = changes.get("head_dim", 8)
    work = Work(tokens=34, pairs=2 * 17 * 17, rows=34)
    expected = 34 * 2 * matrices + work.pairs * 3 * (2 + 2) * 4 * head_dim
    assert flops.forward_flops(lm.config, work) == expected
    with torch.no_grad():
        assert counted(lambda: lm(input_ids=torch.zeros(2, 17, dtype=torch.long))) == expected


# ---- whole steps ---------------------------------------------------------------------------------

STEPS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "one forward": ({}, {}),
    "one forward, split": ({"micro_batch_tokens": 100}, {}),
    "two passes": ({"update": {"score_with": "separate_pass"}}, {}),
    "two passes, split": (
        {"update": {"score_with": "separate_pass"}, "micro_batch_tokens": 70},
        {"prompts": prompt_config(cuts=3)},
    ),
    "forced": (
        {
            "reward_control": "random",
            "micro_batch_tokens": 100,
            "objective": {"gold_weight": 0.3, "next_token_weight": 0.2},
        },
        {},
    ),
    "all terms": (
        {"objective": {"gold_weight": 0.3, "next_token_weight": 0.2}},
        {"prompts": prompt_config(cuts=3)},
    ),
    "text longer than thoughts": (
        {"update": {"score_with": "separate_pass"}, "objective": {"next_token_weight": 0.2}},
        {"prompts": prompt_config(horizon=20)},
    ),
    "predictions": (
        {"reward": {"kind": "match"}},
        {"thought": ThoughtConfig(budget_tokens=7, prediction_tokens=3)},
    ),
    "checkpoints": ({}, {"policy": PolicyConfig(fresh=FRESH, gradient_checkpointing=True)}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", STEPS)
def test_a_step_does_the_flops_and_tokens_that_are_counted(
    kind: str, layout: Layout, shards: ShardFolder, world: dist.World
) -> None:
    settings, changes = STEPS[kind]
    taken = Taken(run(rl(**settings), **changes), layout, shards, world)
    cost = taken.cost()
    assert counted(taken.rl_step) == cost.scoring_flops + cost.training_flops
    assert (cost.scored_tokens, cost.trained_tokens) == (taken.scored, taken.trained)


CLIPPED = LikelihoodReward(
    scorer="frozen", baseline="frozen", shapes=(Clip(kind="clip", limit=2.0),)
)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("reward", "centring", "score_with", "tokens"),
    [
        (LikelihoodReward(scorer="ema", baseline="frozen"), "leave_one_out", "auto", 9999),
        (LikelihoodReward(scorer="ema", baseline="frozen"), "none", "auto", 130),
        (LikelihoodReward(scorer="frozen", baseline="none"), "leave_one_out", "separate_pass", 70),
        (LikelihoodReward(scorer="policy", baseline="ema"), "none", "auto", 9999),
        (LikelihoodReward(scorer="policy", baseline="ema"), "leave_one_out", "separate_pass", 9999),
        (CLIPPED, "leave_one_out", "auto", 130),
    ],
)
def test_other_scorers_and_baselines_cost_their_own_passes_unless_they_cancel(
    reward: LikelihoodReward, centring: str, score_with: str, tokens: int, layout: Layout,
    shards: ShardFolder, world: dist.World,
) -> None:  # fmt: skip
    update, advantage = {"score_with": score_with}, {"baseline": centring}
    stage = rl(reward=reward, update=update, advantage=advantage, micro_batch_tokens=tokens)
    taken = Taken(run(stage, prompts=prompt_config(cuts=2)), layout, shards, world)
    taken.rl_step()
    cost = taken.cost()
    assert (cost.scored_tokens, cost.trained_tokens) == (taken.scored, taken.trained)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("cuts", "batch", "prediction"), [(1, 32, 0), (3, 6, 2), (3, 2, 0)])
def test_the_engine_does_the_flops_that_are_counted(
    cuts: int, batch: int, prediction: int, layout: Layout, shards: ShardFolder, world: dist.World
) -> None:
    thought = ThoughtConfig(budget_tokens=7, prediction_tokens=prediction)
    cfg = run(
        rl(reward={"kind": "match" if prediction else "likelihood"}),
        prompts=prompt_config(cuts), thought=thought, engine=EngineConfig(prompts_per_batch=batch),
    )  # fmt: skip
    taken = Taken(cfg, layout, shards, world)
    prompts = [group.prompt for group in groups(cfg, taken.markers)]
    # Nobody samples an id that is banned: no thought closes before its budget is spent.
    never = Markers(taken.markers.opener, taken.markers.opener)
    engine = TransformersEngine(
        *(taken.plan.config, layout, never, thought, 0, batch), device=world.device
    )
    sync.publish(taken.policy, engine, 0)
    found: list[Group] = []
    cost = taken.cost()
    assert (
        counted(lambda: found.extend(generate(engine, prompts, GROUP, "a"))) == cost.sampling_flops
    )
    lengths = [len(rollout.ids) for group in found for rollout in group.rollouts]
    assert cost.sampled_tokens == len(prompts) * GROUP * (7 + 1 + prediction) == sum(lengths)
    read = DOCUMENTS * -(-cuts // batch) * CONTEXT + len(prompts)
    assert cost.prefilled_tokens == (read if layout == "shared" else len(prompts) * (CONTEXT + 1))


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_next_token_step_does_the_flops_that_are_counted(
    checkpointed: bool, shards: ShardFolder, world: dist.World
) -> None:
    stage = NextTokenStage(
        name="a", kind="next_token", steps=1, documents_per_step=4, window_tokens=40, micro_batch_tokens=90
    )  # fmt: skip
    cfg = run(stage, policy=PolicyConfig(fresh=FRESH, gradient_checkpointing=checkpointed))
    taken = Taken(cfg, "naive", shards, world)
    framer = Framer(stage.mix, cfg.prompts, 40, 7, taken.markers, 0)
    frames = [framer.frame(0, shards.split("train")[n]) for n in range(4)]
    cost = taken.cost()
    assert counted(lambda: next_token_step(taken.learner, frames, stage, 0)) == cost.flops
    assert cost.trained_tokens == taken.trained == 4 * 40
