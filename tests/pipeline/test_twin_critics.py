"""Twin critics in the whole update, against plain sequences in plain transformers."""

from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from rlpt import dist
from rlpt.credit import Credit
from rlpt.critic import Critic
from rlpt.policy.load import Blueprint, local
from rlpt.policy.policy import Policy
from rlpt.policy.scoring import Scorer
from rlpt.reward.base import Kit
from rlpt.rl_update import _Update
from rlpt.types import Rollout, concat
from rlpt_data.shards import ShardFolder


@pytest.fixture
def terms(beside) -> ModuleType:
    """The plain sequences of the other objectives' tests."""
    return beside("test_objective_terms")


def head_values(lm: Any, head: torch.nn.Linear, prefix: np.ndarray, r: Rollout) -> torch.Tensor:
    """Of the states that predict the actions."""
    ids = torch.from_numpy(concat(prefix, r.ids))[None]
    states = lm.model(input_ids=ids).last_hidden_state[0, len(prefix) - 1 : -1]
    return head(states[torch.from_numpy(r.action)])


def printed(lm: Any, head: torch.nn.Linear, groups: Any, reward_P: np.ndarray, terms: Any):
    """Log-probabilities, values, returns and advantages of all actions: A_t = delta_t + 0.6 A_{t+1} by each head."""
    logps, values, returns, means = [], [], [], []
    for group, reward in zip(groups, reward_P, strict=True):
        (r,) = group.rollouts
        opener = int(group.prompt.policy_ids[-1])
        value_TK = head_values(lm, head, group.prompt.policy_ids, r)
        logp = terms.plain_logp(lm, group.prompt.policy_ids, r.ids, (opener,))
        logps.append(logp[torch.from_numpy(r.action)])
        advantage_TK = np.zeros((len(value_TK) + 1, 2))
        known_TK = np.vstack([value_TK.detach().double().numpy(), np.zeros((1, 2))])
        for t in reversed(range(len(value_TK))):
            gain = reward if t == len(value_TK) - 1 else known_TK[t + 1]
            advantage_TK[t] = gain - known_TK[t] + 0.6 * advantage_TK[t + 1]
        values.append(value_TK)
        returns.append(torch.from_numpy(advantage_TK[:-1] + known_TK[:-1]).float())
        means.append(advantage_TK[:-1].mean(axis=1))
    return torch.cat(logps), torch.cat(values), torch.cat(returns), np.concatenate(means)


@pytest.mark.parametrize("tokens", [60, 9999], ids=["split", "whole"])
def test_twin_critics_move_the_policy_by_their_centred_advantages(
    tokens: int, policy: Policy, other_policy: Policy, plan: Blueprint, shards: ShardFolder,
    world: dist.World, terms: ModuleType,
) -> None:  # fmt: skip
    """One rollout a prompt, one of them masked: it has no part in the mean that is subtracted."""
    critic_cfg = {"gae_lambda": 0.6, "heads": 2, "centre": True, "weight": 0.7}
    objective = {"ratio": "none", "mask": "none", "aggregate": "token", "critic": critic_cfg}
    rl = terms.stage(
        group_size=1, advantage={"baseline": "none"}, objective=objective,
        micro_batch_tokens=tokens, gates=({"kind": "mask_truncated"},),
    )  # fmt: skip
    learner, markers = terms.learner_of(policy, plan, world, other_policy), plan.vocabulary.markers
    learner.critic = critic = Critic(plan.config.hidden_size, rl.optimizer, world, 2, seed=1)
    alone = [
        replace(
            group,
            rollouts=(replace(group.rollouts[p % 4], finish="budget" if p == 1 else "closer"),),
        )
        for p, group in enumerate(terms.sampled(policy, plan, shards, world))
    ]
    kit = Kit({"policy": Scorer(policy, markers.ids, world, 600)}, markers, rl.cancels_baselines)
    update = _Update(learner, alone, rl, Credit(rl, world, 0, step=0), 0)
    rewarded, _ = update.after_scoring(rl.built(kit))
    found = {n: local(p.grad).clone() for n, p in policy.named_parameters() if p.grad is not None}
    assert critic.head.weight.grad is not None
    head_grad = critic.head.weight.grad.clone()
    critic.head.zero_grad()

    lm, reward_P = terms.plain_model(policy, plan), np.delete(rewarded.reward_PG[:, 0], 1)
    logp_R, value_RK, return_RK, advantage_R = printed(
        lm, critic.head, [*alone[:1], *alone[2:]], reward_P, terms
    )
    assert update.offset == pytest.approx(advantage_R.mean(), rel=1e-4)
    centred_R = torch.from_numpy(advantage_R - advantage_R.mean()).float()
    loss = -(centred_R * logp_R).mean() + 0.7 * 0.5 * ((value_RK - return_RK) ** 2).mean()
    loss.backward()
    for key, parameter in lm.named_parameters():
        error = torch.linalg.vector_norm(found[f"lm.{key}"] - parameter.grad)
        assert error <= 5e-5 * torch.linalg.vector_norm(parameter.grad), key
    torch.testing.assert_close(head_grad, critic.head.weight.grad, rtol=1e-4, atol=1e-6)
