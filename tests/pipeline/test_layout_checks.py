"""What stops a run before its first step: a layout that changes numbers, an arrangement that does not fit, paths that
are too long.
"""

from dataclasses import replace

import pytest
import torch

from rlpt import dist, preflight
from rlpt.config import FreshPolicy, PolicyConfig, PromptConfig, RunConfig
from rlpt.policy import attention, load
from rlpt.policy.attention import Crossing
from rlpt.policy.policy import Policy
from rlpt.policy.selfcheck import check_layout, documents_to_check
from rlpt.stages import RLStage
from rlpt_data.shards import ShardFolder
from rlpt_data.strict import UserError, parse

PROMPTS = PromptConfig(
    context_tokens=24, min_context_tokens=6, horizon_tokens=4, cuts_per_document=2
)


def checked(policy: Policy, plan: load.Blueprint, shards: ShardFolder, world: dist.World) -> float:
    markers = plan.vocabulary.markers
    prompts = documents_to_check(shards.split("train"), PROMPTS, markers, 0)
    assert len({prompt.trunk.document for prompt in prompts}) == 2
    return check_layout(policy, prompts, markers, 8, world)


def test_the_self_check_measures_rounding_where_the_layout_is_right(
    policy: Policy, plan: load.Blueprint, shards: ShardFolder, world: dist.World
) -> None:
    assert policy.layout == "shared"
    before = [load.local(parameter).clone() for parameter in policy.parameters()]
    assert 0.0 < checked(policy, plan, shards, world) < 1e-5
    assert policy.lm.config._attn_implementation == attention.NAME
    for parameter, value in zip(policy.parameters(), before, strict=True):
        assert parameter.grad is None
        assert torch.equal(load.local(parameter), value)


def test_a_policy_that_is_not_trained_has_its_log_probabilities_checked(
    policy: Policy, plan: load.Blueprint, shards: ShardFolder, world: dist.World
) -> None:
    policy.requires_grad_(False)
    assert 0.0 < checked(policy, plan, shards, world) < 1e-5


@pytest.mark.parametrize(
    "mistake",
    ["one token of context less", "neighbours seen", "no mask", "other documents seen", "gradient"],
)
def test_the_self_check_stops_a_wrong_mask(
    policy: Policy,
    plan: load.Blueprint,
    shards: ShardFolder,
    world: dist.World,
    monkeypatch: pytest.MonkeyPatch,
    mistake: str,
) -> None:
    right = attention.tree_attention

    def wrong(query, key, value, tree, scale):
        if mistake == "one token of context less":
            shorter = (Crossing(*each[:3], each.trunk_stop - 1) for each in tree.crossings)
            tree = replace(tree, crossings=tuple(shorter))
        elif mistake == "neighbours seen":
            tree = replace(tree, trunks=((0, query.shape[2]),), crossings=(), siblings=())
        elif mistake == "other documents seen":
            wider = (Crossing(*each[:2], 0, each.trunk_stop) for each in tree.crossings)
            tree = replace(tree, crossings=tuple(wider))
        elif mistake == "gradient":
            return right(query, key.detach(), value, tree, scale)
        else:
            full = torch.nn.functional.scaled_dot_product_attention
            return full(query, key, value, scale=scale)
        return right(query, key, value, tree, scale)

    monkeypatch.setattr(attention, "tree_attention", wrong)
    with pytest.raises(UserError, match=r"layout = 'shared'.*differs from .* set policy\.layout"):
        checked(policy, plan, shards, world)


def config(**stage: object) -> RunConfig:
    table = {
        "run_dir": "runs/x",
        "data": {"shards": "runs/data"},
        "policy": {"fresh": {}},
        "prompts": {"context_tokens": 100, "horizon_tokens": 8, "min_context_tokens": 8},
        "thought": {"budget_tokens": 20},
        "stage": [
            {"name": "rl", "kind": "rl", "steps": 1, "documents_per_step": 4, "group_size": 5}
            | stage
        ],
    }
    return parse(RunConfig, table, "test")


def test_a_step_that_cannot_be_one_forward_is_refused_with_the_size_that_could() -> None:
    changes = {
        "advantage": {"scale": "batch_std"},
        "objective": {"next_token_weight": 0.5},
        "update": {"score_with": "training_forward"},
    }
    # A trunk of 108 tokens and five branches of opener, thought, closer and continuation: 108 + 5 * 30 = 258.
    for ranks, most in ((1, 4 * 258), (2, 2 * 258)):
        world = dist.World(0, ranks, torch.device("cpu"))
        preflight.check_shares(config(micro_batch_tokens=most, **changes), world, "shared")
        with pytest.raises(UserError, match=f"'training_forward'.*batch_std.* to {most}, or"):
            preflight.check_shares(config(micro_batch_tokens=most - 1, **changes), world, "shared")
    cfg = config(micro_batch_tokens=1, update={"score_with": "training_forward"})
    stage = cfg.stage[0]
    assert isinstance(stage, RLStage)
    assert stage.why_separate(whole=False) is None
    preflight.check_shares(cfg, dist.World(0, 1, torch.device("cpu")), "shared")


def test_a_path_past_the_last_position_is_refused(shards: ShardFolder) -> None:
    cfg = PolicyConfig(fresh=FreshPolicy(layers=1, width=32, heads=2, max_positions=64))
    assert load.blueprint(cfg, shards, 64).layout == "shared"
    with pytest.raises(UserError, match=r"has 64 positions.* has 65 tokens; lower prompts\."):
        load.blueprint(cfg, shards, 65)
