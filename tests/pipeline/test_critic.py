"""PPO's value head: generalised advantages by hand, gradients by autograd, and a run that resumes bit for bit."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlpt import dist
from rlpt.advantage import gae
from rlpt.config import RunConfig
from rlpt.critic import Critic
from rlpt.runlog import read_journal
from rlpt.stages import OptimizerConfig, RLStage
from rlpt.train import run
from rlpt_data.strict import load

PPO = (
    "stage.1.reward={kind='likelihood'}",
    "stage.1.advantage={baseline='none'}",
    "stage.1.objective={mask='clip', aggregate='token', critic={gae_lambda=0.9}}",
)


def test_generalised_advantages_by_hand():
    """Two actions of value .5 and .2, reward 1 at the end, gamma .9, lambda .8; one action of value 2, no reward."""
    second = 1.0 - 0.2
    first = 0.9 * 0.2 - 0.5 + 0.9 * 0.8 * second
    found = gae(np.array([1.0, 0.0]), np.array([0.5, 0.2, 2.0]), [2, 1], 0.9, 0.8)
    assert found == pytest.approx([first, second, -2.0])


@given(st.integers(0, 999), st.sampled_from([0.0, 1.0]))
def test_lambda_goes_from_one_step_to_monte_carlo(seed, gae_lambda):
    """lambda 1: reward - V; lambda 0: V_{t+1} - V_t, and at the end reward - V. gamma 1."""
    draw = np.random.default_rng(seed)
    lengths = draw.integers(1, 5, 3).tolist()
    value_R, reward_N = draw.normal(size=sum(lengths)), draw.normal(size=3)
    found_R, at = gae(reward_N, value_R, lengths, 1.0, gae_lambda), 0
    for reward, length in zip(reward_N, lengths, strict=True):
        own = value_R[at : at + length]
        after = np.append(own[1:], reward) if gae_lambda == 0 else np.full(length, reward)
        np.testing.assert_allclose(found_R[at : at + length], after - own, atol=1e-12)
        at += length


def test_a_critic_learns_a_linear_value(world: dist.World) -> None:
    draw = torch.Generator().manual_seed(0)
    hidden_RD = torch.randn(256, 6, generator=draw)
    wanted_R = hidden_RD @ torch.tensor([1.0, -2.0, 0.0, 0.5, 0.0, 3.0]) + 0.7
    critic = Critic(6, OptimizerConfig(), world)
    assert not critic(hidden_RD).any()
    for _ in range(600):
        ((critic(hidden_RD) - wanted_R) ** 2).mean().backward()
        critic.step(0.05, 1.0)
    assert float((critic(hidden_RD) - wanted_R).detach().abs().max()) < 1e-2


def test_a_run_with_a_critic_resumes_bit_for_bit_and_its_values_improve(toml: Path) -> None:
    words = [
        "stage.0.steps=2",
        "stage.1.steps=6",
        "checkpoint.every=3",
        "checkpoint.keep_last=9",
        *PPO,
    ]
    run(load(RunConfig, toml, words))
    rows = [r for r in read_journal(toml.parent / "run/metrics.jsonl") if r["stage"] == "rl"]
    assert all(np.isfinite(row["loss/value"]) for row in rows)
    other = toml.parent / "other"
    (toml.parent / "run").rename(other)
    # Back to the middle of the stage.
    for step in sorted((other / "checkpoints").glob("step_*"))[-1:]:
        for path in sorted(step.rglob("*"), reverse=True):
            path.unlink() if path.is_file() else path.rmdir()
        step.rmdir()
    other.rename(toml.parent / "run")
    run(load(RunConfig, toml, words))
    again = [r for r in read_journal(toml.parent / "run/metrics.jsonl") if r["stage"] == "rl"]
    for name in ("loss/value", "loss/policy", "reward/mean"):
        assert [row[name] for row in again] == [row[name] for row in rows], name


def test_a_critic_beside_other_advantages_is_refused() -> None:
    table = {"name": "rl", "kind": "rl", "steps": 4, "documents_per_step": 5}
    with pytest.raises(ValueError, match=r"objective\.critic makes advantages itself"):
        RLStage.model_validate(table | {"objective": {"critic": {}}})
