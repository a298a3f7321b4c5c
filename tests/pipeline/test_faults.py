"""What is not finite is noted where it is found, replaced, and known to all ranks."""

from dataclasses import replace

import numpy as np
import pytest

from rlpt.dist import World
from rlpt.faults import Faults, solid
from rlpt.reward.base import Kit, PolicyScores
from rlpt.reward.likelihood import LikelihoodReward
from rlpt.types import Group, Markers, Prompt, Rollout, Scores, Trunk

MARKERS = Markers(90, 91)


def group(document: str, size: int = 2) -> Group:
    ids = np.arange(6)
    trunk = Trunk(document, "", 0, 30, ids, np.arange(7), (4,))
    thought = Rollout(
        *(np.array([7, 91]), np.array([True, True]), np.zeros(2, dtype=np.float32)),
        *(np.zeros(2, dtype=np.int64), 1, "closer"),
    )
    return Group(Prompt(trunk, 4, 2, ids[:4], ids[:4]), (thought,) * size)


GROUPS = [group("a"), group("b")]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_reward_is_named_by_document_cut_and_rollout(bad: float) -> None:
    faults = Faults()
    found = faults.rewards(np.array([[1.0, 2.0], [bad, 4.0]]), None, GROUPS)
    assert found.tolist() == [[1.0, 2.0], [0.0, 4.0]]
    assert faults.found == [f"the reward of document b, cut 34, rollout 0 is {bad}"]


def test_a_reward_that_does_not_count_is_no_fault() -> None:
    faults = Faults()
    kept_PG = np.array([[True, True], [False, True]])
    found = faults.rewards(np.array([[1.0, 2.0], [np.nan, 4.0]]), kept_PG, GROUPS)
    assert found.tolist() == [[1.0, 2.0], [0.0, 4.0]]
    assert faults.found == []


def test_finite_rewards_are_left_as_they_are_bit_for_bit() -> None:
    reward_PG = np.array([[-0.0, 1e-320], [-1e300, 0.1]])
    assert solid(reward_PG).tobytes() == reward_PG.tobytes()


def test_a_loss_is_named_by_its_documents() -> None:
    faults = Faults()
    faults.loss(0.5, ["a"])
    faults.loss(float("inf"), ["a"])
    faults.loss(float("nan"), ["b", "c", "d"])
    assert faults.found == [
        "the loss of document a is inf",
        "the loss of document b and 2 more is nan",
    ]


def test_all_ranks_know_what_one_found(on_ranks) -> None:
    def body(world: World) -> tuple[str, ...]:
        faults = Faults([f"fault {n}" for n in range(5)] if world.rank == 1 else [])
        return faults.everyones(world)

    expected = tuple(f"rank 1: {line}" for line in ("fault 0", "fault 1", "fault 2", "2 more"))
    assert on_ranks(3, body) == [expected] * 3
    assert on_ranks(2, lambda world: Faults().everyones(world)) == [(), ()]


SHAPES = {
    "none": {},
    "clip": {"shapes": ({"kind": "clip", "limit": 0.5},)},
    "relu": {"shapes": ({"kind": "relu", "threshold": -9.0},)},
    "rank": {"shapes": ({"kind": "rank"},)},
    "product": {"aggregate": "product", "baseline": "none"},
    "log_mean_exp": {"aggregate": "log_mean_exp", "baseline": "none"},
    "hardness_weighted": {"aggregate": "hardness_weighted", "baseline": "policy"},
}


def scored(logp: float) -> Scores:
    return Scores(np.full(2, logp, dtype=np.float32), np.zeros(2, dtype=np.int64))


@pytest.mark.parametrize("bad", [np.nan, -np.inf])
@pytest.mark.parametrize("name", SHAPES)
def test_no_shape_makes_an_ordinary_reward_of_an_impossible_continuation(name, bad) -> None:
    """Rollout 1 of the first prompt, and both of the second where its score without a thought is none."""
    reward = LikelihoodReward.model_validate(SHAPES[name]).build(Kit({}, MARKERS, centred=False))
    own = [scored(-1.0), scored(bad), scored(-1.5), scored(-0.5)]
    found = reward(GROUPS, PolicyScores(own, [scored(-2.0)] * 2))
    assert np.isnan(found.reward_PG).tolist() == [[False, True], [False, False]]
    assert np.isnan(found.detail["gain"]).tolist() == [[False, True], [False, False]]
    assert found.gold_PG is not None
    assert np.isfinite(found.gold_PG).all()
    found = reward(GROUPS, PolicyScores([scored(-1.0)] * 4, [scored(-2.0), scored(bad)]))
    assert np.isnan(found.reward_PG).tolist() == [[False, False], [True, True]]


def test_the_scores_of_other_rollouts_are_what_they_were() -> None:
    reward = LikelihoodReward().build(Kit({}, MARKERS, centred=False))
    own = [scored(-1.0), scored(-3.0), scored(-1.5), scored(-0.5)]
    policy = PolicyScores(own, [scored(-2.0), scored(-1.0)])
    whole = reward(GROUPS, policy).reward_PG
    assert whole.tolist() == [[1.0, -1.0], [-0.5, 0.5]]
    broken = reward(GROUPS, replace_score(policy, 1, np.nan)).reward_PG
    assert broken[~np.isnan(broken)].tolist() == [1.0, -0.5, 0.5]


def replace_score(policy: PolicyScores, at: int, value: float) -> PolicyScores:
    thought = list(policy.thought)
    thought[at] = replace(thought[at], logp=np.full(2, value, dtype=np.float32))
    return policy._replace(thought=thought)
