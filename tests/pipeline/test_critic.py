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
from rlpt.critic import Critic, estimated
from rlpt.runlog import read_journal
from rlpt.stages import OptimizerConfig, RLStage
from rlpt.terms import CriticConfig
from rlpt.train import run
from rlpt_data.strict import load

PPO = (
    "stage.1.reward={kind='likelihood'}",
    "stage.1.advantage={baseline='none'}",
    "stage.1.objective={mask='clip', aggregate='token', critic={gae_lambda=0.9}}",
)

# One rollout a prompt.
TWINS = (
    *PPO[:2],
    "stage.1.group_size=1",
    "stage.1.objective={mask='clip', aggregate='token', critic={heads=2, centre=true}}",
)


def test_generalised_advantages_by_hand():
    """Two actions of value .5 and .2, reward 1 at the end, gamma .9, lambda .8; one action of value 2, no reward."""
    second = 1.0 - 0.2
    first = 0.9 * 0.2 - 0.5 + 0.9 * 0.8 * second
    found = gae(np.array([1.0, 0.0]), np.array([0.5, 0.2, 2.0]), [2, 1], 0.9, 0.8)
    assert found == pytest.approx([first, second, -2.0])


def test_twins_advise_by_their_mean_and_each_learns_its_own_returns():
    """One rollout of two actions, reward 1, gamma 1, lambda .5; the heads say .5, .2 and 0, -.4."""
    value_RK = torch.tensor([[0.5, 0.0], [0.2, -0.4]], dtype=torch.float64)
    ends = (1.0 - 0.2, 1.0 + 0.4)
    begins = (0.2 - 0.5 + 0.5 * ends[0], -0.4 - 0.0 + 0.5 * ends[1])
    found = estimated(value_RK, np.array([1.0]), [2], CriticConfig(gae_lambda=0.5, heads=2))
    assert found.advantage_R == pytest.approx([sum(begins) / 2, sum(ends) / 2])
    expected_RK = [[begins[0] + 0.5, begins[1]], [1.0, 1.0]]
    np.testing.assert_allclose(found.return_RK, expected_RK)


def test_twins_begin_apart_and_where_their_seed_says(world: dist.World) -> None:
    hidden_RD = torch.randn(4000, 64, generator=torch.Generator().manual_seed(0))
    one, same, other = (
        Critic(64, OptimizerConfig(), world, num_heads=2, seed=seed)(hidden_RD).detach()
        for seed in (3, 3, 4)
    )
    assert torch.equal(one, same)
    assert float((one - other).abs().min(dim=0).values.max()) > 0
    assert one.std(dim=0).tolist() == pytest.approx([0.1, 0.1], rel=0.3)
    assert abs(float(torch.corrcoef(one.T)[0, 1])) < 0.4


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


@pytest.mark.parametrize(("ranks", "scale"), [(1, 1.0), (1, 8.0), (2, 8.0)])
def test_a_step_undoes_what_the_loss_was_multiplied_by(
    ranks: int, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Adam goes rate x g / (|g| + eps) twice, with eps 1 and g = 2, -1/2 and 1 over all ranks."""
    monkeypatch.setattr(dist, "total", lambda values, _: [ranks * value for value in values])
    critic = Critic(2, OptimizerConfig(eps=1.0), dist.World(0, ranks, torch.device("cpu")))
    for _ in range(2):
        (critic(torch.tensor([[2.0, -0.5]])).sum() * scale).backward()
        critic.step(0.1, scale)
    found = [*critic.head.weight[0].tolist(), critic.head.bias.item()]
    assert found == pytest.approx([-0.2 * 2 / 3, 0.2 * 1 / 3, -0.2 * 1 / 2], rel=1e-5)


def test_a_critic_learns_a_linear_value(world: dist.World) -> None:
    draw = torch.Generator().manual_seed(0)
    hidden_RD = torch.randn(256, 6, generator=draw)
    wanted_R1 = hidden_RD @ torch.tensor([1.0, -2.0, 0.0, 0.5, 0.0, 3.0])[:, None] + 0.7
    critic = Critic(6, OptimizerConfig(), world)
    assert not critic(hidden_RD).any()
    for _ in range(600):
        ((critic(hidden_RD) - wanted_R1) ** 2).mean().backward()
        critic.step(0.05, 1.0)
    assert float((critic(hidden_RD) - wanted_R1).detach().abs().max()) < 1e-2


@pytest.mark.parametrize(
    "terms", [PPO, pytest.param(TWINS, marks=pytest.mark.slow)], ids=["ppo", "twins"]
)
def test_a_run_with_a_critic_resumes_bit_for_bit(terms: tuple[str, ...], toml: Path) -> None:
    words = [
        "stage.0.steps=2",
        "stage.1.steps=6",
        "checkpoint.every=3",
        "checkpoint.keep_last=9",
        *terms,
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
