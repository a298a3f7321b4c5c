"""Rewards read off the forward that is trained: the same weights as a scoring pass of their own."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from rlpt import dist
from rlpt.config import FreshPolicy, PolicyConfig, PromptConfig, ThoughtConfig
from rlpt.optim import adamw
from rlpt.policy import load
from rlpt.policy.scoring import Scorer
from rlpt.prompts import dealt_trunks, prompt_stream, prompts_of
from rlpt.reward.base import Kit
from rlpt.reward.likelihood import LikelihoodReward
from rlpt.rl_update import rl_step
from rlpt.rollout import sync
from rlpt.rollout.engine import generate
from rlpt.rollout.transformers_engine import TransformersEngine
from rlpt.stages import RLStage
from rlpt.types import Branch
from rlpt.update import Learner
from rlpt_data.shards import ShardFolder

PROMPTS = PromptConfig(
    context_tokens=24, min_context_tokens=6, horizon_tokens=4, cuts_per_document=2
)
THOUGHT = ThoughtConfig(budget_tokens=5)
DOCUMENTS, GROUP = 6, 3
ALL_TERMS = {"next_token_weight": 0.4, "gold_weight": 0.2}


def stage(score_with: str, tokens: int, **changes: object) -> RLStage:
    return RLStage.model_validate(
        {
            "name": "rl",
            "kind": "rl",
            "steps": 20,
            "documents_per_step": DOCUMENTS,
            "group_size": GROUP,
            "micro_batch_tokens": tokens,
            "advantage": {"scale": "batch_std"},
            # AdamW turns the rounding of a gradient that is almost 0 into a whole step; eps keeps it what it is.
            "optimizer": {"lr": 3e-4, "eps": 1e-5},
            "update": {"score_with": score_with},
        }
        | changes
    )


def engine_of(plan: load.Blueprint, world: dist.World) -> TransformersEngine:
    markers = plan.vocabulary.markers
    return TransformersEngine(plan.config, plan.layout, markers, THOUGHT, 0, 32, world.device)


@dataclass
class Run:
    """Twenty steps of one arrangement."""

    shards: ShardFolder
    world: dist.World
    layout: str = "auto"

    def weights(self, tokens_of: Callable[[int], int], how: str, **changes: object):
        cfg = PolicyConfig(
            fresh=FreshPolicy(layers=2, width=32, heads=2, mlp_width=64, init_std=0.1),
            layout=self.layout,
        )
        plan = load.blueprint(cfg, self.shards, 64)
        policy, markers = load.load(cfg, plan, self.world, seed=0), plan.vocabulary.markers
        engine = engine_of(plan, self.world)
        first = stage(how, tokens_of(0), **changes)
        learner = Learner(policy, adamw(policy, first.optimizer), None, markers, self.world, seed=0)
        scorer = Scorer(policy, markers.ids, self.world, 500)
        reward = LikelihoodReward().build(Kit({"policy": scorer}, markers, centred=True))
        stream = prompt_stream(self.shards.split("train"), PROMPTS, 0, "rl")
        losses = []
        for step in range(20):
            sync.publish(policy, engine, step)
            _, trunks = dealt_trunks(
                stream, range(step * DOCUMENTS, (step + 1) * DOCUMENTS), PROMPTS, 0, 40, self.world
            )
            prompts = [p for each in trunks for p in prompts_of(each, PROMPTS, markers)]
            groups = generate(engine, prompts, GROUP, "rl")
            chosen = stage(how, tokens_of(step), **changes)
            stepped = rl_step(learner, groups, reward, chosen, step, step)
            losses.append(
                {name: stepped.sums[name][0] for name in stepped.sums if "loss/" in name}
                | {"norm": stepped.grad_norm, "gain": np.divide(*stepped.sums["gain/mean"])}
            )
            assert stepped.rewarded is not None
            assert len(stepped.rewarded.detail["thought"]) == len(groups) * GROUP
        return {name: t.clone() for name, t in load.named_full_tensors(policy)}, losses


def assert_same(one, other) -> None:
    (weights, losses), (expected, known) = one, other
    for name, tensor in weights.items():
        distance = torch.linalg.vector_norm(tensor - expected[name])
        assert distance <= 1e-6 * torch.linalg.vector_norm(expected[name]), (name, float(distance))
    for mine, theirs in zip(losses, known, strict=True):
        for name in theirs:
            assert mine[name] == pytest.approx(theirs[name], rel=2e-5, abs=2e-5), name


def random_splits(step: int) -> int:
    """Another budget every step: one document a micro-batch, a few, or all."""
    return int(np.random.default_rng(step).choice([1, 150, 400, 10_000]))


@pytest.fixture(scope="module")
def two_passes(shards: ShardFolder, world: dist.World):
    """The oracle: a pass for the rewards of the whole step, then the training forwards, naive layout."""
    run = Run(shards, world, layout="naive")
    return {
        "all terms": run.weights(lambda _: 10_000, "separate_pass", objective=ALL_TERMS),
        "policy": run.weights(lambda _: 10_000, "separate_pass"),
    }


@pytest.mark.parametrize("layout", ["shared", "naive"])
def test_one_forward_trains_the_weights_of_two_passes_with_every_term(
    shards: ShardFolder, world: dist.World, two_passes, layout: str
) -> None:
    run = Run(shards, world, layout)
    found = run.weights(lambda _: 10_000, "training_forward", objective=ALL_TERMS)
    assert_same(found, two_passes["all terms"])


@pytest.mark.slow
def test_where_one_forward_would_be_wrong_auto_takes_two_and_gives_the_same_weights(
    shards: ShardFolder, world: dist.World, two_passes
) -> None:
    found = Run(shards, world).weights(random_splits, "auto", objective=ALL_TERMS)
    assert_same(found, two_passes["all terms"])


def test_a_factor_that_only_the_whole_step_knows_multiplies_the_gradient(
    shards: ShardFolder, world: dist.World, two_passes
) -> None:
    """batch std over micro-batches: the first loss is taken before the last reward is known."""
    found = Run(shards, world).weights(random_splits, "training_forward")
    assert_same(found, two_passes["policy"])


def test_the_terms_matter(two_passes) -> None:
    name = "model.embed_tokens.weight"
    one, other = (two_passes[key][0][name] for key in ("all terms", "policy"))
    assert torch.linalg.vector_norm(one - other) > 1e-3 * torch.linalg.vector_norm(one)


@pytest.mark.parametrize(
    ("changes", "whole", "split"),
    [
        ({}, None, None),
        ({"objective": {"next_token_weight": 0.1}}, None, "batch_std"),
        ({"objective": {"gold_weight": 0.1}}, None, "batch_std"),
        ({"objective": ALL_TERMS, "advantage": {"scale": "group_std"}}, None, None),
        ({"reward_control": "random"}, None, "random"),
        ({"reward_control": "permuted"}, None, None),
    ],
)
def test_what_forces_two_passes(changes: dict, whole: str | None, split: str | None) -> None:
    cfg = stage("auto", 100, **changes)
    for asked, expected in ((True, whole), (False, split)):
        reason = cfg.why_separate(asked)
        assert (reason is None) == (expected is None)
        assert expected is None or (reason is not None and expected in reason)


def test_an_ema_that_cancels_changes_no_weight(shards: ShardFolder, world: dist.World) -> None:
    """A baseline per prompt drops out of a linear, centred advantage (MEASURING, section 1)."""
    cfg = PolicyConfig(fresh=FreshPolicy(layers=1, width=32, heads=2, init_std=0.1))
    plan = load.blueprint(cfg, shards, 64)
    markers = plan.vocabulary.markers
    found = []
    for centred in (True, False):
        policy, ema = (load.load(cfg, plan, world, seed=seed) for seed in (0, 5))
        engine = engine_of(plan, world)
        sync.publish(policy, engine, 0)
        stream = prompt_stream(shards.split("train"), PROMPTS, 0, "rl")
        _, trunks = dealt_trunks(stream, range(DOCUMENTS), PROMPTS, 0, 40, world)
        prompts = [p for each in trunks for p in prompts_of(each, PROMPTS, markers)]
        groups = generate(engine, prompts, GROUP, "rl")
        longest: list[int] = []
        ema.register_forward_pre_hook(
            lambda _module, args, seen=longest: seen.append(args[0].tree.longest)
        )
        scorers = {
            "policy": Scorer(policy, markers.ids, world, 500),
            "ema": Scorer(ema, markers.ids, world, 500),
        }
        # "centred" tells the reward that its baseline cancels; told otherwise, it computes it all the same.
        reward = LikelihoodReward(baseline="ema").build(Kit(scorers, markers, centred))
        learner = Learner(
            policy, adamw(policy, stage("auto", 500).optimizer), None, markers, world, seed=0
        )
        rl_step(learner, groups, reward, stage("auto", 500), 0, 0)
        assert (not longest) == centred
        assert max(longest, default=0) <= PROMPTS.context_tokens + PROMPTS.horizon_tokens, (
            "trunks only"
        )
        found.append({name: t.clone() for name, t in load.named_full_tensors(policy)})
    for name, tensor in found[0].items():
        assert torch.linalg.vector_norm(tensor - found[1][name]) <= 1e-6 * tensor.norm(), name


def test_the_body_runs_once_and_the_null_control_is_zero(
    shards: ShardFolder, world: dist.World
) -> None:
    """Trunk against a branch without markers, in the shared layout: the seam costs nothing (MEASURING, section 3)."""
    cfg = PolicyConfig(fresh=FreshPolicy(layers=2, width=32, heads=2, init_std=0.1))
    plan = load.blueprint(cfg, shards, 64)
    policy, markers = load.load(cfg, plan, world, seed=0), plan.vocabulary.markers
    assert policy.layout == "shared"
    stream = prompt_stream(shards.split("train"), PROMPTS, 0, "rl")
    _, trunks = dealt_trunks(stream, range(40), PROMPTS, 0, 40, world)
    prompts = [p for each in trunks for p in prompts_of(each, PROMPTS, markers)]
    scorer = Scorer(policy, markers.ids, world, 700)
    trunk = scorer.trunks([(p.trunk, p.cut, p.cut + p.horizon) for p in prompts])
    branch = scorer.branches([(p.trunk, Branch(p.cut, p.continuation_ids, 0)) for p in prompts])
    difference = np.concatenate([a.logp - b.logp for a, b in zip(trunk, branch, strict=True)])
    assert len(difference) > 200
    assert np.abs(difference).max() < 1e-5


def test_an_impossible_arrangement_is_refused() -> None:
    with pytest.raises(ValueError, match="match scores no held-out text"):
        stage("training_forward", 100, reward={"kind": "match"})
    with pytest.raises(ValueError, match=r"gold_weight = 0\.1"):
        stage("auto", 100, reward={"kind": "match"}, objective={"gold_weight": 0.1})
    assert stage("auto", 100).arrangement == "rewards are read off the forward that is trained"
