"""k of n thoughts: every figure against the mean over all choices of k."""

import itertools
import math

import numpy as np
import pytest

from rlpt.evaluate.attempts import best_at_k, majority, pass_at_k, powers


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5])
def test_passing_and_best_are_means_over_every_choice_of_k(k):
    draw = np.random.default_rng(k)
    value, right = draw.normal(size=(7, 5)), (draw.random((7, 5)) < 0.3).astype(float)
    right[0], right[1] = 0.0, 1.0
    choices = list(itertools.combinations(range(5), k))
    assert best_at_k(value, k) == pytest.approx(
        [np.mean([row[list(each)].max() for each in choices]) for row in value]
    )
    assert pass_at_k(right, k) == pytest.approx(
        [np.mean([row[list(each)].max() for each in choices]) for row in right]
    )


def test_passing_is_the_formula_of_chen_et_al():
    """c = 3 of n = 10 right, k = 4: 1 - C(7, 4) / C(10, 4) = 1 - 35 / 210."""
    right = np.array([[1.0] * 3 + [0.0] * 7])
    assert pass_at_k(right, 4).tolist() == [1 - 35 / 210]
    assert pass_at_k(np.ones((1, 200)), 100).tolist() == [1.0]
    assert math.isclose(pass_at_k(np.eye(1, 200), 100)[0], 0.5)


def test_k_doubles_up_to_all_of_them():
    assert [powers(n) for n in (1, 2, 3, 4, 6)] == [[1], [1, 2], [1, 2, 3], [1, 2, 4], [1, 2, 4, 6]]


@pytest.mark.parametrize(
    ("votes", "said"),
    [([3, 5, 5], 5), ([3, 5], 3), ([5, 3, 3, 5], 5), ([None, 4, None], 4), ([None, None], None)],
)
def test_the_majority_decides_and_among_equals_what_was_said_first(votes, said):
    assert majority(votes) == said
