"""Aggregates and shapes of likelihood rewards against hand numbers and independent definitions in float64."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from rlpt.reward import aggregates
from rlpt.reward.base import Kit, PolicyScores
from rlpt.reward.likelihood import LikelihoodReward
from rlpt.reward.shapes import (
    Buckets,
    Clip,
    Improvement,
    Lengths,
    PerByte,
    Rank,
    Relu,
    Scale,
    Tanh,
    shaped,
)
from rlpt.types import Group, Markers, Prompt, Rollout, Scores, Trunk

P_GC = np.array([[0.5, 0.25], [0.1, 0.9], [0.8, 0.2]])
LOGP_GC = np.log(P_GC)
ONE = Lengths(np.array([2.0]), np.array([8.0]))


def test_every_plain_aggregate_by_hand():
    by_hand = {
        "mean": [(math.log(a) + math.log(b)) / 2 for a, b in P_GC],
        "sum": [math.log(0.125), math.log(0.09), math.log(0.16)],
        "product": [0.125, 0.09, 0.16],
        "mean_probability": [0.375, 0.5, 0.5],
        "geometric_mean": [math.sqrt(0.125), 0.3, 0.4],
    }
    assert set(by_hand) == set(aggregates.PLAIN)
    for name, expected in by_hand.items():
        assert aggregates.PLAIN[name](LOGP_GC) == pytest.approx(expected, rel=1e-12), name


def test_discounting_counts_the_first_token_whole():
    """log .5 + .7 log .25, and so on."""
    expected = [math.log(a) + 0.7 * math.log(b) for a, b in P_GC]
    assert aggregates.discounted(LOGP_GC, 0.7) == pytest.approx(expected, rel=1e-12)
    assert aggregates.discounted(LOGP_GC, 1.0) == pytest.approx(aggregates.total(LOGP_GC))


def test_hard_tokens_weigh_more():
    """Base probabilities 1/2 and 1/8 weigh 1/4 and 3/4."""
    base_C = np.log([0.5, 0.125])
    found_G = aggregates.hardness_weighted(LOGP_GC, base_C)
    assert found_G == pytest.approx([0.25 * a + 0.75 * b for a, b in P_GC], rel=1e-12)
    # A base that is surer of both has the same opinion of which is harder.
    surer_G = aggregates.hardness_weighted(LOGP_GC, base_C / 8)
    assert surer_G == pytest.approx(found_G, rel=1e-12)
    certain_G = aggregates.hardness_weighted(LOGP_GC, np.zeros(2))
    assert certain_G == pytest.approx(aggregates.mean_probability(LOGP_GC))


def test_the_share_of_the_log_mean_exp_by_hand():
    """L - v_i with L = log((.125 + .09 + .16) / 3) and v_1 = log((.09 + .16) / 2)."""
    whole = math.log((0.125 + 0.09 + 0.16) / 3)
    others = [math.log(x / 2) for x in (0.09 + 0.16, 0.125 + 0.16, 0.125 + 0.09)]
    found_G = aggregates.log_mean_exp_share(LOGP_GC)
    assert found_G == pytest.approx([whole - v for v in others], rel=1e-12)


@given(arrays(np.float64, (4, 3), elements=st.floats(-300, -0.01)), st.floats(-500, 500))
def test_the_share_of_the_log_mean_exp_ignores_a_common_factor_and_never_overflows(logp_GC, shift):
    found_G = aggregates.log_mean_exp_share(logp_GC)
    moved_G = aggregates.log_mean_exp_share(logp_GC + shift / 3)
    np.testing.assert_allclose(found_G, moved_G, atol=1e-9)
    assert np.isfinite(found_G).all()


def test_every_shape_by_hand():
    reward_PG = np.array([[-2.0, 0.03, 1.0, 3.0]])
    cases = [
        (Relu(kind="relu", threshold=0.5), [0.0, 0.0, 0.5, 2.5]),
        (Clip(kind="clip", limit=1.5), [-1.5, 0.03, 1.0, 1.5]),
        (Tanh(kind="tanh", scale=2.0), [math.tanh(x / 2) for x in (-2.0, 0.03, 1.0, 3.0)]),
        (Improvement(kind="improvement"), [100 * (1 - math.exp(-x)) for x in (-2, 0.03, 1, 3)]),
        (Scale(kind="scale", factor=-2.0), [4.0, -0.06, -2.0, -6.0]),
        (PerByte(kind="per_byte"), [-0.5, 0.0075, 0.25, 0.75]),
        (Rank(kind="rank"), [0.25, 0.5, 0.75, 1.0]),
    ]
    for shape, expected in cases:
        assert shape(reward_PG, ONE)[0] == pytest.approx(expected, rel=1e-12), shape.kind


def test_what_rounding_might_part_ties():
    """1.00 and 1.04 tie at a noise of 0.05, and 1.04 and 1.08, but not the first and the last; 2 is the best."""
    lengths, value_PG = Lengths(ONE.tokens_P, ONE.bytes_P, 0.05), np.array([[1.0, 1.04, 1.08, 2.0]])
    found_PG = Rank(kind="rank", ties="noise")(value_PG, lengths)
    np.testing.assert_allclose(found_PG, [[(4 - 2.5) / 4, (4 - 2) / 4, (4 - 1.5) / 4, 1.0]])
    assert Rank(kind="rank")(value_PG, lengths).tolist() == [[0.25, 0.5, 0.75, 1.0]]
    for aggregate, shapes in (("sum", ("rank",)), ("mean", ("scale", "rank"))):
        tables = {
            "rank": {"kind": "rank", "ties": "noise"},
            "scale": {"kind": "scale", "factor": 2},
        }
        with pytest.raises(ValueError, match="put rank first"):
            LikelihoodReward.model_validate(
                {"aggregate": aggregate, "shapes": tuple(tables[name] for name in shapes)}
            )


def test_the_noise_of_a_rank_is_that_of_the_run():
    """Means of -1 and -1.01 differ by more than 0.009 and by no more than 0.02."""
    trunk = Trunk("d", "", 0, 0, np.arange(6), np.arange(7), (4,))
    rollout = Rollout(
        np.zeros(1, int), np.ones(1, bool), np.zeros(1, np.float32), np.zeros(1, int), 0, "closer"
    )
    group = Group(Prompt(trunk, 4, 2, np.arange(5), np.arange(5)), (rollout, rollout))
    logps = [np.array([-1.0, second], dtype=np.float32) for second in (-1.0, -1.02, -1.0)]
    one, other, bare = (Scores(logp, np.zeros(2, int)) for logp in logps)
    for noise, expected in ((0.009, [1.0, 0.5]), (0.02, [0.75, 0.75])):
        reward = LikelihoodReward(shapes=(Rank(kind="rank", ties="noise"),)).build(
            Kit({}, Markers(7, 8), centred=True, noise=noise)
        )
        found = reward([group], PolicyScores([one, other], [bare]))
        assert found.reward_PG.tolist() == [expected]


def test_ties_share_the_mean_of_their_ranks():
    """Of 5, 5, 1, 7 the fives hold ranks 1 and 2: (4 - 1.5) / 4 each."""
    found_PG = Rank(kind="rank")(np.array([[5.0, 5.0, 1.0, 7.0]]), ONE)
    assert found_PG.tolist() == [[0.625, 0.625, 0.25, 1.0]]


def test_next_chapter_prediction_pays_by_buckets_of_per_cent():
    """VR-CLI: 0, .5, .9, 1 below .05%, from .05%, from 1%, from 2% of perplexity; edges belong above."""
    shapes = (
        Improvement(kind="improvement"),
        Buckets(kind="buckets", edges=(0.05, 1.0, 2.0), values=(0.0, 0.5, 0.9, 1.0)),
    )
    per_cent = np.array([[-1.0, 0.0499, 0.051, 0.999, 1.001, 1.999, 2.001]])
    gain_PG = -np.log1p(-per_cent / 100)
    assert shaped(gain_PG, shapes, ONE).tolist() == [[0.0, 0.0, 0.5, 0.5, 0.9, 0.9, 1.0]]
    at_edge = Buckets(kind="buckets", edges=(1.0,), values=(0.0, 1.0))(np.array([[1.0]]), ONE)
    assert at_edge.tolist() == [[1.0]]


def test_shapes_apply_in_their_order():
    reward_PG = np.array([[3.0, -3.0]])
    clip, double = Clip(kind="clip", limit=2.0), Scale(kind="scale", factor=2.0)
    assert shaped(reward_PG, (clip, double), ONE).tolist() == [[4.0, -4.0]]
    assert shaped(reward_PG, (double, clip), ONE).tolist() == [[2.0, -2.0]]


@pytest.mark.parametrize(
    ("edges", "values", "message"),
    [
        ((1.0, 0.5), (0.0, 1.0, 2.0), "must rise"),
        ((1.0,), (0.0,), "1 edges make 2 buckets; got 1 values"),
    ],
    ids=["falling", "too few"],
)
def test_buckets_that_make_no_sense_are_refused(edges, values, message):
    with pytest.raises(ValueError, match=message):
        Buckets(kind="buckets", edges=edges, values=values)
