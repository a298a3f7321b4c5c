"""Rewards and training controls against hand numbers."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlpt.advantage import Moments, advantage, batch_moments
from rlpt.objective import TrustRegion, policy_gradient
from rlpt.reward.control import constant, permuted, random_like
from rlpt.reward.gain import gain
from rlpt.reward.match import prefix_match
from rlpt.reward.shapes import Clip, Lengths


def test_gain_by_hand():
    """Nats per continuation token: (-6 - -8) / 4 and (-9 - -8) / 4; (-1 - -3) / 2."""
    thought_PG = np.array([[-6.0, -9.0], [-1.0, -3.0]])
    found_PG = gain(thought_PG, np.array([-8.0, -3.0]), np.array([4, 2]))
    assert found_PG.tolist() == [[0.5, -0.25], [1.0, 0.0]]
    assert gain(thought_PG, None, np.array([4, 2])).tolist() == [[-1.5, -2.25], [-0.5, -1.5]]


def test_gain_is_clipped_per_token_on_both_sides_and_before_centring():
    thought_PG = np.array([[-2.0, -30.0, -9.0]])
    shape, lengths = Clip(kind="clip", limit=1.5), Lengths(np.array([2.0]), np.array([9.0]))
    found_PG = shape(gain(thought_PG, np.array([-10.0]), np.array([2])), lengths)
    assert found_PG.tolist() == [[1.5, -1.5, 0.5]]


def test_gain_of_float32_scores_is_float64():
    thought_PG = np.array([[-1e4 - 0.25]], dtype=np.float32)
    found_PG = gain(thought_PG, np.array([-1e4], dtype=np.float32), np.array([3]))
    assert found_PG.dtype == np.float64
    assert gain(thought_PG, None, np.array([3])).dtype == np.float64
    assert found_PG[0, 0] == pytest.approx(-0.25 / 3, rel=1e-2)


@pytest.mark.parametrize("bad", [np.nan, -np.inf])
def test_an_impossible_continuation_is_a_fault_not_a_clipped_reward(bad):
    thought_PG = np.array([[-1.0, -1.0], [-1.0, bad]])
    with pytest.raises(FloatingPointError, match="prompt 1, rollout 1 is"):
        gain(thought_PG, np.array([-1.0, -1.0]), np.array([1, 1]))
    with pytest.raises(FloatingPointError, match="prompt 1, rollout 0 is"):
        gain(np.full((2, 2), -1.0), np.array([-1.0, bad]), np.array([1, 1]))


def test_a_prompt_without_a_continuation_is_refused():
    with pytest.raises(ValueError, match="prompt 1 of the batch has no continuation"):
        gain(np.zeros((2, 2)), None, np.array([3, 0]))


CAFE = [b" caf", "é".encode()[:1], "é".encode()[1:], b"", b" au", b" lait"]


@pytest.mark.parametrize(
    ("prediction", "reward"),
    [
        (b"", 0.0),
        (b" caf", 1.0),
        (b" ca", 0.0),  # a prefix that ends inside a token
        (b" caf\xc3", 1.0),  # a token boundary inside a character: bytes, not letters
        (" café".encode(), 1.0),
        (" café au".encode(), 1.0),
        (" café a".encode(), 0.0),
        (" café au lait".encode(), 1.0),
        (" café au lait!".encode(), 0.0),  # longer than the gold
        (b"caf", 0.0),  # the leading space counts
        (b" cap", 0.0),  # right length, wrong bytes
        (b" au", 0.0),  # gold bytes, but not from the start
    ],
)
def test_prefix_match_by_hand(prediction, reward):
    assert prefix_match(prediction, CAFE) == reward


@given(
    gold=st.lists(st.binary(max_size=4), max_size=6),
    take=st.integers(0, 6),
    extra=st.binary(max_size=2),
)
def test_prefix_match_equals_its_definition(gold, take, extra):
    prediction = b"".join(gold[:take]) + extra
    boundaries = {len(b"".join(gold[:k])) for k in range(1, len(gold) + 1)}
    wanted = (
        len(prediction) > 0
        and b"".join(gold)[: len(prediction)] == prediction
        and len(prediction) in boundaries
    )
    assert prefix_match(prediction, gold) == float(wanted)


def generators(count, seed=0):
    return [np.random.default_rng([seed, p]) for p in range(count)]


def test_permuted_keeps_each_groups_rewards_and_forgets_their_owners():
    reward_PG = np.arange(400 * 6, dtype=np.float64).reshape(400, 6)
    found_PG = permuted(reward_PG, generators(400))
    np.testing.assert_array_equal(np.sort(found_PG, axis=1), reward_PG)
    # Every place receives every rank equally often: the mean of 400 uniform ranks 0..5.
    mean_G = (found_PG - reward_PG[:, :1]).mean(axis=0)
    np.testing.assert_allclose(mean_G, 2.5, atol=5 * 1.71 / 20)
    assert (found_PG != reward_PG).any(axis=1).mean() > 0.95


def test_random_has_the_batch_moments_it_was_given():
    reward_PG = np.linspace(-3, 5, 4000).reshape(500, 8)
    moments = batch_moments(reward_PG)
    found_PG = random_like(reward_PG, moments, generators(500))
    assert found_PG.shape == reward_PG.shape
    assert found_PG.std() == pytest.approx(moments.std, rel=0.05)
    assert found_PG.mean() == pytest.approx(moments.mean, abs=5 * moments.std / 4000**0.5)
    assert abs(np.corrcoef(found_PG.ravel(), reward_PG.ravel())[0, 1]) < 0.1


@pytest.mark.parametrize("control", ["permuted", "random"])
def test_a_groups_draw_does_not_depend_on_its_batch(control):
    reward_PG = np.arange(20.0).reshape(4, 5)
    moments = batch_moments(reward_PG)

    def draw(part_PG, own):
        if control == "permuted":
            return permuted(part_PG, own)
        return random_like(part_PG, moments, own)

    whole_PG = draw(reward_PG, generators(4))
    np.testing.assert_array_equal(draw(reward_PG[2:], generators(4)[2:]), whole_PG[2:])
    assert draw(reward_PG[:0], []).shape == (0, 5)


def test_random_refuses_a_std_that_is_not_finite():
    with pytest.raises(FloatingPointError, match="std of the batch's rewards is nan"):
        random_like(np.ones((1, 2)), Moments(2.0, np.nan, 1.0), generators(1))


@pytest.mark.parametrize("baseline", ["group_mean", "leave_one_out"])
@pytest.mark.parametrize("scale", ["none", "group_std", "batch_std"])
def test_constant_reward_gives_a_gradient_of_exactly_zero(baseline, scale):
    reward_PG = constant(np.random.default_rng(0).normal(size=(3, 7)), value=0.1)
    advantage_PG = advantage(
        reward_PG, baseline=baseline, scale=scale, moments=batch_moments(np.zeros((3, 7)))
    )
    logp_R = torch.linspace(-3, -0.1, 21).requires_grad_()
    loss, _ = policy_gradient(
        logp_R, torch.full((21,), -1.0), torch.from_numpy(advantage_PG).float().flatten(),
        torch.full((21,), 1 / 21), TrustRegion("tv"),
    )  # fmt: skip
    (gradient_R,) = torch.autograd.grad(loss, logp_R)
    assert not gradient_R.any()
