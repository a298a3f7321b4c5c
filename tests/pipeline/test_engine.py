"""The reference engine: samples belong to their keys, log-probabilities are the trainer's."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from rlpt import dist, rng
from rlpt.config import PromptConfig, ThoughtConfig
from rlpt.policy.load import Blueprint
from rlpt.policy.policy import Policy
from rlpt.policy.scoring import Scorer
from rlpt.prompts import held_out
from rlpt.rollout import sync
from rlpt.rollout.engine import generate
from rlpt.rollout.transformers_engine import TransformersEngine
from rlpt.types import Branch, Group, concat
from rlpt_data.shards import ShardFolder

CFG = PromptConfig(context_tokens=24, min_context_tokens=6, horizon_tokens=5, cuts_per_document=3)
Start = Callable[[Policy, ThoughtConfig, int], TransformersEngine]


@pytest.fixture(params=["shared", "naive"])
def started(request: pytest.FixtureRequest, plan: Blueprint, world: dist.World) -> Start:
    """An engine of either layout, with the weights of a policy."""

    def start(policy: Policy, thought: ThoughtConfig, batch: int) -> TransformersEngine:
        engine = TransformersEngine(
            plan.config, request.param, plan.vocabulary.markers, thought, 0, batch, world.device
        )
        sync.publish(policy, engine, version=7)
        return engine

    return start


@pytest.fixture
def prompts(plan: Blueprint, shards: ShardFolder):
    return held_out(shards.split("train"), CFG, plan.vocabulary.markers, 10, 0, ())


@pytest.fixture
def closing(policy: Policy, plan: Blueprint) -> Policy:
    """A policy that often closes: its embedding of the closer, tied to the head, is drawn out."""
    with torch.no_grad():
        policy.lm.model.embed_tokens.weight.to_local()[plan.vocabulary.markers.closer] *= 6.0
    return policy


def same(one: list[Group], other: list[Group]) -> bool:
    pairs = [
        (a, b)
        for x, y in zip(one, other, strict=True)
        for a, b in zip(x.rollouts, y.rollouts, strict=True)
    ]
    return all(
        np.array_equal(a.ids, b.ids) and np.array_equal(a.action, b.action) for a, b in pairs
    )


def test_neither_batch_nor_order_changes_a_thought(started, closing, prompts) -> None:
    thought = ThoughtConfig(budget_tokens=6)
    whole = generate(started(closing, thought, 32), prompts, 4, "train")
    engine = started(closing, thought, 3)
    assert same(generate(engine, prompts[::-1], 4, "train")[::-1], whole)
    assert not same(generate(engine, prompts, 4, "other purpose"), whole)


def test_behaviour_log_probabilities_are_the_trainers(
    started, plan, closing, prompts, world
) -> None:
    groups = generate(started(closing, ThoughtConfig(budget_tokens=6), 32), prompts, 4, "train")
    scorer = Scorer(closing, (plan.vocabulary.markers.opener,), world, 600)
    rollouts = [(g.prompt, r) for g in groups for r in g.rollouts]
    pairs = [
        (p.trunk, Branch(p.cut, concat([plan.vocabulary.markers.opener], r.ids), 1))
        for p, r in rollouts
    ]
    for (_, rollout), scores in zip(rollouts, scorer.branches(pairs), strict=True):
        assert np.allclose(rollout.logp[rollout.action], scores.logp[rollout.action], atol=5e-6)
        assert rollout.logp[~rollout.action].tolist() == [0.0] * int((~rollout.action).sum())


def test_tokens_are_the_gumbel_argmax_of_their_keys(started, plan, closing, prompts) -> None:
    engine = started(closing, ThoughtConfig(budget_tokens=3), 32)
    group = generate(engine, prompts[:1], 2, "train")[0]
    for g, rollout in enumerate(group.rollouts):
        key = torch.tensor([rng.key(0, "train", *group.prompt.key, g)])
        with torch.no_grad():
            logits = (
                engine.lm(torch.from_numpy(group.prompt.policy_ids)[None]).logits[:, -1].double()
            )
        logits[:, plan.vocabulary.markers.opener] = -torch.inf
        expected = int(
            (torch.log_softmax(logits, -1) + rng.gumbel(key, 0, logits.shape[-1])).argmax()
        )
        assert rollout.ids[0] == expected


def test_a_forced_closer_is_no_action_and_a_sampled_one_is(started, plan, closing, prompts) -> None:
    closer = plan.vocabulary.markers.closer
    groups = generate(started(closing, ThoughtConfig(budget_tokens=5), 32), prompts, 8, "train")
    rollouts = [r for g in groups for r in g.rollouts]
    assert {r.finish for r in rollouts} == {"closer", "budget"}
    for rollout in rollouts:
        assert rollout.ids[-1] == closer
        assert closer not in rollout.thought_ids
        assert plan.vocabulary.markers.opener not in rollout.ids
        assert set(rollout.version.tolist()) == {7}
        assert len(rollout.ids) == rollout.thought_len + 1
        assert rollout.action[:-1].all()
        assert rollout.action[-1] == (rollout.finish == "closer")
        if rollout.finish == "budget":
            assert rollout.thought_len == 5


def test_predictions_follow_the_closer_and_are_actions(started, plan, closing, prompts) -> None:
    thought = ThoughtConfig(budget_tokens=3, prediction_tokens=2)
    groups = generate(started(closing, thought, 32), prompts, 8, "train")
    closer = plan.vocabulary.markers.closer
    for rollout in (r for g in groups for r in g.rollouts):
        assert rollout.ids[rollout.thought_len] == closer
        assert 1 <= len(rollout.prediction_ids) <= 2
        assert len(rollout.prediction_ids) == 2 or rollout.prediction_ids[-1] == closer
        assert rollout.action[rollout.thought_len + 1 :].all()


def test_replacing_the_text_after_the_cut_changes_no_thought(started, closing, prompts) -> None:
    """The leak test of MEASURING, section 3."""
    from dataclasses import replace

    engine = started(closing, ThoughtConfig(budget_tokens=5), 32)
    altered = []
    for prompt in prompts:
        ids = prompt.trunk.ids.copy()
        ids[prompt.cut :] = 17
        altered.append(replace(prompt, trunk=replace(prompt.trunk, ids=ids)))
    assert same(generate(engine, altered, 3, "train"), generate(engine, prompts, 3, "train"))


def test_an_engine_without_weights_says_so(plan, prompts, world) -> None:
    engine = TransformersEngine(
        plan.config, plan.layout, plan.vocabulary.markers, ThoughtConfig(), 0, 4, world.device
    )
    with pytest.raises(RuntimeError, match="no weights were published"):
        generate(engine, prompts, 2, "train")
    with pytest.raises(RuntimeError, match="publish: no tensor for"):
        engine.publish(iter(()), 1)
