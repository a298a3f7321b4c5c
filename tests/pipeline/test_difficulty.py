"""Ratings by hand; documents too easy or too hard are passed over, counted and reviewed, alike on every rank."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch

from rlpt import dist
from rlpt.curriculum import DifficultyWindow, DynamicSampling
from rlpt.lots import Lot, lot_of, lot_row
from rlpt.pool import Mark, Pool, Rating
from rlpt.prompts import Stream, prompts_of, trunk_at
from rlpt.reward.base import Rewarded
from rlpt.reward.match import MatchReward
from rlpt.stages import RLStage
from rlpt.types import Group, Prompt, Trunk
from rlpt_data.strict import UserError

ALONE = dist.World(0, 1, torch.device("cpu"))
WINDOW = DifficultyWindow(low=0.25, high=0.75, decay=0.5, review_every=3)


def _trunk(document: str, epoch: int, cuts: tuple[int, ...] = (4,)) -> Trunk:
    return Trunk(document, "", epoch, 10, np.arange(8), np.arange(9), cuts)


def _pool(window: DifficultyWindow | None, at: float | None = None) -> Pool:
    return Pool(DynamicSampling(kind="dynamic", no_positive_resampling=at), window, ALONE)


def _count(pool: Pool, name: str) -> float:
    value, count = pool.sums()[name]
    return value / count


def test_a_rating_is_a_running_mean() -> None:
    """0, then 1: 0.5; then 0 again: 0.25 (decay a half); with decay 0.8: 0.2, 0.16."""
    for decay, expected in ((0.5, [0.0, 0.5, 0.25]), (0.8, [0.0, 0.2, 0.16])):
        pool = _pool(WINDOW.model_copy(update={"decay": decay}))
        for epoch, mean in enumerate((0.0, 1.0, 0.0)):
            pool.marks = [Mark(epoch, "a", 14, mean)]
            pool.merge()
            found = pool.documents.known["a"]
            assert (found.mean, found.epoch) == (pytest.approx(expected[epoch]), epoch)


def test_marks_of_one_step_count_in_the_order_of_their_epochs_whichever_rank_had_them() -> None:
    """1 in epoch 0, then 0 in epoch 1, with decay 0.8; noted the other way round."""
    pool = _pool(WINDOW.model_copy(update={"decay": 0.8}))
    pool.marks = [Mark(1, "a", 14, 0.0), Mark(0, "a", 14, 1.0)]
    pool.merge()
    assert pool.documents.known["a"] == Rating(0.8, 1)


def test_documents_outside_the_window_are_passed_over_until_their_review() -> None:
    pool = _pool(WINDOW)
    pool.documents.known = {
        "easy": Rating(0.8, 2), "hard": Rating(0.2, 2), "low": Rating(0.25, 2), "high": Rating(0.75, 2),
    }  # fmt: skip
    for epoch in (2, 3, 4):
        due = [n for n in ("easy", "hard", "low", "high", "new") if pool.is_due(_trunk(n, epoch))]
        assert due == ["low", "high", "new"]
        sums = {name: value / count for name, (value, count) in pool.sums().items()}
        assert (sums["difficulty/easy"], sums["difficulty/hard"]) == (1.0, 1.0)
        assert (sums["difficulty/reviewed"], sums["difficulty/rated"]) == (0.0, 4.0)
    assert pool.is_due(_trunk("easy", 5))
    assert pool.is_due(_trunk("hard", 5))
    assert _count(pool, "difficulty/reviewed") == 2.0


def test_what_is_too_hard_is_not_counted_as_easy() -> None:
    pool = _pool(WINDOW)
    pool.documents.known = {"a": Rating(0.2, 0), "b": Rating(0.8, 0), "c": Rating(0.9, 0)}
    assert [name for name in "abc" if pool.is_due(_trunk(name, 1))] == []
    sums = pool.sums()
    assert (sums["difficulty/hard"][0], sums["difficulty/easy"][0]) == (1.0, 2.0)
    assert all(name.startswith("difficulty/") for name in sums)


def test_a_group_is_rated_once_by_the_mean_of_its_rewards_that_count() -> None:
    """The first was trained before, of the second one counts, of the third none."""
    ids, pool = np.arange(5), _pool(WINDOW)
    groups = [Group(Prompt(_trunk(name, 1), 4, 2, ids, ids), ()) for name in "abcd"]
    reward_PG = np.array([[1.0, 3.0], [1.0, 9.0], [5.0, 5.0], [2.0, 4.0]])
    kept_PG = np.array([[1, 1], [1, 0], [0, 0], [1, 1]], dtype=bool)
    pool.rate(groups, Rewarded(reward_PG, {}, kept_PG=kept_PG), [False, True, True, True])
    assert pool.marks == [Mark(1, "b", 14, 1.0), Mark(1, "d", 14, 3.0)]
    pool.rate(groups[:1], Rewarded(reward_PG[:1], {}))
    assert pool.marks[2:] == [Mark(1, "a", 14, 2.0)]


def test_a_pool_says_whether_it_looks_and_how_long_it_may_find_nothing() -> None:
    """One epoch; with a window, as many more as pass before a review."""
    pools = (_pool(None), _pool(None, at=0.9), _pool(WINDOW))
    assert [pool.looks for pool in pools] == [False, True, True]
    assert [pool.longest_wait for pool in pools] == [1, 1, 4]


def test_the_quantile_of_a_document_is_its_place_among_the_rated() -> None:
    window = DifficultyWindow(low=0.25, high=0.75, signal="gain_quantile")
    pool = _pool(window)
    pool.marks = [
        Mark(0, name, 14, mean) for name, mean in zip("abcde", (-3, -1, 0, 2, 9), strict=True)
    ]
    pool.merge()
    restored = _pool(window)
    restored.restore(pool.rows())
    for each in (pool, restored):
        assert [name for name in "abcde" if each.is_due(_trunk(name, 0))] == ["b", "c", "d"]
        assert _count(each, "difficulty/hard") == 1.0


def test_quantiles_of_one_and_of_two_documents_are_their_ends() -> None:
    pool = _pool(DifficultyWindow(low=0.0, high=0.9, signal="gain_quantile"))
    pool.marks = [Mark(0, "a", 14, 5.0)]
    pool.merge()
    assert pool.is_due(_trunk("a", 0))
    pool.marks = [Mark(0, "b", 14, 7.0)]
    pool.merge()
    assert [name for name in "ab" if pool.is_due(_trunk(name, 0))] == ["a"]


def test_prompts_that_are_always_right_are_not_asked_for_again() -> None:
    pool = _pool(None, at=0.9)
    pool.marks = [Mark(0, "a", 14, 0.95), Mark(0, "b", 14, 0.85), Mark(0, "b", 16, 1.0)]
    pool.merge()
    assert not pool.is_due(_trunk("a", 7))
    assert pool.left(_trunk("b", 7, (4, 6))).cuts == (4,)
    assert pool.is_due(_trunk("b", 7, (4, 6)))
    assert pool.is_due(_trunk("a", 7, (5,)))
    sums = {name: value / count for name, (value, count) in pool.sums().items()}
    assert sums == {"sampling/retired_documents": 1.0, "sampling/retired_cuts": 2.0}
    # Half right and half wrong: 1.0, then 0.8 -> 0.9, then 0 -> 0.45.
    for mean, due in ((0.8, False), (0.0, True)):
        pool.marks = [Mark(1, "b", 16, mean)]
        pool.merge()
        assert pool.is_due(_trunk("b", 8, (6,))) == due


# ---- with a supply ---------------------------------------------------------------------------------


def _worth(key: tuple[int, str, int]) -> float:
    """Of a document: 0, 0.5 or 1."""
    return int(key[1][-1], 16) % 3 / 2


def reward(groups: Sequence[Group]) -> Rewarded:
    # 0 and 0, 0 and 1, 1 and 1.
    rows = [[float(_worth(g.prompt.key) == 1.0), float(_worth(g.prompt.key) > 0)] for g in groups]
    return Rewarded(np.array(rows).reshape(-1, 2), {})


@pytest.fixture
def short(stream: Stream) -> Stream:
    """Twelve documents an epoch."""
    return Stream(stream.split, stream.seed, stream.purpose, stream.usable[:12].tolist())


def _stage(paced, steps: int, **changes) -> RLStage:
    return paced.stage_of(4, steps).model_copy(update={"difficulty": WINDOW} | changes)


def _of(stream: Stream, position: int) -> float:
    return _worth((0, stream.at(position)[1].document_id, 0))


def test_every_position_is_trained_or_counted_and_what_is_outside_comes_back(
    paced, short: Stream
) -> None:
    run = paced.Run(short, paced.config(), _stage(paced, 24), reward=reward).go(0, 24)
    trained = [p for each in run.positions for p in each]
    assert trained == sorted(set(trained))
    skipped = sorted(set(range(run.supply.next)) - set(trained))
    sums = [batch.sums for batch in run.trained]
    for name, worth in (("easy", 1.0), ("hard", 0.0)):
        told = sum(each[f"difficulty/{name}"][0] for each in sums)
        assert told == sum(_of(short, p) == worth for p in skipped) > 0
    # All of the first epoch, then only what is inside, then all again.
    by_epoch = [{p % 12 for p in trained if p // 12 == epoch} for epoch in range(8)]
    inside = [
        sum(_of(short, p) == 0.5 for p in range(12 * epoch, 12 * epoch + 12)) for epoch in range(8)
    ]
    assert 0 < inside[0] < 12
    assert [len(each) for each in by_epoch[:7]] == [
        12,
        inside[1],
        inside[2],
        12,
        inside[4],
        inside[5],
        12,
    ]
    assert sum(each["difficulty/reviewed"][0] for each in sums) > 0


@pytest.mark.parametrize("screened", [False, True], ids=["rated by the step", "rated by sampling"])
def test_a_run_cut_off_passes_over_the_same_documents(paced, short: Stream, screened) -> None:
    sampling = DynamicSampling(kind="dynamic", rounds=1, no_positive_resampling=0.9)
    stage = _stage(paced, 12, sampling=sampling if screened else None)
    whole = paced.Run(short, paced.config(), stage, reward=reward).go(0, 12)
    for at in (3, 7):
        first = paced.Run(short, paced.config(), stage, reward=reward).go(0, at)
        second = paced.Run(short, paced.config(), stage, reward=reward)
        second.engine.version = at
        second.supply.restore(first.rows(), first.supply.next, "test")
        second.go(at, 12)
        assert first.positions + second.positions == whole.positions
        assert second.supply.pool.documents.known == whole.supply.pool.documents.known
        assert second.supply.pool.prompts.known == whole.supply.pool.prompts.known
    assert bool(whole.supply.pool.prompts.known) == screened


def test_ratings_are_the_same_on_every_rank_and_on_any_number(
    paced, short: Stream, on_ranks: Callable
) -> None:
    stage = _stage(paced, 8)

    def body(world: dist.World):
        return paced.Run(short, paced.config(), stage, world, reward=reward).go(0, 8)

    (one,), two = on_ranks(1, body), on_ranks(2, body)
    known = [run.supply.pool.documents.known for run in (one, *two)]
    assert known[0] == known[1] == known[2]
    assert {run.supply.next for run in two} == {one.supply.next}
    # One rank saves them, every rank takes them.
    rows = [row for run in two for row in run.rows()]
    assert sum(row["place"] == "rated" for row in rows) == len(known[0])
    next_run = paced.Run(short, paced.config(), stage, reward=reward)
    next_run.supply.restore(rows, one.supply.next, "test")
    assert next_run.supply.pool.documents.known == known[0]


def test_a_group_that_is_trained_again_is_not_rated_again(paced, short: Stream) -> None:
    cfg = paced.config(max_reuse=2)
    # Each rating is 0 and then, had the same groups counted twice, more.
    run = paced.Run(short, cfg, _stage(paced, 4), reward=reward)
    once: list[int] = []
    add = run.supply.pool.documents.add
    run.supply.pool.documents.add = lambda *mark: (once.append(1), add(*mark))[1]
    run.go(0, 4)
    assert sum(map(sum, run.uses)) > 0
    assert len(once) == run.trained_groups


def test_retired_cuts_of_a_document_with_others_are_not_sampled(paced, short: Stream) -> None:
    stage = paced.stage_of(4, 3).model_copy(
        update={"sampling": DynamicSampling(kind="dynamic", rounds=0, no_positive_resampling=0.9)}
    )
    run = paced.Run(short, paced.config(), stage, reward=reward)
    keys = [key for p in range(12) for key in paced.keys_at(short, p)]
    retired = {key for key in keys if keys.index(key) % 2}
    run.supply.pool.prompts.known = {f"{k[1]}@{k[2]}": Rating(1.0, 0) for k in retired}
    run.go(0, 2)
    trained = {group.prompt.key for batch in run.trained for group in batch.groups}
    assert trained
    assert not trained & retired
    assert any(len(paced.keys_at(short, p)) > 1 for each in run.positions for p in each)


def test_what_waits_comes_back_without_its_retired_cuts(paced, short: Stream) -> None:
    position = next(p for p in range(12) if paced.num_groups(short, p) == 2)
    every = prompts_of(trunk_at(short, position, paced.CFG, paced.SEED), paced.CFG, paced.MARKERS)
    row = lot_row(Lot(position, every[1:]), "waiting")
    found = lot_of(row, short, paced.CFG, paced.MARKERS, paced.SEED, "test")
    assert [prompt.key for prompt in found.prompts] == [every[1].key]


def test_a_stage_without_any_document_inside_ends_with_a_line(paced, short: Stream) -> None:
    def always(groups: Sequence[Group]) -> Rewarded:
        return Rewarded(np.ones((len(groups), 2)), {})

    sampling = DynamicSampling(kind="dynamic", rounds=0, no_positive_resampling=0.9)
    stage = paced.stage_of(4, 400).model_copy(update={"sampling": sampling})
    cut_once = short.split[int(short.usable[0])]
    assert len(cut_once.cuts)
    run = paced.Run(short, paced.config(), stage, reward=always)
    with pytest.raises(UserError, match=r"stage rl: every document is passed over"):
        run.go(0, 400)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"difficulty": {"low": 0.2, "high": 0.8}}, "reward likelihood has a sign and so no pass rate"),
        ({"difficulty": {"low": 0.8, "high": 0.2}}, "difficulty.low = 0.8 must be below"),
        ({"difficulty": {"low": -1.0, "high": 0.2, "signal": "gain_quantile"}}, "quantiles are from 0"),
    ],
    ids=["signed", "empty", "quantile"],
)  # fmt: skip
def test_windows_that_cannot_hold_anything_are_refused(changes: dict, line: str) -> None:
    table = {"kind": "rl", "name": "rl", "steps": 2, "documents_per_step": 2}
    with pytest.raises(ValueError, match=line):
        RLStage.model_validate(table | changes)


def test_a_baseline_that_cancels_in_advantages_counts_in_ratings() -> None:
    table = {"kind": "rl", "name": "rl", "steps": 2, "documents_per_step": 2}
    window = {"low": 0.2, "high": 0.8, "signal": "gain_quantile"}
    assert RLStage.model_validate(table).cancels_baselines
    assert not RLStage.model_validate(table | {"difficulty": window}).cancels_baselines
    RLStage.model_validate(
        table | {"reward": MatchReward(kind="match"), "difficulty": {"low": 0.2, "high": 0.8}}
    )
