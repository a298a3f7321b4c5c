"""Gold, KL and next-token terms in the whole update, against plain sequences in plain transformers."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from rlpt import dist
from rlpt.config import PromptConfig, ThoughtConfig
from rlpt.credit import Credit, Credited
from rlpt.optim import adamw
from rlpt.policy.load import Blueprint, local, named_full_tensors
from rlpt.policy.policy import Policy
from rlpt.policy.scoring import Scorer
from rlpt.prompts import prompt_stream, prompts_of, trunk
from rlpt.reference import action_logps, action_scorer
from rlpt.reward.base import Kit, Rewarded
from rlpt.rl_update import _Update, rl_score, rl_step
from rlpt.rollout import sync
from rlpt.rollout.engine import generate
from rlpt.rollout.transformers_engine import TransformersEngine
from rlpt.stages import RLStage
from rlpt.types import Group, Rollout, concat
from rlpt.update import Learner, reduced
from rlpt_data.shards import ShardFolder

CFG = PromptConfig(context_tokens=20, min_context_tokens=6, horizon_tokens=3, cuts_per_document=2)
SIZE = 4
SUMS = {"mask": "none", "aggregate": "constant", "constant_tokens": 5.0}
TERMS = {
    "jepo": {
        "reward": {"kind": "likelihood", "baseline": "none", "aggregate": "log_mean_exp"},
        "advantage": {"baseline": "none"},
        "objective": SUMS | {"gold": "softmax", "gold_weight": 0.7},
    },
    "jepo_of_good_form": {
        "reward": {"kind": "likelihood", "baseline": "none", "aggregate": "log_mean_exp"},
        "advantage": {"baseline": "none"},
        "gates": ({"kind": "format", "value": -2.0},),
        "objective": SUMS | {"gold": "softmax", "gold_weight": 0.7},
    },
    "verifree": {
        "reward": {"kind": "likelihood", "baseline": "none", "aggregate": "product"},
        "objective": SUMS | {"gold": "probability", "gold_weight": 1.0},
    },
    "kl_k3": {
        "kl": {"reference": "frozen", "weight": 0.3, "estimator": "k3"},
        "objective": {"mask": "none", "aggregate": "token"},
    },
    "text_without_targets": {
        "objective": {"mask": "none", "aggregate": "token", "next_token_weight": 0.4, "next_token_targets": False},
    },
}  # fmt: skip


def stage(**changes: object) -> RLStage:
    table = {"name": "rl", "kind": "rl", "steps": 4, "documents_per_step": 5, "group_size": SIZE}
    return RLStage.model_validate(table | changes)


@pytest.fixture
def groups(policy: Policy, plan: Blueprint, shards: ShardFolder, world: dist.World) -> list[Group]:
    return sampled(policy, plan, shards, world)


def sampled(policy: Policy, plan: Blueprint, shards: ShardFolder, world: dist.World) -> list[Group]:
    stream, markers = prompt_stream(shards.split("train"), CFG, 0, "train"), plan.vocabulary.markers
    prompts = [
        p for e, d in stream.take(0, 5, 0, 1) for p in prompts_of(trunk(d, e, CFG, 0), CFG, markers)
    ]
    thought = ThoughtConfig(budget_tokens=4)
    engine = TransformersEngine(plan.config, plan.layout, markers, thought, 0, 32, world.device)
    sync.publish(policy, engine, 0)
    return generate(engine, prompts, SIZE, "train")


def learner_of(policy: Policy, plan: Blueprint, world: dist.World, frozen: Policy) -> Learner:
    rl = stage()
    made = Learner(
        policy, adamw(policy, rl.optimizer), None, plan.vocabulary.markers, world, seed=0
    )
    made.reference = action_scorer(frozen, made, 600)
    return made


def plain_model(policy: Policy, plan: Blueprint) -> Any:
    lm = transformers.AutoModelForCausalLM.from_config(plan.config, dtype=torch.float32)
    lm.load_state_dict(dict(named_full_tensors(policy)), strict=False)
    return lm


def plain_logp(lm: Any, prefix: np.ndarray, ids: np.ndarray, banned: tuple) -> torch.Tensor:
    logits = lm(torch.from_numpy(concat(prefix, ids))[None]).logits[0, len(prefix) - 1 : -1]
    logits = logits.index_fill(1, torch.tensor(list(banned)), -torch.inf)
    return torch.log_softmax(logits, -1).gather(1, torch.from_numpy(ids)[:, None])[:, 0]


def printed_loss(
    name: str, rl: RLStage, lm: Any, reference: Any, groups: list[Group], markers: Any
):
    """The objective as its paper prints it, one sequence at a time."""
    loss, prompts = torch.zeros(()), len(groups)
    actions = sum(r.num_actions for group in groups for r in group.rollouts)
    for group in groups:
        thoughts, golds, kls = [], [], []
        for r in group.rollouts:
            prefix, at = group.prompt.policy_ids, torch.from_numpy(r.action)
            thoughts.append(plain_logp(lm, prefix, r.ids, (markers.opener,))[at])
            gold = plain_logp(lm, concat(prefix, r.ids), group.prompt.continuation_ids, markers.ids)
            golds.append(gold.sum())
            with torch.no_grad():
                own = plain_logp(reference, prefix, r.ids, (markers.opener,))[at]
            d = thoughts[-1] - own
            kls.append((torch.exp(-d) - 1 + d).sum())
        gold_G = torch.stack(golds)
        fixed_G = gold_G.detach().double()
        if name.startswith("jepo"):
            others = [torch.cat([fixed_G[:i], fixed_G[i + 1 :]]) for i in range(SIZE)]
            advantage = [(fixed_G.exp().mean().log() - o.exp().mean().log()).item() for o in others]
            shares = (fixed_G.exp() / fixed_G.exp().sum()).float()
        else:
            value = fixed_G.exp() if name == "verifree" else fixed_G / CFG.horizon_tokens
            advantage = [
                (value[i] - (value.sum() - value[i]) / (SIZE - 1)).item() for i in range(SIZE)
            ]
            shares = fixed_G.exp().float()
        if name == "jepo_of_good_form":
            good = [r.finish == "closer" for r in group.rollouts]
            advantage = [a if each else -2.0 for a, each in zip(advantage, good, strict=True)]
            shares = shares * torch.tensor(good)
        sums = rl.objective.aggregate == "constant"
        each = 1 / (prompts * SIZE * 5.0) if sums else 1 / actions
        for i, a in enumerate(advantage):
            loss = loss - each * a * thoughts[i].sum()
        if rl.objective.gold_weight:
            loss = loss - each * rl.objective.gold_weight * (shares * gold_G).sum()
        if name == "kl_k3":
            loss = loss + 0.3 * torch.stack(kls).sum() / actions
    if name == "text_without_targets":
        loss = loss + text_loss(lm, groups, markers)
    return loss


def formed(group: Group, p: int) -> Group:
    """The same group with one thought, another in every group, that the budget ended; gates alone look at that."""
    ends = ["budget" if g == p % SIZE else "closer" for g in range(SIZE)]
    rollouts = [replace(r, finish=end) for r, end in zip(group.rollouts, ends, strict=True)]
    return replace(group, rollouts=tuple(rollouts))


def text_loss(lm: Any, groups: list[Group], markers: Any) -> torch.Tensor:
    logps = []
    for each in {id(g.prompt.trunk): g.prompt.trunk for g in groups}.values():
        held_out = {cut + k for cut in each.cuts for k in range(CFG.horizon_tokens)}
        at = [t - 1 for t in range(1, len(each.ids)) if t not in held_out]
        logps.append(plain_logp(lm, each.ids[:1], each.ids[1:], markers.ids)[at])
    return -0.4 * torch.cat(logps).mean()


@pytest.mark.parametrize("tokens", [60, 9999], ids=["split", "whole"])
@pytest.mark.parametrize("name", TERMS)
def test_the_update_is_the_gradient_of_the_printed_objective(
    name: str, tokens: int, policy: Policy, other_policy: Policy, plan: Blueprint,
    groups: list[Group], world: dist.World,
) -> None:  # fmt: skip
    rl = stage(**TERMS[name], micro_batch_tokens=tokens)
    learner, markers = learner_of(policy, plan, world, other_policy), plan.vocabulary.markers
    kit = Kit({"policy": Scorer(policy, markers.ids, world, 600)}, markers, rl.cancels_baselines)
    groups = [formed(group, p) for p, group in enumerate(groups)]
    update = _Update(learner, groups, rl, Credit(rl, world, 0, step=0), 0)
    parts = update.parts(continuations=True)
    assert (len(parts) > 1) == (tokens < 100)
    update.in_one_forward(rl.built(kit), parts)
    found = {n: local(p.grad) for n, p in policy.named_parameters() if p.grad is not None}
    lm, reference = plain_model(policy, plan), plain_model(other_policy, plan)
    printed_loss(name, rl, lm, reference, groups, markers).backward()
    for key, parameter in lm.named_parameters():
        error = torch.linalg.vector_norm(found[f"lm.{key}"] - parameter.grad)
        assert error <= 5e-5 * torch.linalg.vector_norm(parameter.grad), key


def test_both_arrangements_give_the_same_update_with_every_term(
    policy: Policy, other_policy: Policy, plan: Blueprint, groups: list[Group], world: dist.World
) -> None:
    """One forward for reward and loss, and two passes; truncated thoughts are masked in both."""
    found = []
    start = dict(named_full_tensors(policy))
    start = {name: tensor.clone() for name, tensor in start.items()}
    for how in ("training_forward", "separate_pass"):
        rl = stage(
            **TERMS["verifree"], update={"score_with": how},
            gates=({"kind": "mask_truncated"}, {"kind": "format", "min_thought_tokens": 2}),
            kl={"reference": "frozen", "weight": 0.1, "estimator": "k2"}, optimizer={"eps": 1e-4},
        )  # fmt: skip
        from rlpt.policy.load import fill

        fill(policy, lambda name, _shape: start[name])
        learner, markers = learner_of(policy, plan, world, other_policy), plan.vocabulary.markers
        kit = Kit(
            {"policy": Scorer(policy, markers.ids, world, 600)}, markers, rl.cancels_baselines
        )
        stepped = rl_step(learner, groups, rl.built(kit), rl, 0, 0)
        assert isinstance(stepped.rewarded, Rewarded)
        found.append({name: t.clone() for name, t in named_full_tensors(policy)})
    for name, tensor in found[0].items():
        assert torch.linalg.vector_norm(tensor - found[1][name]) <= 1e-6 * tensor.norm(), name


MASKED = {
    "policy": {"objective": {"mask": "none", "aggregate": "sequence"}},
    "gold": {"objective": {"mask": "none", "aggregate": "prompt", "gold_weight": 0.5}},
    "probability": TERMS["verifree"],
    "kl": TERMS["kl_k3"],
}


@pytest.mark.parametrize("name", MASKED)
def test_masked_rollouts_leave_no_trace(
    name: str, policy: Policy, other_policy: Policy, plan: Blueprint, groups: list[Group],
    world: dist.World,
) -> None:  # fmt: skip
    """A group in which one thought is truncated gives the gradient of the group without it."""
    rl = stage(**MASKED[name], gates=({"kind": "mask_truncated"},))
    first, *others = groups[0].rollouts
    rest = tuple(replace(r, finish="closer") for r in others)
    whole = Group(groups[0].prompt, (replace(first, finish="budget"), *rest))
    gradients = []
    for found in ([whole], [Group(whole.prompt, rest)]):
        policy.zero_grad()
        learner = learner_of(policy, plan, world, other_policy)
        markers = plan.vocabulary.markers
        kit = Kit({"policy": Scorer(policy, markers.ids, world, 600)}, markers, centred=True)
        update = _Update(learner, found, rl, Credit(rl, world, 0, step=0), 0)
        update.in_one_forward(rl.built(kit), update.parts(continuations=True))
        gradients.append(
            {n: local(p.grad).clone() for n, p in policy.named_parameters() if p.grad is not None}
        )
    for key, value in gradients[0].items():
        error = torch.linalg.vector_norm(value - gradients[1][key])
        assert error <= 1e-5 * torch.linalg.vector_norm(value) + 1e-9, key


def noisy(rollout: Rollout, draw: np.random.Generator) -> Rollout:
    noise = draw.normal(0, 0.8, len(rollout.logp)).astype(np.float32)
    return replace(rollout, logp=rollout.logp + noise)


def test_masked_rollouts_have_no_part_in_the_second_moment(
    policy: Policy, other_policy: Policy, plan: Blueprint, groups: list[Group], world: dist.World
) -> None:
    """M2PO's threshold over a step with truncated thoughts is that of the step without them."""
    draw = np.random.default_rng(0)
    rl = stage(objective={"mask": "m2", "m2_limit": 0.4})
    learner = learner_of(policy, plan, world, other_policy)
    moved = [Group(g.prompt, tuple(noisy(r, draw) for r in g.rollouts)) for g in groups]
    weight_PG = np.ones((len(groups), SIZE))
    weight_PG[:, 1] = 0.0
    advantage_PG = draw.normal(size=weight_PG.shape) * weight_PG
    update = _Update(learner, moved, rl, Credit(rl, world, 0, step=0), 0)
    found = update._threshold(Credited(advantage_PG, weight_PG))
    rest = [Group(g.prompt, (g.rollouts[0], *g.rollouts[2:])) for g in moved]
    update = _Update(learner, rest, rl, Credit(rl, world, 0, step=0), 0)
    kept = [0, 2, 3]
    assert 0.0 < found < np.inf
    assert found == pytest.approx(
        update._threshold(Credited(advantage_PG[:, kept], weight_PG[:, kept])), rel=1e-4
    )


def test_what_would_have_been_learned_from_knows_the_distance_to_the_reference(
    policy: Policy, other_policy: Policy, plan: Blueprint, groups: list[Group], world: dist.World
) -> None:
    """With KL in the reward, a run that does not train writes the advantages of one that does."""
    rl = stage(
        kl={"reference": "frozen", "weight": 0.2, "estimator": "k1", "placement": "reward"},
        advantage={"min_std": 1e-3},
    )
    learner, markers = learner_of(policy, plan, world, other_policy), plan.vocabulary.markers
    kit = Kit({"policy": Scorer(policy, markers.ids, world, 600)}, markers, rl.cancels_baselines)
    scored = rl_score(learner, groups, rl.built(kit), rl, 0, 0)
    trained = rl_step(learner, groups, rl.built(kit), rl, 0, 0)
    assert scored.advantage_PG is not None
    assert trained.advantage_PG is not None
    assert learner.reference is not None
    np.testing.assert_allclose(scored.advantage_PG, trained.advantage_PG, atol=1e-5)
    assert scored.rewarded is not None
    without_PG = Credit(rl, world, 0, step=0).advantages(scored.rewarded.reward_PG)
    assert np.abs(scored.advantage_PG - without_PG).max() > 0.01
    ours = [r.logp[r.action].sum() for g in groups for r in g.rollouts]
    theirs = action_logps(learner.reference, groups)
    by_hand = [0.2 * (own - logp.sum()) for own, logp in zip(ours, theirs, strict=True)]
    assert trained.sums["reward/kl"][0] == pytest.approx(-sum(by_hand), rel=1e-4)


def test_the_distance_is_logged_as_it_is_in_the_loss(
    policy: Policy, other_policy: Policy, plan: Blueprint, groups: list[Group], world: dist.World
) -> None:
    """weight x mean of k3 over all actions, however the step is split."""
    logged = []
    for tokens in (60, 9999):
        rl = stage(**TERMS["kl_k3"], micro_batch_tokens=tokens)
        learner, markers = learner_of(policy, plan, world, other_policy), plan.vocabulary.markers
        kit = Kit({"policy": Scorer(policy, markers.ids, world, 600)}, markers, centred=True)
        update = _Update(learner, groups, rl, Credit(rl, world, 0, step=0), 0)
        update.in_one_forward(rl.built(kit), update.parts(continuations=True))
        logged.append(reduced(update.sums, update.extremes, world))
    for found in logged:
        assert found["loss/kl"] == pytest.approx(0.3 * found["kl/k3"], rel=1e-4)
