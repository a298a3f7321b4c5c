"""Every document of the stream is trained as often as the configuration says, or dropped and counted: none twice, none
lost, in the order of the stream, whatever the configuration and the engine's pace."""

import math
from collections import Counter

import pytest

from rlpt.prompts import Stream


@pytest.fixture(scope="module")
def drawn(paced, stream: Stream) -> list:
    """Of drawn configurations, engines and steps."""
    found = []
    for seed in range(24):
        cfg, documents, pace = paced.drawn_config(seed)
        found.append(
            paced.Watched(stream, cfg, paced.stage_of(documents, 24), seed=seed, pace=pace).watch()
        )
    return found


def test_these_runs_drop_and_reuse_enough_to_be_worth_something(drawn) -> None:
    assert sum(run.dropped > 0 for run in drawn) >= 4
    assert {max(max(uses) for uses in run.uses) for run in drawn} == {0, 1, 2}
    assert {run.cfg.max_staleness for run in drawn} == {0, 1, 2, 3, 4}


def test_a_document_is_not_dispatched_waiting_trained_or_dropped(
    paced, stream: Stream, drawn: list
) -> None:
    keys = [paced.keys_at(stream, p) for p in range(max(run.supply.next for run in drawn))]
    for run in drawn:
        known: set[int] = set()
        gone: set[int] = set()
        for batch, uses, (cursor, waiting, kept) in zip(
            run.trained, run.uses, run.holds, strict=True
        ):
            fresh = {p for p, n in zip(batch.positions, uses, strict=True) if n == 0}
            assert not fresh & (known | gone)
            known |= fresh
            assert not waiting & (known | gone)
            assert kept <= known
            gone |= set(range(cursor)) - known - waiting
            assert len(known) + len(waiting) + len(gone) == cursor
        # What is gone was sampled and found too old; nothing was passed over.
        assert all(keys[position] <= run.asked for position in gone)


def test_first_trainings_are_in_the_order_of_the_stream(drawn) -> None:
    for run in drawn:
        assert run.first == sorted(set(run.first))


def test_every_step_has_its_documents_and_none_more_often_than_allowed(
    drawn,
) -> None:
    for run in drawn:
        documents = run.stage.documents_per_step
        assert all(len(each) == len(set(each)) == documents for each in run.positions)
        uses = Counter(position for each in run.positions for position in each)
        assert set(uses) == set(run.first)
        assert max(uses.values()) <= run.cfg.max_reuse


def test_nothing_is_dispatched_that_could_not_be_trained(drawn) -> None:
    for run in drawn:
        assert not run.supply.waiting
        assert not run.engine.open


def test_groups_trained_and_groups_dropped_are_all_that_were_asked_for(
    paced, stream: Stream, drawn: list
) -> None:
    count = [paced.num_groups(stream, p) for p in range(max(run.supply.next for run in drawn))]
    for run in drawn:
        assert run.trained_groups + run.dropped == sum(count[: run.supply.next])


def test_nothing_trained_is_older_than_allowed_and_nothing_younger_is_dropped(
    drawn,
) -> None:
    for run in drawn:
        for step, (batch, uses) in enumerate(zip(run.trained, run.uses, strict=True)):
            for lot, n in zip(batch.lots, uses, strict=True):
                limit = run.cfg.oldest_reused if n else run.cfg.max_staleness
                assert step - lot.oldest <= limit
        assert run.dropped == sum(age > run.cfg.max_staleness for age in run.ages)


def test_as_many_are_trained_again_as_leave_every_document_its_uses(drawn) -> None:
    for run in drawn:
        documents = run.stage.documents_per_step
        most = documents - math.ceil(documents / run.cfg.max_reuse)
        for uses, usable in zip(run.uses, run.usable, strict=True):
            assert sum(n > 0 for n in uses) == min(most, usable)
