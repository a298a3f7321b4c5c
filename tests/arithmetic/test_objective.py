"""The objective, its mask and its denominators against tables, closed forms and float64."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlpt.objective import TrustRegion, next_token_loss, policy_gradient, token_weights

SETTINGS = TrustRegion()


def rows(*values, dtype=torch.float64):
    return torch.tensor(values, dtype=dtype)


def push(logp, behaviour, advantage, weight=1.0, **settings):
    """Minus the gradient with respect to one row's log-probability: how hard it is pushed up."""
    leaf_R = rows(logp).requires_grad_()
    loss, _ = policy_gradient(
        leaf_R, rows(behaviour), rows(advantage), rows(weight), replace(SETTINGS, **settings)
    )
    (gradient_R,) = torch.autograd.grad(loss, leaf_R)
    return -gradient_R.item()


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected"),
    [
        (2.0, +1.0, 0.0),  # good and already likelier: no further push
        (2.0, -1.0, -2.0),  # bad and likelier: full push down
        (0.5, +1.0, 0.5),  # good and rarer: full push up
        (0.5, -1.0, 0.0),  # bad and already rarer: no further push
        (1.27, +1.0, 1.27),  # inside the range on all four sides
        (1.29, +1.0, 0.0),
        (0.81, -1.0, -0.81),
        (0.79, -1.0, 0.0),
    ],
)
def test_clip_is_the_gradient_of_the_clipped_surrogate(ratio, advantage, expected):
    assert push(math.log(ratio) - 3.0, -3.0, advantage, mask="clip") == pytest.approx(expected)


@given(
    log_ratio=st.floats(-3, 3),
    advantage=st.floats(-2, 2),
    low=st.floats(0, 1),
    high=st.floats(0.01, 2),
)
def test_clip_matches_autograd_of_ppo_everywhere(log_ratio, advantage, low, high):
    """d/dlogp of min(rho A, clip(rho, 1 - low, 1 + high) A), away from its corners."""
    if min(abs(math.exp(log_ratio) - 1 + low), abs(math.exp(log_ratio) - 1 - high)) < 1e-9:
        return
    logp = rows(log_ratio - 2.0).requires_grad_()
    ratio = torch.exp(logp + 2.0)
    surrogate = torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)
    (wanted,) = torch.autograd.grad(surrogate.sum(), logp)
    found = push(log_ratio - 2.0, -2.0, advantage, mask="clip", clip_low=low, clip_high=high)
    assert found == pytest.approx(wanted.item(), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(
    ("new", "old", "advantage", "masked"),
    [
        (0.75, 0.50, +1.0, True),  # pushed up although it is 0.25 above
        (0.75, 0.50, -1.0, False),  # pushed back
        (0.65, 0.50, +1.0, False),  # only 0.15 above
        (0.25, 0.50, -1.0, True),
        (0.25, 0.50, +1.0, False),
        (0.35, 0.50, -1.0, False),
        (0.02, 0.0001, +1.0, False),  # 200 times likelier, yet close in total variation
    ],
)
def test_tv_masks_by_distance_and_direction(new, old, advantage, masked):
    found = push(math.log(new), math.log(old), advantage, mask="tv")
    assert found == pytest.approx(0.0 if masked else new / old * advantage)


def test_clip_low_of_one_has_no_lower_side():
    assert push(-9.0, -1.0, -1.0, mask="clip", clip_low=1.0) == pytest.approx(-math.exp(-8))
    assert push(-9.0, -1.0, -1.0, mask="clip", clip_low=0.999) == 0.0


def test_tv_delta_moves_the_border():
    inside = push(math.log(0.65), math.log(0.5), 1.0, mask="tv", tv_delta=0.16)
    assert inside == pytest.approx(1.3)
    assert push(math.log(0.65), math.log(0.5), 1.0, mask="tv", tv_delta=0.14) == 0.0


@pytest.mark.parametrize("advantage", [-1.5, 1.5])
def test_none_masks_nothing_and_the_ratio_is_capped_from_above_only(advantage):
    assert push(-1.0, -3.0, advantage, max_ratio=5.0) == pytest.approx(5.0 * advantage)
    assert push(-1.0, -3.0, advantage) == pytest.approx(math.exp(2) * advantage)
    assert push(-9.0, -1.0, advantage, max_ratio=5.0) == pytest.approx(math.exp(-8) * advantage)


def test_the_loss_is_the_printed_formula():
    logp_R, behaviour_R = rows(-0.3, -2.0, -1.0), rows(-0.5, -1.8, -1.0)
    advantage_R, weight_R = rows(1.0, -2.0, 0.5), rows(0.25, 0.5, 0.125)
    loss, _ = policy_gradient(logp_R, behaviour_R, advantage_R, weight_R, SETTINGS)
    by_hand = (
        0.25 * math.exp(0.2) * 1.0 * -0.3
        + 0.5 * math.exp(-0.2) * -2.0 * -2.0
        + 0.125 * 1.0 * 0.5 * -1.0
    )
    assert loss.item() == pytest.approx(-by_hand, rel=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_expected_gradient_is_that_of_the_expected_reward(seed):
    """REINFORCE in closed form: every action of a softmax policy, weighted by who sampled it.

    The behaviour policy differs from the trained one: only the importance ratio makes it right.
    """
    rng = np.random.default_rng(seed)
    theta_V = torch.tensor(rng.normal(size=7), requires_grad=True)
    reward_V, behaviour_V = (
        rows(*rng.normal(size=7)),
        torch.log_softmax(rows(*rng.normal(size=7)), 0),
    )
    loss, _ = policy_gradient(
        torch.log_softmax(theta_V, 0), behaviour_V, reward_V - 0.37, behaviour_V.exp(), SETTINGS
    )
    (found_V,) = torch.autograd.grad(loss, theta_V)
    (wanted_V,) = torch.autograd.grad((torch.softmax(theta_V, 0) * reward_V).sum(), theta_V)
    assert torch.allclose(-found_V, wanted_V, atol=1e-12)


def test_the_gradient_agrees_with_finite_differences_of_its_frozen_form():
    """With ratio and mask held at their value, the loss is linear in log pi."""
    generator = torch.Generator().manual_seed(1)
    logp_R, behaviour_R, advantage_R, weight_R = torch.randn(4, 40, generator=generator).double()
    logp_R, behaviour_R = -logp_R.abs() - 0.1, -behaviour_R.abs() - 0.1
    leaf_R = logp_R.clone().requires_grad_()
    settings = replace(SETTINGS, mask="tv", max_ratio=2.0)
    loss, _ = policy_gradient(leaf_R, behaviour_R, advantage_R, weight_R.abs(), settings)
    (gradient_R,) = torch.autograd.grad(loss, leaf_R)
    ratio_R = (logp_R - behaviour_R).exp()
    away_R = ((advantage_R > 0) & (ratio_R > 1)) | ((advantage_R < 0) & (ratio_R < 1))
    kept_R = ~(away_R & ((logp_R.exp() - behaviour_R.exp()).abs() > 0.2))
    wanted_R = -weight_R.abs() * kept_R * ratio_R.clamp(max=2.0) * advantage_R
    assert torch.allclose(gradient_R, wanted_R, rtol=1e-12)
    assert loss.item() == pytest.approx((wanted_R * logp_R).sum().item())
    assert 0 < int((~kept_R).sum()) < 40


@pytest.mark.parametrize("mask", ["none", "clip", "tv"])
def test_masked_padding_and_zero_advantage_rows_are_exactly_silent(mask):
    """Whatever they hold: 0 times the garbage of an exp would be NaN."""
    logp_R = rows(-1.0, -math.inf, -2000.0, -1.0, math.nan).requires_grad_()
    behaviour_R = rows(-1.0, -1.0, -1.0, -3000.0, -math.inf)
    loss, _ = policy_gradient(
        logp_R, behaviour_R, rows(1.0, 3.0, -1.0, 0.0, math.nan), rows(1.0, 0.0, 0.0, 1.0, 0.0),
        replace(SETTINGS, mask=mask),
    )  # fmt: skip
    (gradient_R,) = torch.autograd.grad(loss, logp_R)
    assert gradient_R.tolist() == [-1.0, 0.0, 0.0, 0.0, 0.0]
    assert loss.item() == 1.0


def test_a_sampled_token_that_the_trainer_calls_impossible_is_not_hidden():
    logp_R = rows(-math.inf).requires_grad_()
    loss, _ = policy_gradient(logp_R, rows(-1.0), rows(1.0), rows(1.0), SETTINGS)
    assert math.isnan(loss.item())


@given(
    data=st.data(),
    counts=st.lists(st.lists(st.integers(0, 5), min_size=2, max_size=4), min_size=1, max_size=5),
    aggregate=st.sampled_from(["token", "prompt", "sequence"]),
)
def test_splitting_the_step_does_not_change_the_gradient(data, counts, aggregate):
    """Any grouping of prompts into micro-batches and ranks gives the loss of the whole step."""
    totals = {
        "total_actions": float(sum(map(sum, counts))),
        "num_prompts": float(len(counts)),
    }
    generator = torch.Generator().manual_seed(len(counts))

    def loss_of(part, logp_R):
        weights = token_weights(part, aggregate, **totals)
        weight_R = [
            weight
            for group, row in zip(part, weights, strict=True)
            for actions, weight in zip(group, row, strict=True)
            for _ in range(actions)
        ]
        return policy_gradient(
            logp_R, logp_R.detach() - 0.1, torch.cos(logp_R.detach() * 50),
            torch.tensor(weight_R, dtype=torch.float64), SETTINGS,
        )  # fmt: skip

    total = sum(map(sum, counts))
    leaf_R = -torch.rand(total, generator=generator, dtype=torch.float64).requires_grad_()
    whole, whole_stats = loss_of(counts, leaf_R)
    cut = data.draw(st.integers(0, len(counts)))
    seen = sum(map(sum, counts[:cut]))
    first, first_stats = loss_of(counts[:cut], leaf_R[:seen])
    second, second_stats = loss_of(counts[cut:], leaf_R[seen:])
    assert (first + second).item() == pytest.approx(whole.item(), abs=1e-12)
    (a,) = torch.autograd.grad(whole, leaf_R, retain_graph=True)
    (b,) = torch.autograd.grad(first + second, leaf_R)
    assert torch.allclose(a, b, atol=1e-14)
    for name, value in whole_stats.items():
        assert first_stats[name] + second_stats[name] == pytest.approx(value, abs=1e-9)


def test_weights_by_hand():
    """Two prompts of two rollouts; 1 + 3 actions, and 4 + 0."""
    counts = [[1, 3], [4, 0]]
    totals = {"total_actions": 8, "num_prompts": 2}
    assert token_weights(counts, "token", **totals) == [[1 / 8, 1 / 8], [1 / 8, 1 / 8]]
    assert token_weights(counts, "prompt", **totals) == [[1 / 8, 1 / 8], [1 / 8, 1 / 8]]
    assert token_weights(counts, "sequence", **totals) == [[1 / 4, 1 / 12], [1 / 16, 0.0]]
    assert token_weights([[1, 1], [6, 0]], "prompt", **totals) == [[1 / 4] * 2, [1 / 12] * 2]
    # This rank's prompt is one of ten, its actions are 4 of 100.
    of_ten = {"total_actions": 100, "num_prompts": 10}
    assert token_weights([[1, 3]], "token", **of_ten) == [[0.01, 0.01]]
    assert token_weights([[1, 3]], "prompt", **of_ten) == [[1 / 40, 1 / 40]]
    assert token_weights([[1, 3]], "sequence", **of_ten) == [[1 / 20, 1 / 60]]


@pytest.mark.parametrize("aggregate", ["token", "prompt", "sequence"])
def test_rollouts_without_actions_divide_nothing_by_zero(aggregate):
    totals = {"total_actions": 0, "num_prompts": 1}
    assert token_weights([[0, 0]], aggregate, **totals) == [[0.0, 0.0]]
    assert token_weights([], aggregate, **totals) == []


@given(
    counts=st.lists(st.lists(st.integers(1, 9), min_size=3, max_size=3), min_size=1, max_size=6),
    aggregate=st.sampled_from(["token", "prompt", "sequence"]),
)
def test_weights_of_all_actions_add_up_to_one(counts, aggregate):
    totals = {"total_actions": sum(map(sum, counts)), "num_prompts": len(counts)}
    weights = token_weights(counts, aggregate, **totals)
    total = sum(
        actions * weight
        for group, row in zip(counts, weights, strict=True)
        for actions, weight in zip(group, row, strict=True)
    )
    assert total == pytest.approx(1.0)


def test_masked_and_capped_rows_are_counted():
    """Ratios 2, 0.25 and 1; the last row is padding."""
    logp_R = rows(math.log(0.5), math.log(0.1), math.log(0.3), 0.0)
    behaviour_R = rows(math.log(0.25), math.log(0.4), math.log(0.3), -7.0)
    _, stats = policy_gradient(
        logp_R, behaviour_R, rows(1.0, -1.0, 1.0, 1.0), rows(1.0, 1.0, 1.0, 0.0),
        replace(SETTINGS, mask="clip", max_ratio=1.5),
    )  # fmt: skip
    assert stats == {"masked": 2.0, "capped": 1.0}


def test_on_policy_nothing_is_masked():
    logp_R = -torch.rand(50, generator=torch.Generator().manual_seed(0))
    advantage_R = torch.linspace(-1, 1, 50)
    for mask, most in (("none", 5.0), ("clip", 5.0), ("tv", 5.0), ("none", 1.0)):
        loss, stats = policy_gradient(
            logp_R, logp_R, advantage_R, torch.ones(50),
            replace(SETTINGS, mask=mask, max_ratio=most),
        )  # fmt: skip
        assert stats == {"masked": 0.0, "capped": 0.0}
        assert loss.item() == pytest.approx(-(advantage_R * logp_R).sum().item(), rel=1e-5)


def test_next_token_loss_is_the_weighted_negative_log_likelihood():
    logp_R = rows(-1.0, -2.0, -math.inf).requires_grad_()
    loss = next_token_loss(logp_R, rows(0.5, 0.25, 0.0))
    assert loss.item() == 1.0
    (gradient_R,) = torch.autograd.grad(loss, logp_R)
    assert gradient_R.tolist() == [-0.5, -0.25, 0.0]


def test_no_rows_give_a_loss_of_zero_that_can_be_differentiated():
    """A rank whose prompts have no action still takes part in the backward pass."""
    empty_R = torch.zeros(0, requires_grad=True)
    loss, stats = policy_gradient(empty_R, empty_R, empty_R, empty_R, SETTINGS)
    (loss + next_token_loss(empty_R, empty_R)).backward()
    assert loss.item() == 0.0
    assert set(stats.values()) == {0.0}
