"""A temperature divides the logits of what is sampled, on both sides; held-out text keeps its own probabilities."""

import numpy as np
import pytest
import torch

from rlpt.agreement import check_engine
from rlpt.config import PromptConfig, ThoughtConfig
from rlpt.policy.logprobs import Ratio
from rlpt.policy.packing import pack, rows
from rlpt.prompts import held_out
from rlpt.rollout import sync
from rlpt.rollout.engine import generate
from rlpt.rollout.sampling import sample
from rlpt.rollout.transformers_engine import TransformersEngine
from rlpt_data.strict import UserError

CFG = PromptConfig(context_tokens=24, min_context_tokens=6, horizon_tokens=5)
T = 0.6


def test_a_draw_has_the_probability_of_its_temperature() -> None:
    logits = torch.randn(3, 11, generator=torch.Generator().manual_seed(0)) * 3
    draw = sample(logits.clone(), (4,), torch.tensor([1, 2, 3]), 0, T)
    kept = logits.double() / T
    kept[:, 4] = -torch.inf
    expected = kept.log_softmax(-1).gather(1, draw.ids_N[:, None])[:, 0]
    torch.testing.assert_close(draw.logp_N.double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("layout", ["shared", "naive"])
def test_engine_and_trainer_agree_at_one_temperature_only(
    layout, plan, policy, shards, world
) -> None:
    thought = ThoughtConfig(budget_tokens=6, temperature=T)
    markers = plan.vocabulary.markers
    engine = TransformersEngine(plan.config, layout, markers, thought, 0, 32, world.device)
    sync.publish(policy, engine, 0)
    prompts = held_out(shards.split("train"), CFG, markers, 8, 0, ())
    asked = (engine, policy, prompts, markers, world, "float32", 600)
    assert check_engine(*asked, T).largest < 1e-5
    with pytest.raises(UserError, match="log-probabilities are not the trainer's"):
        check_engine(*asked, 1.0)


def test_the_policy_loss_reads_log_probabilities_at_the_temperature(
    plan, policy, shards, world
) -> None:
    """-A w log pi_T of every action, against a float64 softmax of the model's own logits."""
    markers = plan.vocabulary.markers
    thought = ThoughtConfig(budget_tokens=6, temperature=T)
    engine = TransformersEngine(plan.config, plan.layout, markers, thought, 0, 32, world.device)
    sync.publish(policy, engine, 0)
    (prompt,) = held_out(shards.split("train"), CFG, markers, 1, 0, ())
    (group,) = generate(engine, [prompt], 2, "train")
    rollout = group.rollouts[0]
    ids = torch.tensor([*prompt.policy_ids.tolist(), *rollout.ids.tolist()])
    logits = engine.lm(ids[None]).logits[0, len(prompt.policy_ids) - 1 : -1].double() / T
    logits[:, markers.opener] = -torch.inf
    expected = logits.log_softmax(-1).gather(1, torch.from_numpy(rollout.ids)[:, None])[:, 0]
    kept = torch.from_numpy(rollout.action)
    np.testing.assert_allclose(rollout.logp[rollout.action], expected[kept].detach(), atol=1e-5)
    found = policy_logp(policy, prompt, rollout, markers, world)
    torch.testing.assert_close(found.double(), expected[kept].detach(), rtol=0, atol=1e-5)


def policy_logp(policy, prompt, rollout, markers, world) -> torch.Tensor:
    from rlpt.types import Branch, concat

    branch = Branch(prompt.cut, concat([markers.opener], rollout.ids), 1)
    packed = pack([], [(prompt.trunk, branch)], world.device, policy.layout)
    at = np.flatnonzero(rollout.action)
    hidden = packed.branch_rows(0, 1, len(branch.ids))[at]
    kind = rows([hidden], [rollout.ids[at]], (markers.opener,), world.device, T)
    ones = torch.ones(len(at))
    behaviour = torch.from_numpy(rollout.logp[at])

    def read(readout):
        return (readout.policy_loss(kind, behaviour, ones, ones, Ratio("none")).logp.detach(),)

    (logp,) = policy(packed, read)
    policy.reshard()
    return logp
