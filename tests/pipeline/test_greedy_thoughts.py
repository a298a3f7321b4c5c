"""A greedy thought is the likeliest token, then the next: the same for every purpose and seed."""

import numpy as np
import pytest
import torch

from rlpt.config import PromptConfig, ThoughtConfig
from rlpt.prompts import held_out
from rlpt.rollout import sync, wire
from rlpt.rollout.sampling import sample
from rlpt.rollout.transformers_engine import TransformersEngine

CFG = PromptConfig(context_tokens=24, min_context_tokens=6, horizon_tokens=5)


def test_at_temperature_0_the_likeliest_id_is_drawn_and_has_its_probability_at_1() -> None:
    logits = torch.tensor([[0.0, 3.0, 2.0, 5.0], [1.0, 1.0, 0.0, 9.0]])
    draw = sample(logits.clone(), (3,), torch.tensor([1, 2]), 0, 0.0)
    assert draw.ids_N.tolist() == [1, 0]
    kept = logits.double()[:, :3].log_softmax(-1)
    torch.testing.assert_close(draw.logp_N.double(), kept.max(-1).values, rtol=0, atol=1e-6)


@pytest.mark.parametrize("layout", ["shared", "naive"])
def test_a_greedy_thought_is_argmax_by_argmax_whatever_the_purpose(
    layout, plan, policy, shards, world
) -> None:
    markers, thought = plan.vocabulary.markers, ThoughtConfig(budget_tokens=5)
    engine = TransformersEngine(plan.config, layout, markers, thought, 0, 32, world.device)
    sync.publish(policy, engine, 0)
    prompts = held_out(shards.split("train"), CFG, markers, 6, 0, ())
    found = [
        engine.collect(engine.submit(prompts, 1, purpose, greedy=True)) for purpose in ("a", "b")
    ]
    sampled = engine.collect(engine.submit(prompts, 1, "a"))
    for first, second, prompt in zip(*found, prompts, strict=True):
        ids = first.rollouts[0].ids
        assert np.array_equal(ids, second.rollouts[0].ids)
        assert ids.tolist() == likeliest(engine.lm, prompt.policy_ids.tolist(), markers, 5)
    assert any(
        not np.array_equal(group.rollouts[0].ids, other.rollouts[0].ids)
        for group, other in zip(found[0], sampled, strict=True)
    )


def likeliest(lm, ids: list[int], markers, budget: int) -> list[int]:
    """Argmax by argmax over the whole sequence, until the closer."""
    said: list[int] = []
    while len(said) < budget and markers.closer not in said:
        logits = lm(torch.tensor([ids + said])).logits[0, -1].clone()
        logits[markers.opener] = -torch.inf
        said.append(int(logits.argmax()))
    return said if markers.closer in said else [*said, markers.closer]


def test_a_job_says_whether_it_is_greedy(shards, plan) -> None:
    (prompt,) = held_out(shards.split("train"), CFG, plan.vocabulary.markers, 1, 0, ())
    jobs = [wire.job("t", prompt, 1, 7, 5, 0, greedy) for greedy in (False, True)]
    assert [job.greedy for job in jobs] == [False, True]
