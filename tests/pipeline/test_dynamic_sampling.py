"""Groups whose rewards agree make room for fresh documents: counted, in order, the same after a resume."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from rlpt.curriculum import DynamicSampling
from rlpt.prompts import Stream
from rlpt.reward.base import Rewarded
from rlpt.reward.match import MatchReward
from rlpt.screen import apart
from rlpt.stages import RLStage
from rlpt.types import Group


def _agrees(key: tuple[int, str, int]) -> bool:
    return int(key[1][-1], 16) % 2 == 0


def reward(groups: Sequence[Group]) -> Rewarded:
    """0 and 1 in half of the documents, 1 and 1 in the others."""
    rows = [[1.0 if _agrees(g.prompt.key) else 0.0, 1.0] for g in groups]
    return Rewarded(np.array(rows).reshape(-1, 2), {})


def _stage(paced, steps: int, **table) -> RLStage:
    sampling = DynamicSampling(kind="dynamic", **table)
    return paced.stage_of(4, steps).model_copy(update={"sampling": sampling})


def _total(runs, name: str) -> float:
    """What the log would say: sums over ranks and steps, each divided by its count."""
    return sum(
        sum(each.sums[name][0] for each in step) / sum(each.sums[name][1] for each in step)
        for step in zip(*(run.trained for run in runs), strict=True)
    )


def test_documents_that_agree_are_not_trained_and_the_others_are_in_order(
    paced, stream: Stream
) -> None:
    run = paced.Run(stream, paced.config(), _stage(paced, 8, rounds=40), reward=reward).go(0, 8)
    differing = [p for p in range(200) if not _agrees(next(iter(paced.keys_at(stream, p))))]
    assert [p for step in run.positions for p in step] == differing[:32]
    assert run.supply.next > differing[31]
    asked = sum(paced.num_groups(stream, p) for p in range(run.supply.next))
    # Whatever was asked for was trained, thrown away, or waits for another step.
    waiting = sum(len(lot.prompts) for lot in run.supply.waiting)
    thrown = _total([run], "sampling/rollouts_thrown") / 2
    assert _total([run], "sampling/rollouts_sampled") / 2 == asked - waiting
    assert run.trained_groups + thrown + waiting == asked
    assert thrown == sum(
        paced.num_groups(stream, p) for p in range(differing[31]) if p not in differing
    )
    assert _total([run], "sampling/filled_groups") == 0


def test_after_its_rounds_a_step_is_filled_with_what_agrees(paced, stream: Stream) -> None:
    def alike(groups: Sequence[Group]) -> Rewarded:
        return Rewarded(np.ones((len(groups), 2)), {})

    run = paced.Run(stream, paced.config(), _stage(paced, 3, rounds=2), reward=alike).go(0, 3)
    # Three askings of 4 a step, of which the first are trained.
    assert run.positions == [[0, 1, 2, 3], [12, 13, 14, 15], [24, 25, 26, 27]]
    filled = sum(paced.num_groups(stream, p) for each in run.positions for p in each)
    assert _total([run], "sampling/filled_groups") == filled
    none = paced.Run(stream, paced.config(), _stage(paced, 3, rounds=0), reward=reward).go(0, 3)
    assert none.positions == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert _total([none], "sampling/rollouts_thrown") == 0


def test_of_a_document_with_several_cuts_the_groups_that_differ_stay(paced, stream: Stream) -> None:
    def by_cut(groups: Sequence[Group]) -> Rewarded:
        rows = [[0.0, float(g.prompt.cut == g.prompt.trunk.cuts[-1])] for g in groups]
        return Rewarded(np.array(rows).reshape(-1, 2), {})

    run = paced.Run(stream, paced.config(), _stage(paced, 2), reward=by_cut).go(0, 2)
    assert run.positions == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert any(len(lot.prompts) == 2 for batch in run.trained for lot in batch.lots)
    for group in (group for batch in run.trained for group in batch.groups):
        assert group.prompt.cut == group.prompt.trunk.cuts[-1]


def test_rollouts_that_do_not_count_make_no_difference() -> None:
    reward_PG = np.array([[0.0, 1.0, 1.0], [1.0, 1.0, 1.0], [0.0, 0.0, 1.0]])
    assert apart(Rewarded(reward_PG, {})).tolist() == [True, False, True]
    kept_PG = np.array([[False, True, True], [True, True, True], [True, True, True]])
    assert apart(Rewarded(reward_PG, {}, kept_PG=kept_PG)).tolist() == [False, False, True]
    none = np.zeros_like(kept_PG)
    assert apart(Rewarded(reward_PG, {}, kept_PG=none)).tolist() == [False] * 3


@pytest.mark.parametrize("table", [{}, {"max_staleness": 3, "ahead": 2}], ids=["at once", "ahead"])
def test_a_run_cut_off_goes_on_with_the_same_documents(paced, stream: Stream, table) -> None:
    cfg, stage = paced.config(**table), _stage(paced, 9, rounds=40)
    whole = paced.Run(stream, cfg, stage, reward=reward).go(0, 9)
    for at in (1, 5):
        first = paced.Run(stream, cfg, stage, reward=reward).go(0, at)
        second = paced.Run(stream, cfg, stage, reward=reward)
        second.engine.version = at
        second.supply.restore(first.rows(), first.supply.next, "test")
        second.go(at, 9)
        assert first.positions + second.positions == whole.positions
        assert second.supply.next == whole.supply.next


def test_ranks_ask_equally_often_and_share_every_position(
    paced, stream: Stream, on_ranks: Callable
) -> None:
    stage = _stage(paced, 10, rounds=40)
    two = on_ranks(
        2, lambda world: paced.Run(stream, paced.config(), stage, world, reward=reward).go(0, 10)
    )
    assert two[0].supply.next == two[1].supply.next
    trained = [p for run in two for each in run.positions for p in each]
    waiting = [lot.position for run in two for lot in run.supply.waiting]
    assert len(trained) == len(set(trained)) == 40
    assert not set(trained) & set(waiting)
    asked = sum(paced.num_groups(stream, p) for p in range(two[0].supply.next))
    thrown = _total(two, "sampling/rollouts_thrown") / 2
    kept = sum(run.trained_groups for run in two)
    assert (
        kept + thrown + sum(len(lot.prompts) for run in two for lot in run.supply.waiting) == asked
    )
    keys = {p: next(iter(paced.keys_at(stream, p))) for p in trained}
    assert not any(_agrees(key) for key in keys.values())


def test_rewards_that_need_a_forward_cannot_be_looked_at_before_the_step() -> None:
    table = {"kind": "rl", "name": "rl", "steps": 2, "documents_per_step": 2}
    sampling = DynamicSampling(kind="dynamic")
    with pytest.raises(ValueError, match=r"reward likelihood needs forwards of its own"):
        RLStage(**table, sampling=sampling)
    RLStage(**table, sampling=sampling, reward=MatchReward(kind="match"))
