"""Steps of one rank, by hand: which documents they train, which they drop, and how old their tokens are."""

from collections.abc import Sequence

import pytest

from rlpt.lots import oldest
from rlpt.prompts import Stream, dealt_trunks, prompts_of
from rlpt.types import Group


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ({}, [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]),
        # Half of a step is fresh once there is something to train again.
        ({"max_reuse": 2}, [[0, 1], [2, 0], [3, 1], [4, 2], [5, 3]]),
        ({"max_reuse": 2, "max_age": 1}, [[0, 1], [2, 0], [3, 2], [4, 3], [5, 4]]),
        ({"max_reuse": 2, "max_age": 0}, [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]),
        ({"max_reuse": 3}, [[0, 1], [2, 0], [3, 0], [4, 1], [5, 1]]),
    ],
)
def test_steps_by_hand(paced, stream: Stream, table, expected) -> None:
    run = paced.Run(stream, paced.config(**table), paced.stage_of(2, 5)).go(0, 5)
    assert run.positions == expected


def test_dispatch_runs_ahead_by_so_many_steps_and_stops_before_the_end(
    paced, stream: Stream
) -> None:
    run = paced.Run(stream, paced.config(max_staleness=3, ahead=2), paced.stage_of(2, 6))
    reached: list[int] = []
    run.go(0, 6, lambda: reached.append(run.supply.next))
    assert reached == [6, 8, 10, 12, 12, 12]
    assert run.positions == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [10, 11]]


def test_a_fast_engine_too_far_ahead_is_dropped_and_made_up_for(paced, stream: Stream) -> None:
    """A group of version 0 is two old at step 2, where one may be: all waiting ones go, and fresh ones come."""
    run = paced.Run(
        stream, paced.config(max_staleness=1, ahead=2), paced.stage_of(1, 4), pace=paced.TOKENS
    )
    run.engine.draw = type("Always", (), {"integers": lambda *_: paced.TOKENS})()
    reached: list[int] = []
    run.go(0, 4, lambda: reached.append(run.supply.next))
    # Step 0 dispatches 0, 1, 2. Step 1 trains 1 and dispatches 3. Step 2 finds 2 of version 0 and 3 of version 1.
    assert run.positions == [[0], [1], [3], [4]]
    assert reached == [3, 4, 4, 5]
    assert run.dropped == paced.num_groups(stream, 2)


def test_strictly_on_policy_steps_are_what_they_always_were(paced, stream: Stream) -> None:
    run = paced.Run(stream, paced.config(), paced.stage_of(6, 5)).go(0, 5)
    for step, batch in enumerate(run.trained):
        places = range(6 * step, 6 * step + 6)
        _, trunks = dealt_trunks(stream, places, paced.CFG, paced.SEED, 20, paced.alone())
        prompts = [
            prompt for trunk in trunks for prompt in prompts_of(trunk, paced.CFG, paced.MARKERS)
        ]
        assert batch.positions == list(range(6 * step, 6 * step + 6))
        assert [group.prompt.key for group in batch.groups] == [each.key for each in prompts]
        for group, prompt in zip(batch.groups, prompts, strict=True):
            assert group.prompt.policy_ids.tolist() == prompt.policy_ids.tolist()
        assert batch.sums["staleness/worst"][0] == 0.0
    assert run.supply.next == 30


def test_ages_are_of_tokens_and_of_groups(paced, stream: Stream) -> None:
    run = paced.Run(stream, paced.config(max_staleness=4, ahead=0), paced.stage_of(1, 9))
    given = {0: [[7, 7, 8], [8]], 1: [[5, 9], [9]]}

    def collect(tickets: Sequence[str]) -> list[Group]:
        found = []
        for n, ticket in enumerate(tickets):
            prompt = run.engine.open.pop(ticket)[0]
            found.append(Group(prompt, tuple(paced.rollout(v, 0) for v in given[n % 2])))
        return found

    run.engine.collect = collect
    run.supply.next = next(p for p in range(99) if paced.num_groups(stream, p) == 2)
    sums = run.supply.take(9, 1).sums
    # Ages 2 2 1 1 and 4 0 0.
    assert sums["staleness/mean"] == (10.0, 7.0)
    assert sums["staleness/newest"] == (1.0 + 0.0, 2.0)
    assert sums["staleness/worst"] == (2.0 + 4.0, 2.0)
    assert sums["staleness/dropped_groups"][0] == 0.0


def test_a_document_some_of_whose_groups_are_too_old_is_trained_without_them(
    paced,
    stream: Stream,
) -> None:
    run = paced.Run(stream, paced.config(max_staleness=3, ahead=0), paced.stage_of(1, 9))
    ages = iter([3, 4])

    def collect(tickets: Sequence[str]) -> list[Group]:
        prompts = [run.engine.open.pop(ticket)[0] for ticket in tickets]
        # The oldest token is neither the first nor the first rollout's.
        return [
            Group(p, (paced.rollout([9], 1), paced.rollout([9, 9 - next(ages)], 0)))
            for p in prompts
        ]

    run.engine.collect = collect
    run.supply.next = position = next(p for p in range(99) if paced.num_groups(stream, p) == 2)
    batch = run.supply.take(9, 1)
    assert batch.positions == [position]
    assert [oldest(group) for group in batch.groups] == [6]
    assert batch.sums["staleness/dropped_groups"][0] == 1.0


def test_the_end_of_a_stage_cancels_what_is_under_way(paced, stream: Stream) -> None:
    run = paced.Run(stream, paced.config(max_staleness=2), paced.stage_of(3, 9)).go(0, 4)
    assert len(run.engine.open) == sum(paced.num_groups(stream, p) for p in range(12, 18))
    run.supply.close()
    assert not run.engine.open
    assert run.supply.rows() == []
