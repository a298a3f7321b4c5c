"""What makes advantages and weights of a step's rewards: admission, clips, batch factors and masks, by hand."""

from typing import Any

import numpy as np
import pytest
import torch

from rlpt import dist
from rlpt.credit import Credit
from rlpt.reward.base import Kit
from rlpt.reward.form import FormReward
from rlpt.stages import RLStage
from rlpt.types import Group, Markers, Prompt, Rollout, Trunk

ALONE = dist.World(0, 1, torch.device("cpu"))
REWARD_PG = np.array([[1.0, 2.0, 6.0], [0.0, 0.0, 0.3]])
KEPT_PG = np.array([[True, True, False], [True, True, True]])


def credit(noise: float = 1e-6, **changes: Any) -> Credit:
    table = {"name": "rl", "kind": "rl", "steps": 4, "documents_per_step": 2, "group_size": 3}
    return Credit(RLStage.model_validate(table | changes), ALONE, 0, 0, noise)


def groups(*counts: tuple[int, ...], horizon: int = 2) -> list[Group]:
    """Of rollouts with so many actions each."""
    trunk = Trunk("d", "", 0, 0, np.arange(8), np.arange(9), (4,))
    prompt = Prompt(trunk, 4, horizon, np.arange(5), np.arange(5))
    return [Group(prompt, tuple(rollout(n) for n in each)) for each in counts]


def rollout(actions: int, finish: str = "closer") -> Rollout:
    zeros = np.zeros(actions)
    return Rollout(
        zeros.astype(int), zeros == 0, zeros.astype(np.float32), zeros.astype(int),
        actions - 1, finish,  # pyright: ignore[reportArgumentType]
    )  # fmt: skip


def test_groups_that_spread_no_more_than_the_least_are_left_out():
    """Population stds: sqrt(14 / 3) = 2.16 of 1, 2, 6, and 0.141 of 0, 0, 0.3."""
    for least, admitted in ((0.1, [True, True]), (0.2, [True, False]), (3.0, [False, False])):
        found_PG = credit(advantage={"min_std": least}).admitted(REWARD_PG, None)
        assert found_PG is not None
        assert found_PG.tolist() == [[each] * 3 for each in admitted]
    assert credit().admitted(REWARD_PG, None) is None


def test_admission_looks_at_the_rollouts_that_count_and_at_the_noise():
    """Of 1 and 2 the std is 0.5."""
    by_noise = credit(noise=0.4, advantage={"min_std": "noise"}).admitted(REWARD_PG, KEPT_PG)
    assert by_noise is not None
    assert by_noise.tolist() == [[True, True, False], [False] * 3]
    for noise in (0.5, 0.6):
        none = credit(noise=noise, advantage={"min_std": "noise"}).admitted(REWARD_PG, KEPT_PG)
        assert none is not None
        assert not none.any()


def test_the_std_of_the_batch_divides_before_the_clip():
    """Centred: -2, -1, 3 and -.1, -.1, .2; their std is sqrt(14.06 / 6)."""
    std = (14.06 / 6) ** 0.5
    centred = np.array([[-2.0, -1.0, 3.0], [-0.1, -0.1, 0.2]])
    cfg = {"baseline": "group_mean", "scale": "batch_std"}
    np.testing.assert_allclose(credit(advantage=cfg).advantages(REWARD_PG), centred / std)
    clipped = credit(advantage=cfg | {"clip": 1.0}).advantages(REWARD_PG)
    np.testing.assert_allclose(clipped, np.clip(centred / std, -1, 1))
    silent_PG = np.ones((2, 3))
    for baseline in ("group_mean", "none"):
        assert not credit(advantage=cfg | {"baseline": baseline}).advantages(silent_PG).any()


def test_each_group_may_have_a_scale_of_its_own():
    """-2, -1, 3 over their std sqrt(14 / 3), or over the mean reward of 3; 0, 0, 0.3: over 0.1."""
    by_std = credit(advantage={"baseline": "group_mean", "scale": "group_std"})
    found_PG = by_std.advantages(REWARD_PG)
    np.testing.assert_allclose(found_PG[0], np.array([-2, -1, 3]) / (14 / 3) ** 0.5)
    np.testing.assert_allclose(found_PG.std(axis=1), 1.0)
    by_mean = credit(
        reward={"kind": "match"}, advantage={"baseline": "group_mean", "scale": "group_mean"}
    )
    np.testing.assert_allclose(
        by_mean.advantages(REWARD_PG), [[-2 / 3, -1 / 3, 1.0], [-1.0, -1.0, 2.0]]
    )


def test_the_std_of_the_batch_is_that_of_the_rollouts_that_count():
    """-.5, .5 and -.1, -.1, .2 remain."""
    cfg = {"baseline": "group_mean", "scale": "batch_std"}
    found_PG = credit(advantage=cfg).advantages(REWARD_PG, KEPT_PG)
    std = ((0.25 + 0.25 + 0.06) / 5) ** 0.5
    expected = np.array([[-0.5, 0.5, 0.0], [-0.1, -0.1, 0.2]]) / std
    np.testing.assert_allclose(found_PG, expected, atol=1e-12)


def test_below_the_baseline_nothing_is_learned_from():
    cfg = {"baseline": "group_mean", "positive_only": True}
    found_PG = credit(advantage=cfg).advantages(REWARD_PG)
    np.testing.assert_allclose(found_PG, [[0, 0, 3], [0, 0, 0.2]], atol=1e-12)
    both = credit(advantage=cfg | {"clip": 2.0}).advantages(REWARD_PG)
    assert both[0].tolist() == [0.0, 0.0, 2.0]


def test_a_clip_holds_on_both_sides():
    found_PG = credit(advantage={"baseline": "group_mean", "clip": 1.5}).advantages(REWARD_PG)
    assert found_PG[0].tolist() == [-1.5, -1.0, 1.5]
    # A micro-batch of a split step is clipped by itself.
    part_PG = credit(advantage={"baseline": "group_mean", "clip": 1.5}).unscaled(REWARD_PG)
    assert part_PG[0].tolist() == [-1.5, -1.0, 1.5]


@pytest.mark.parametrize(
    ("aggregate", "expected"),
    [
        ("token", [[1 / 9, 1 / 9, 0], [0, 0, 0], [1 / 9] * 3]),
        ("prompt", [[1 / 6, 1 / 6, 0], [0, 0, 0], [1 / 12] * 3]),
        ("sequence", [[1 / 4, 1 / 8, 0], [0, 0, 0], [1 / 12] * 3]),
        ("constant", [[1 / 40, 1 / 40, 0], [0, 0, 0], [1 / 60] * 3]),
    ],
)
def test_denominators_count_what_is_kept(aggregate, expected):
    """1 and 2 actions of a first group, none of a second, 2 each of a third: 9 actions of two prompts."""
    kept_PG = np.array([[1, 1, 0], [0, 0, 0], [1, 1, 1]], dtype=bool)
    made = groups((1, 2, 5), (3, 3, 3), (2, 2, 2))
    objective = {"aggregate": aggregate, "constant_tokens": 10.0}
    step = credit(objective=objective)
    np.testing.assert_allclose(step.weights(made, kept_PG), expected, rtol=1e-12)
    np.testing.assert_array_equal(step.weights(made), step.weights(made, np.ones((3, 3), bool)))


def test_the_gold_term_is_a_mean_over_the_text_after_rollouts_that_count():
    """5 rollouts of 2 tokens count: each token weighs 0.7 / 10; all 6 of them 0.7 / 12."""
    step = credit(objective={"gold_weight": 0.7})
    made, gold_PG = groups((1, 1, 1), (1, 1, 1)), np.log([[0.5, 0.2, 0.1], [0.1, 0.2, 0.4]])
    for kept_PG, count in ((KEPT_PG, 10.0), (None, 12.0)):
        assert step.gold_count(made, kept_PG) == count
        found_PG = step.gold_weights(made, gold_PG, np.ones((2, 3)), kept_PG, count)
        expected = np.where(KEPT_PG if kept_PG is not None else True, 0.7 / count, 0.0)
        np.testing.assert_allclose(found_PG, expected)
    assert credit().gold_count(made, None) == 0.0
    # One token in all weighs as much as the whole term, none weighs nothing.
    alone_PG = np.array([[True, False, False], [False] * 3])
    one_PG = step.gold_weights(made, gold_PG, gold_PG, alone_PG, 1.0)
    assert one_PG.tolist() == [[0.7, 0.0, 0.0], [0.0] * 3]
    assert not step.gold_weights(made, gold_PG, gold_PG, alone_PG & False, 0.0).any()


def test_probable_gold_text_shares_the_denominator_of_the_thoughts():
    step = credit(objective={"gold_weight": 0.5, "gold": "probability", "aggregate": "constant"})
    gold_PG, weight_PG = np.log([[0.5, 0.2, 0.1]]), np.array([[0.25, 0.25, 0.0]])
    found_PG = step.gold_weights(groups((1, 1, 1)), gold_PG, weight_PG, KEPT_PG[:1], 0.0)
    np.testing.assert_allclose(found_PG, [[0.0625, 0.025, 0.0]])


def test_gold_text_after_a_thought_of_bad_form_is_not_learned():
    """Thoughts of 0, 1 and 2 tokens, one at least: the first is bad form. Its share of the bound is not dealt out."""
    made, gold_PG = groups((1, 2, 3)), np.log([[0.5, 0.2, 0.1]])
    gates = ({"kind": "format", "closed": False, "min_thought_tokens": 1},)
    mean = credit(objective={"gold_weight": 0.8}, gates=gates)
    assert mean.gold_count(made, None) == 4.0
    found_PG = mean.gold_weights(made, gold_PG, np.ones((1, 3)), None, 4.0)
    np.testing.assert_allclose(found_PG, [[0.0, 0.2, 0.2]])
    cfg = {"gold_weight": 0.8, "aggregate": "constant"}
    for gold, kept_PG, expected in (
        ("softmax", None, [0.0, 0.8 * 0.2 / 0.8, 0.8 * 0.1 / 0.8]),
        ("softmax", KEPT_PG[:1], [0.0, 0.8 * 0.2 / 0.7, 0.0]),
        ("probability", None, [0.0, 0.8 * 0.2, 0.8 * 0.1]),
    ):
        step = credit(objective=cfg | {"gold": gold}, gates=gates)
        found_PG = step.gold_weights(made, gold_PG, np.ones((1, 3)), kept_PG, 0.0)
        np.testing.assert_allclose(found_PG, [expected], err_msg=gold)
    assert mean.gold_count(made, KEPT_PG[:1]) == 2.0


def test_controls_replace_rewards():
    made = groups((1, 1, 1), (1, 1, 1))
    same = credit().controlled(REWARD_PG, made)
    assert same.tolist() == REWARD_PG.tolist()
    constant = credit(reward_control="constant").controlled(REWARD_PG, made)
    assert np.ptp(constant) == 0.0
    for row, before in zip(
        credit(reward_control="permuted").controlled(REWARD_PG, made), REWARD_PG, strict=True
    ):
        assert sorted(row) == sorted(before)
    wide_PG = np.random.default_rng(0).normal(3.0, 2.0, (2, 9000))
    noise_PG = credit(reward_control="random").controlled(wide_PG, made)
    assert (noise_PG.mean(), noise_PG.std()) == pytest.approx((3.0, 2.0), abs=0.1)
    assert not np.isin(noise_PG, wide_PG).any()


def test_probabilities_agree_by_their_share():
    """Products of 1e-8 and 2e-8 differ as 1 and 2 do; of a baseline's they would be rounding."""
    reward = {"kind": "likelihood", "aggregate": "product", "baseline": "none"}
    tiny_PG = np.array([[1e-8, 2e-8, 3e-8]])
    found_PG = credit(reward=reward, advantage={"baseline": "group_mean"}).advantages(tiny_PG)
    np.testing.assert_allclose(found_PG, [[-1e-8, 0, 1e-8]], atol=1e-20)
    assert not credit(advantage={"baseline": "group_mean"}).advantages(tiny_PG).any()


def test_form_pays_for_a_closed_thought_of_some_length():
    made = groups((4, 2, 1))
    cut = Group(made[0].prompt, (*made[0].rollouts, rollout(4, "budget")))
    reward = FormReward(kind="form", min_tokens=1).build(Kit({}, Markers(90, 91), True))
    assert reward([cut]).reward_PG.tolist() == [[1.0, 1.0, 0.0, 0.0]]
