"""Advantages against hand numbers and independent definitions."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from rlpt.advantage import Moments, advantage, agreeing, batch_moments, centred

GROUPS_PG = np.array([[1.0, 0.0, 0.0, 1.0], [3.0, 1.0, 1.0, 1.0]])


def plain(reward_PG, baseline, **settings):
    return advantage(reward_PG, baseline=baseline, scale="none", **settings)


def rewards(least=2):
    shapes = array_shapes(min_dims=2, max_dims=2, min_side=least, max_side=6)
    return shapes.flatmap(lambda s: arrays(np.float64, s, elements=st.floats(-50, 50, width=32)))


def test_baselines_by_hand():
    assert plain(GROUPS_PG, "group_mean").tolist() == [
        [0.5, -0.5, -0.5, 0.5],
        [1.5, -0.5, -0.5, -0.5],
    ]
    assert plain(GROUPS_PG, "leave_one_out")[1].tolist() == pytest.approx(
        [2.0, -2 / 3, -2 / 3, -2 / 3]
    )
    assert plain(GROUPS_PG, "none").tolist() == GROUPS_PG.tolist()


@given(rewards())
def test_leave_one_out_subtracts_the_mean_of_the_others(reward_PG):
    found_PG = plain(reward_PG, "leave_one_out", resolution=0.0)
    size = reward_PG.shape[1]
    others_PG = (reward_PG.sum(axis=1, keepdims=True) - reward_PG) / (size - 1)
    np.testing.assert_allclose(found_PG, reward_PG - others_PG, atol=1e-10)


@given(rewards())
def test_leave_one_out_is_the_group_mean_stretched(reward_PG):
    size = reward_PG.shape[1]
    np.testing.assert_array_equal(
        plain(reward_PG, "leave_one_out"), plain(reward_PG, "group_mean") * (size / (size - 1))
    )


@given(rewards(), st.floats(-100, 100), st.sampled_from(["group_mean", "leave_one_out"]))
def test_a_baseline_of_the_prompt_cancels(reward_PG, shift, baseline):
    """Why an EMA's no-think score needs no forward pass under a centred advantage."""
    np.testing.assert_allclose(
        plain(reward_PG + shift, baseline), plain(reward_PG, baseline), atol=2e-6
    )


@pytest.mark.parametrize("baseline", ["group_mean", "leave_one_out"])
@pytest.mark.parametrize("scale", ["none", "group_std", "batch_std"])
@pytest.mark.parametrize("noise", [0.0, 1e-16, 1e-7])
def test_a_group_that_agrees_gets_exactly_zero(baseline, scale, noise):
    """Also where rounding alone tells its rewards apart: no residue over a tiny std."""
    reward_PG = np.array([[0.1 + noise, 0.1, 0.1 - noise], [0.3, 0.1, 0.2]])
    moments = batch_moments(centred(reward_PG, baseline=baseline))
    found_PG = advantage(reward_PG, baseline=baseline, scale=scale, moments=moments)
    assert found_PG[0].tolist() == [0.0, 0.0, 0.0]
    assert (found_PG[1] != 0).any()


def test_resolution_is_the_border_of_agreement():
    reward_PG = np.array([[0.0, 1e-3]])
    assert agreeing(reward_PG, 1e-2).tolist() == [True]
    assert agreeing(reward_PG, 1e-4).tolist() == [False]
    assert agreeing(np.array([[1e9, 1e9 * (1 + 2e-16)]]), 0.0).tolist() == [True]
    assert agreeing(np.array([[-1e9, -1e9 * (1 + 2e-16)]]), 0.0).tolist() == [True]
    assert agreeing(np.zeros((1, 2)), 0.0).tolist() == [True]
    assert plain(reward_PG, "group_mean", resolution=1e-2).tolist() == [[0.0, 0.0]]
    assert plain(reward_PG, "group_mean", resolution=0.0).tolist() == [[-5e-4, 5e-4]]


@pytest.mark.parametrize("baseline", ["group_mean", "leave_one_out", "none"])
def test_group_std_leaves_every_group_with_std_one(baseline):
    found_PG = advantage(GROUPS_PG, baseline=baseline, scale="group_std")
    np.testing.assert_allclose(found_PG.std(axis=1), [1.0, 1.0])
    if baseline != "none":
        # sqrt(3) = 1.5 / std of (1.5, -.5, -.5, -.5) over the population, not over a sample.
        assert found_PG[1, 0] == pytest.approx(3**0.5)
    else:
        assert found_PG[1, 0] == pytest.approx(3 / 0.75**0.5)


def test_batch_std_divides_by_the_std_of_all_centred_rewards():
    centred_PG = centred(GROUPS_PG, baseline="leave_one_out")
    found_PG = advantage(
        GROUPS_PG, baseline="leave_one_out", scale="batch_std", moments=batch_moments(centred_PG)
    )
    by_hand = (4 * (2 / 3) ** 2 / 8 + (4 + 3 * 4 / 9) / 8) ** 0.5
    np.testing.assert_allclose(found_PG, centred_PG / by_hand)
    assert found_PG.std() == pytest.approx(1.0)


@given(rewards(), st.integers(0, 6))
def test_ranks_that_add_their_moments_get_the_advantages_of_one_rank(reward_PG, cut):
    def together(part_PG, moments):
        return advantage(part_PG, baseline="group_mean", scale="batch_std", moments=moments)

    parts = [reward_PG[:cut], reward_PG[cut:]]
    one, two = (batch_moments(centred(part, baseline="group_mean")) for part in parts)
    whole = batch_moments(centred(reward_PG, baseline="group_mean"))
    split_PG = np.concatenate([together(part, one + two) for part in parts])
    np.testing.assert_allclose(split_PG, together(reward_PG, whole), rtol=1e-9, atol=1e-12)


@given(rewards(least=1))
def test_moments_are_mean_and_population_std(reward_PG):
    moments = batch_moments(reward_PG)
    assert moments.count == reward_PG.size
    assert moments.mean == pytest.approx(reward_PG.mean(), abs=1e-9)
    # A std below 1e-6 of the values counts as none.
    assert moments.std == pytest.approx(reward_PG.std(), abs=1e-4)


def test_moments_of_ranks_add_up_also_around_a_mean_that_is_not_zero():
    whole = batch_moments(GROUPS_PG[:1]) + batch_moments(GROUPS_PG[1:])
    assert (whole.count, whole.mean, whole.std) == (8.0, GROUPS_PG.mean(), GROUPS_PG.std())


@pytest.mark.parametrize("unit", [1e-9, 1.0, 1e9])
def test_the_std_of_a_batch_has_the_unit_of_its_rewards(unit):
    """Rewards may be probabilities of long texts; a spread of 1e-5 of their size is no rounding."""
    moments = batch_moments(unit * np.array([[1.0 + 1e-5, 1.0 - 1e-5]]))
    assert moments.std == pytest.approx(1e-5 * unit, rel=1e-4)


def test_a_batch_without_spread_or_without_rewards_has_std_zero():
    assert batch_moments(np.zeros((0, 4))).std == 0.0
    assert Moments(0.0, 0.0, 0.0).mean == 0.0


@pytest.mark.parametrize("value", [0.1, 1.0, -7.3, 1e9])
@pytest.mark.parametrize("scale", ["group_std", "batch_std"])
def test_one_value_repeated_has_no_scale_even_without_a_baseline(value, scale):
    """Its variance is a difference of equals: rounding must not become a divisor."""
    reward_PG = np.full((5, 3), value)
    moments = batch_moments(reward_PG)
    assert moments.std == 0.0
    found_PG = advantage(reward_PG, baseline="none", scale=scale, moments=moments)
    assert found_PG.tolist() == [[0.0] * 3] * 5


def test_a_rank_without_prompts_gets_an_empty_answer():
    found_PG = plain(np.zeros((0, 4)), "leave_one_out")
    assert found_PG.shape == (0, 4)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("baseline", ["group_mean", "none"])
def test_a_reward_that_is_not_finite_is_named(bad, baseline):
    reward_PG = np.zeros((3, 4))
    reward_PG[2, 1] = bad
    with pytest.raises(FloatingPointError, match=r"prompt 2, rollout 1 is (nan|-?inf)"):
        plain(reward_PG, baseline)


@pytest.mark.parametrize("baseline", ["group_mean", "leave_one_out"])
def test_one_rollout_has_no_siblings(baseline):
    with pytest.raises(ValueError, match=r"needs G >= 2; got G = 1"):
        plain(np.ones((2, 1)), baseline)
    assert plain(np.ones((2, 1)), "none").tolist() == [[1.0], [1.0]]


def test_batch_std_without_the_moments_of_the_batch_is_refused():
    with pytest.raises(ValueError, match="needs the moments of the whole batch"):
        advantage(GROUPS_PG, baseline="group_mean", scale="batch_std")
