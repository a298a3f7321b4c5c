"""What changes in the course of a stage, against numbers by hand."""

import numpy as np
import pytest

from rlpt.curriculum import DecayingBudget, DifficultyWindow, EntropyCurriculum
from rlpt.reward.base import Rewarded
from rlpt.reward.gates import LengthBudget, gated
from rlpt.types import Group, Prompt, Rollout, Trunk


def test_the_budget_decays_as_printed_and_is_a_function_of_the_step_alone() -> None:
    """RMT: 800 x 0.2^(t / T): 800, 357.7 at the half, 187.1 at 0.9, and 160.4 after 999 of 1000 steps."""
    budget = DecayingBudget(kind="decay", start=800)
    assert [budget.at(t, 1000) for t in (0, 500, 902, 999)] == [800, 357, 187, 160]
    assert [budget.at(t, 4) for t in (3, 1)] == [239, 534]
    flat = DecayingBudget(kind="decay", start=7, gamma=1.0)
    assert {flat.at(t, 9) for t in range(9)} == {7}


def test_the_budget_has_a_floor() -> None:
    budget = DecayingBudget(kind="decay", start=4, gamma=0.001)
    assert [budget.at(t, 4) for t in range(4)] == [4, 1, 1, 1]
    assert DecayingBudget(kind="decay", start=40, gamma=0.001, least=9).at(3, 4) == 9
    assert DecayingBudget(kind="decay", start=4, least=4).at(3, 4) == 4
    with pytest.raises(ValueError, match=r"budget.least = 5 exceeds budget.start = 4"):
        DecayingBudget(kind="decay", start=4, least=5)


def test_bounds_may_lie_on_their_borders_and_not_on_each_other() -> None:
    EntropyCurriculum(tiers=(0.0, 0.1, 0.2), transitions=(0.01, 0.99))
    DifficultyWindow(low=0.0, high=1.0, signal="gain_quantile")
    DifficultyWindow(low=-3.0, high=2.0)
    for tiers in ((-0.1, 0.1, 0.2), (0.1, 0.1, 0.2), (0.0, 0.2, 0.2)):
        with pytest.raises(ValueError, match="three increasing entropies"):
            EntropyCurriculum(tiers=tiers)
    for transitions in ((0.0, 0.5), (0.5, 0.5), (0.5, 1.0)):
        with pytest.raises(ValueError, match="two increasing parts"):
            EntropyCurriculum(transitions=transitions)
    with pytest.raises(ValueError, match="must be below"):
        DifficultyWindow(low=0.5, high=0.5)
    for low, high in ((-0.1, 0.5), (0.5, 1.1)):
        with pytest.raises(ValueError, match="quantiles are from 0 to 1"):
            DifficultyWindow(low=low, high=high, signal="gain_quantile")


def _group(budget: int, *lengths: int) -> Group:
    trunk = Trunk("d", "", 0, 0, np.arange(8), np.arange(9), (4,))
    ids = np.arange(5)
    rollouts = (
        Rollout(
            np.arange(n + 1), np.ones(n + 1, bool), np.zeros(n + 1, np.float32),
            np.zeros(n + 1, int), n, "closer",
        )
        for n in lengths
    )  # fmt: skip
    return Group(Prompt(trunk, 4, 2, ids, ids), tuple(rollouts), budget)


def test_the_length_term_follows_the_budget_that_each_group_was_sampled_under() -> None:
    """0.5 x 1 + 0.5 x triangle: at 4 of 4 1, at 4 of 8 a half, at 6 of 4 a half."""
    gate = LengthBudget(kind="length_budget", tokens="budget", weight=0.5)
    groups = [_group(4, 4, 6), _group(8, 4, 8)]
    found = gated(Rewarded(np.ones((2, 2)), {}), groups, (gate,))
    assert found.reward_PG.tolist() == [[1.0, 0.75], [0.75, 1.0]]
