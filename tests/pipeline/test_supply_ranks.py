"""Ranks share every document among them exactly once, and a checkpoint moves it to exactly one rank of the next run."""

import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest

from rlpt import dist
from rlpt.prompts import Stream
from rlpt.types import Group


@pytest.mark.parametrize("seed", range(10))
def test_a_run_that_is_cut_off_goes_on_with_the_same_documents(
    paced, stream: Stream, seed: int
) -> None:
    cfg, documents, _ = paced.drawn_config(seed)
    stage = paced.stage_of(documents, 16)
    # An engine that samples at the last moment: what is under way does not age.
    whole = paced.Run(stream, cfg, stage).go(0, 16)
    for at in (1, 9):
        first = paced.Run(stream, cfg, stage).go(0, at)
        second = paced.Run(stream, cfg, stage)
        second.engine.version = at
        second.supply.restore(first.rows(), first.supply.next, "test")
        second.go(at, 16)
        assert first.positions + second.positions == whole.positions
        assert first.uses + second.uses == whole.uses
        assert second.supply.next == whole.supply.next
        for mine, known in zip(second.trained, whole.trained[at:], strict=True):
            assert list(map(paced.versions_of, mine.groups)) == list(
                map(paced.versions_of, known.groups)
            )


def together(runs: Sequence, step: int) -> list[int]:
    return sorted(p for run in runs for p in run.trained[step].positions)


@pytest.mark.parametrize("table", [{}, {"max_staleness": 2}, {"max_reuse": 2}, {"max_reuse": 3}])
def test_two_ranks_train_the_documents_of_one_step_by_step(
    paced, stream: Stream, on_ranks, table
) -> None:
    cfg, stage = paced.config(**table), paced.stage_of(4, 12)
    (one,) = on_ranks(1, lambda world: paced.Run(stream, cfg, stage, world).go(0, 12))
    two = on_ranks(2, lambda world: paced.Run(stream, cfg, stage, world).go(0, 12))
    # With replay each rank trains its own documents again: the fresh ones are the same.
    for step in range(12) if cfg.max_reuse == 1 else (0,):
        assert together(two, step) == sorted(one.positions[step])
    fresh = sorted(position for run in two for position in run.first)
    assert fresh == list(range(two[0].supply.next)) == list(range(two[1].supply.next))
    assert all(len(each) == 2 for run in two for each in run.positions)
    uses = Counter(p for run in two for each in run.positions for p in each)
    assert max(uses.values()) == cfg.max_reuse


@pytest.mark.parametrize("seed", range(8))
def test_ranks_share_every_document_among_them_exactly_once(
    paced, stream: Stream, on_ranks, seed: int
) -> None:
    cfg, documents, pace = paced.drawn_config(seed)
    stage = paced.stage_of(2 * documents, 20)
    two = on_ranks(
        2, lambda world: paced.Run(stream, cfg, stage, world, seed + world.rank, pace).go(0, 20)
    )
    first = [position for run in two for position in run.first]
    waiting = [lot.position for run in two for lot in run.supply.waiting]
    assert len(set(first + waiting)) == len(first) + len(waiting)
    assert set(first + waiting) <= set(range(two[0].supply.next))
    assert two[0].supply.next == two[1].supply.next
    kept = sum(run.trained_groups for run in two)
    open_groups = sum(len(lot.prompts) for run in two for lot in run.supply.waiting)
    told = sum(run.dropped for run in two)
    every = sum(paced.num_groups(stream, p) for p in range(two[0].supply.next))
    assert kept + told + open_groups == every
    if not told:
        assert not waiting
    for run in two:
        assert run.first == sorted(run.first)
        assert all(len(each) == documents for each in run.positions)


def test_a_rank_whose_groups_are_too_old_gets_others_and_the_other_rank_waits(
    paced, stream: Stream, on_ranks
) -> None:
    """The engine of rank 0 samples two steps ahead, where one is allowed; that of rank 1 at the last moment."""
    cfg, stage = paced.config(max_staleness=1, ahead=2), paced.stage_of(4, 10)

    def body(world: dist.World) -> Any:
        run = paced.Run(stream, cfg, stage, world, pace=paced.TOKENS)
        steps = paced.TOKENS if world.rank == 0 else 0
        run.engine.draw = type("Steady", (), {"integers": lambda *_: steps})()
        return run.go(0, 10)

    fast, slow = on_ranks(2, body)
    assert fast.dropped > 0
    assert slow.dropped == 0
    for run in (fast, slow):
        assert all(len(each) == 2 for each in run.positions)
        assert run.first == sorted(run.first)
    waiting = [lot.position for run in (fast, slow) for lot in run.supply.waiting]
    known = sorted(fast.first + slow.first + waiting)
    assert len(known) == len(set(known))
    lost = set(range(fast.supply.next)) - set(known)
    assert fast.supply.next == slow.supply.next
    assert sum(paced.num_groups(stream, position) for position in lost) == fast.dropped


def test_a_rank_that_loses_all_its_groups_in_a_step_is_given_others_in_that_step(
    paced, stream: Stream, on_ranks
) -> None:
    """What rank 0 collects first is two versions old; nothing is left in its hands."""
    cfg, stage = paced.config(max_staleness=1, ahead=0), paced.stage_of(4, 10)

    def body(world: dist.World) -> Any:
        run = paced.Run(stream, cfg, stage, world)
        collect, calls = run.engine.collect, itertools.count()

        def collected(tickets: Sequence[str]) -> list[Group]:
            found, old = collect(tickets), world.rank == 0 and next(calls) == 0
            aged = (paced.rollout([run.engine.version - 2] * paced.TOKENS, 0),)
            return [Group(group.prompt, aged) for group in found] if old else found

        run.engine.collect = collected
        return run.go(0, 3)

    first, other = on_ranks(2, body)
    lost = set(range(4)) - set(other.positions[0])
    assert first.dropped == sum(paced.num_groups(stream, position) for position in lost)
    assert other.dropped == 0
    # Four more were dispatched for both at once; rank 1 trains its two in the step after.
    assert set(first.positions[0]) <= set(range(4, 8))
    assert set(other.positions[1]) == set(range(4, 8)) - set(first.positions[0])
    assert len(first.positions[1]) == len(other.positions[2]) == 2


def lots_of(rows: Sequence[dict]) -> list[tuple]:
    return sorted((row["place"], row["position"], row["uses"]) for row in rows)


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (2, 2), (3, 2), (1, 1)])
@pytest.mark.parametrize("table", [{"max_staleness": 3, "max_reuse": 3}, {"max_staleness": 1}])
def test_a_checkpoint_moves_every_document_to_exactly_one_rank(
    paced, stream: Stream, on_ranks, before: int, after: int, table
) -> None:
    cfg, stage = paced.config(**table), paced.stage_of(6, 20)
    runs = on_ranks(before, lambda world: paced.Run(stream, cfg, stage, world, 1, 3).go(0, 8))
    rows = [row for run in runs for row in run.rows()]
    cursor = runs[0].supply.next
    groups = {row["position"]: row["groups"] for row in rows}

    def resumed(world: dist.World) -> tuple:
        run = paced.Run(stream, cfg, stage, world)
        run.engine.version = 8
        run.supply.restore(rows, cursor, "test")
        held = run.rows()
        assert all(row["groups"] == groups[row["position"]] for row in held)
        # Thoughts under way are asked for again, by the rank that has the document.
        asked = sum(
            paced.num_groups(stream, r["position"]) for r in held if r["place"] == "waiting"
        )
        assert len(run.engine.open) == asked
        return lots_of(held), run.go(8, 20)

    found = on_ranks(after, resumed)
    assert sorted(lot for lots, _ in found for lot in lots) == lots_of(rows)
    # And goes on: nothing that was trained comes as fresh again, nothing is left out. A rank that got one less has one
    # dispatched more, and so has the other; the stage may end before its turn.
    known = [p for run in runs for p in run.first]
    later = [p for _, run in found for p in run.first]
    spare = [lot.position for _, run in found for lot in run.supply.waiting]
    assert len(spare) < after
    assert sorted(known + later + spare) == list(range(found[0][1].supply.next))
    uses = Counter(
        p for run in [*runs, *(r for _, r in found)] for each in run.positions for p in each
    )
    assert max(uses.values()) <= cfg.max_reuse
