"""Gates and length terms against hand numbers, and what advantages make of rollouts that are left out."""

from dataclasses import replace

import numpy as np
import pytest

from rlpt.advantage import advantage, agreeing, batch_moments, centred, group_std
from rlpt.reward.base import Rewarded
from rlpt.reward.gates import FormatGate, LengthBudget, SoftOverlong, TruncationMask, gated
from rlpt.types import Group, Prompt, Rollout, Trunk


def rollout(length: int, finish: str = "closer", prediction: int = 0) -> Rollout:
    total = length + 1 + prediction
    return Rollout(
        np.arange(total), np.ones(total, bool), np.zeros(total, np.float32), np.zeros(total, int),
        length, finish,  # pyright: ignore[reportArgumentType]
    )  # fmt: skip


def group(*rollouts: Rollout) -> Group:
    trunk = Trunk("d", "", 0, 0, np.arange(8), np.arange(9), (4,))
    ids = np.arange(5)
    return Group(Prompt(trunk, 4, 2, ids, ids), rollouts)


def after(gate, reward_PG, groups):
    return gated(Rewarded(np.array(reward_PG), {}), groups, (gate,))


def test_bad_form_gets_its_value_instead_of_its_reward_and_good_form_gets_nothing_added():
    groups = [group(rollout(3), rollout(3, "budget"), rollout(0), rollout(5))]
    gate = FormatGate(kind="format", min_thought_tokens=1, value=-10.0)
    assert after(gate, [[2.0, 2.0, 2.0, -1.0]], groups).reward_PG.tolist() == [
        [2.0, -10.0, -10.0, -1.0]
    ]


def test_an_empty_prediction_is_bad_form_where_one_is_asked_for():
    groups = [group(rollout(3, prediction=2), rollout(3))]
    gate = FormatGate(kind="format", min_prediction_tokens=1)
    assert after(gate, [[1.0, 1.0]], groups).reward_PG.tolist() == [[1.0, 0.0]]


def test_form_asks_for_what_it_says_and_no_more():
    groups = [group(rollout(2), rollout(1), rollout(3, "budget"))]
    open_too = FormatGate(kind="format", closed=False, min_thought_tokens=2)
    assert after(open_too, [[1.0, 1.0, 1.0]], groups).reward_PG.tolist() == [[1.0, 0.0, 1.0]]
    open_too.refuse_unfit(2, 0)
    with pytest.raises(ValueError, match="min_thought_tokens = 2, and a thought has 1 at most"):
        open_too.refuse_unfit(1, 0)


def test_the_length_budget_is_a_triangle_with_its_top_at_the_budget():
    groups = [group(*(rollout(n) for n in (0, 2, 4, 6, 8, 11)))]
    gate = LengthBudget(kind="length_budget", tokens=4, weight=0.25)
    found = after(gate, [[1.0] * 6], groups).reward_PG[0]
    assert found == pytest.approx([0.75 + 0.25 * t for t in (0, 0.5, 1, 0.5, 0, 0)])


def test_the_length_budget_is_a_weighted_mean_with_the_reward():
    """At half its tokens the triangle is 1/2: 0.75 r + 0.125."""
    gate = LengthBudget(kind="length_budget", tokens=4, weight=0.25)
    found = after(gate, [[-2.0, 0.0, 3.0]], [group(rollout(2), rollout(2), rollout(2))])
    assert found.reward_PG.tolist() == [[-1.375, 0.125, 2.375]]


def test_the_length_budget_may_be_the_one_that_thoughts_were_sampled_under():
    groups = [replace(group(rollout(2), rollout(4)), budget=budget) for budget in (4, 2)]
    gate = LengthBudget(kind="length_budget", tokens="budget", weight=1.0)
    assert after(gate, [[1.0, 1.0]] * 2, groups).reward_PG.tolist() == [[0.5, 1.0], [1.0, 0.0]]


def test_gates_leave_everything_else_as_it_was_and_log_what_they_changed():
    groups = [group(rollout(3), rollout(9, "budget"), rollout(2))]
    gold_PG, kept_PG = np.full((1, 3), -1.0), np.array([[True, True, False]])
    before = Rewarded(np.ones((1, 3)), {"reward/x": (3.0, 3.0)}, kept_PG=kept_PG, gold_PG=gold_PG)
    masks = TruncationMask(kind="mask_truncated")
    for gates, kept in (((), [1, 1, 0]), ((masks,), [1, 0, 0])):
        form = FormatGate(kind="format", value=-1.0)
        found = gated(before, groups, (form, *gates))
        assert found.kept_PG is not None
        assert found.kept_PG.tolist() == [[bool(each) for each in kept]]
        assert found.gold_PG is gold_PG
        assert found.sums["reward/x"] == (3.0, 3.0)
        assert found.sums["reward/format"] == (-2.0, 3.0)
    assert gated(before, groups, ()) is before


def test_soft_overlong_falls_over_the_cache_and_stops_at_minus_one():
    """L_max 20, L_cache 5: nothing up to 15, -0.4 at 17, -1 from 20 on."""
    groups = [group(*(rollout(n) for n in (3, 15, 17, 20, 30)))]
    gate = SoftOverlong(kind="soft_overlong", most_tokens=20, cache_tokens=5)
    found = after(gate, [[1.0] * 5], groups).reward_PG[0]
    assert found == pytest.approx([1.0, 1.0, 0.6, 0.0, 0.0])
    assert SoftOverlong(kind="soft_overlong", most_tokens=5, cache_tokens=5).cache_tokens == 5
    with pytest.raises(ValueError, match="cache_tokens = 6 exceeds most_tokens = 5"):
        SoftOverlong(kind="soft_overlong", most_tokens=5, cache_tokens=6)


def test_truncated_thoughts_are_masked_and_counted():
    groups = [group(rollout(3), rollout(9, "budget")), group(rollout(1), rollout(2))]
    found = after(TruncationMask(kind="mask_truncated"), [[1.0, 5.0], [0.0, 1.0]], groups)
    assert found.kept_PG is not None
    assert found.kept_PG.tolist() == [[True, False], [True, True]]
    assert found.sums["reward/truncated"] == (1.0, 4.0)
    assert found.reward_PG.tolist() == [[1.0, 5.0], [0.0, 1.0]]


REWARD_PG = np.array([[1.0, 2.0, 6.0, 99.0], [3.0, 3.0, -9.0, -9.0], [5.0, 7.0, 1.0, 0.0]])
KEPT_PG = np.array([[1, 1, 1, 0], [1, 1, 0, 0], [0, 1, 0, 0]], dtype=bool)


@pytest.mark.parametrize("baseline", ["group_mean", "leave_one_out"])
@pytest.mark.parametrize("scale", ["none", "group_std", "group_mean"])
def test_a_masked_rollout_has_no_part_in_its_group(baseline, scale):
    """The first group is as if it had three rollouts; of the second two agree; the third has no sibling left."""
    found_PG = advantage(REWARD_PG, baseline=baseline, scale=scale, kept_PG=KEPT_PG)
    alone_PG = advantage(REWARD_PG[:1, :3], baseline=baseline, scale=scale)
    np.testing.assert_allclose(found_PG[0, :3], alone_PG[0], rtol=1e-12)
    assert not found_PG[~KEPT_PG].any()
    assert not found_PG[1:].any()


def test_without_a_baseline_a_masked_reward_is_zero_and_the_others_are_as_they_were():
    found_PG = advantage(REWARD_PG, baseline="none", scale="none", kept_PG=KEPT_PG)
    assert found_PG.tolist() == [[1.0, 2.0, 6.0, 0.0], [3.0, 3.0, 0.0, 0.0], [0.0, 7.0, 0.0, 0.0]]


def test_masked_rewards_have_no_part_in_whether_a_group_agrees():
    """Rounding between two that count is nothing, whatever lies beside it; 1e-8 and 2e-8 differ, also beside a 1."""
    reward_PG, kept_PG = np.array([[1.0, 1.0 + 1e-9, 99.0, -99.0]]), KEPT_PG[1:2]
    assert agreeing(reward_PG, kept_PG=kept_PG).tolist() == [True]
    for scale in ("none", "group_std", "group_mean"):
        found_PG = advantage(reward_PG, baseline="group_mean", scale=scale, kept_PG=kept_PG)
        assert not found_PG.any()
    tiny_PG = np.array([[1e-8, 2e-8, 1.0, 0.0]])
    assert agreeing(tiny_PG, kept_PG=kept_PG, relative=True).tolist() == [False]


def test_a_group_with_one_rollout_or_none_that_counts_has_no_spread():
    reward_PG, kept_PG = np.array([[5.0, 7.0], [5.0, 7.0]]), np.array([[True, False], [False] * 2])
    assert group_std(reward_PG, kept_PG).tolist() == [[0.0], [0.0]]
    for baseline in ("group_mean", "leave_one_out"):
        assert not centred(reward_PG, baseline=baseline, kept_PG=kept_PG).any()


def test_a_masked_reward_need_not_be_finite():
    reward_PG = np.array([[1.0, np.nan, 3.0]])
    kept_PG = np.array([[True, False, True]])
    assert centred(reward_PG, baseline="group_mean", kept_PG=kept_PG).tolist() == [[-1, 0, 1]]
    with pytest.raises(FloatingPointError, match="prompt 0, rollout 1"):
        centred(reward_PG, baseline="group_mean")


def test_moments_of_the_batch_leave_masked_rollouts_out():
    found = batch_moments(REWARD_PG, KEPT_PG)
    kept = REWARD_PG[KEPT_PG]
    assert (found.count, found.mean) == (6.0, pytest.approx(kept.mean()))
    assert found.std == pytest.approx(kept.std())


def test_maxrl_divides_by_the_mean_of_the_group():
    """(r - mean) / mean: of 1, 0, 0, 0 it is 3, -1, -1, -1; a group without any reward stays silent."""
    reward_PG = np.array([[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 0.0]])
    found_PG = advantage(reward_PG, baseline="group_mean", scale="group_mean")
    assert found_PG[0].tolist() == [3.0, -1.0, -1.0, -1.0]
    assert not found_PG[1].any()
    assert found_PG[2] == pytest.approx([1 / 3, 1 / 3, 1 / 3, -1.0])
    # A gate may pull a group below zero: then there is no share to speak of.
    below_PG = np.array([[-1.0, 0.5, 0.0, 0.0]])
    assert not advantage(below_PG, baseline="group_mean", scale="group_mean").any()
