"""Every document of the stream is trained as often as the configuration says, or dropped and counted: none twice, none
lost, in the order of the stream, whatever the engine's pace and the number of ranks."""

import itertools
import math
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import pytest
import torch

from rlpt import dist
from rlpt.config import PromptConfig
from rlpt.engines import RolloutConfig
from rlpt.prompts import Stream, dealt_trunks, prompt_stream, prompts_of
from rlpt.rollout.records import packed, unpacked
from rlpt.stages import RLStage
from rlpt.supply import Batch, Supply, oldest
from rlpt.types import Group, Markers, Prompt, Rollout
from rlpt_data.shards import ShardFolder

MARKERS = Markers(320, 321)
CFG = PromptConfig(context_tokens=24, min_context_tokens=6, horizon_tokens=5, cuts_per_document=2)
SEED, TOKENS = 3, 4


class PacedEngine:
    """Between two publications every open group grows by up to ``pace`` tokens, of the version of the time."""

    dtype = "float32"
    is_reference = False

    def __init__(self, seed: int, pace: int) -> None:
        self.version = -1
        self.draw = np.random.default_rng(seed)
        self.pace = pace
        self.open: dict[str, tuple[Prompt, int, list[int]]] = {}
        self.names = itertools.count()

    def submit(self, prompts: Sequence[Prompt], group_size: int, purpose: str) -> list[str]:
        assert purpose == "rollout/rl"
        tickets = [f"{id(self)}/{next(self.names)}" for _ in prompts]
        for ticket, prompt in zip(tickets, prompts, strict=True):
            self.open[ticket] = (prompt, group_size, [])
        return tickets

    def collect(self, tickets: Sequence[str]) -> list[Group]:
        found = []
        for ticket in tickets:
            prompt, group_size, versions = self.open.pop(ticket)
            versions += [self.version] * (TOKENS - len(versions))
            found.append(Group(prompt, tuple(rollout(versions, g) for g in range(group_size))))
        return found

    def cancel(self, tickets: Sequence[str]) -> None:
        for ticket in tickets:
            del self.open[ticket]

    def publish(self, named_tensors, version: int) -> None:
        for _, _, versions in self.open.values():
            more = int(self.draw.integers(0, self.pace + 1))
            versions += [self.version] * min(more, TOKENS - len(versions))
        self.version = version

    def rest(self) -> None: ...

    def counters(self) -> dict[str, float]:
        return {}

    def close(self) -> None: ...


def rollout(versions: Sequence[int], g: int) -> Rollout:
    ids = np.array([g, *range(1, len(versions))], dtype=np.int64)
    logp = -np.arange(len(ids), dtype=np.float32) / 8
    actions = np.ones(len(ids), dtype=bool)
    return Rollout(ids, actions, logp, np.array(versions), len(ids) - 1, "closer")


@pytest.fixture(scope="module")
def stream(shards: ShardFolder) -> Stream:
    return prompt_stream(shards.split("train"), CFG, SEED, "rl")


def stage_of(documents: int, steps: int) -> RLStage:
    return RLStage(kind="rl", name="rl", steps=steps, documents_per_step=documents, group_size=2)


@dataclass
class Run:
    """One rank's supply over the steps of a stage, and what came of it."""

    stream: Stream
    cfg: RolloutConfig
    stage: RLStage
    world: dist.World = field(default_factory=lambda: dist.World(0, 1, torch.device("cpu")))
    seed: int = 0
    pace: int = 0
    trained: list[Batch] = field(default_factory=list)
    uses: list[list[int]] = field(default_factory=list)
    """Times that each document of a step was trained before."""

    def __post_init__(self) -> None:
        self.engine = PacedEngine(self.seed, self.pace)
        self.supply = Supply(
            *(self.engine, self.stream, CFG, self.cfg, self.stage, MARKERS, SEED, 20, self.world)
        )

    def go(self, start: int, stop: int, each: Callable[[], None] = lambda: None) -> Self:
        for step in range(start, stop):
            self.engine.publish((), step)
            batch = self.supply.take(step, self.stage.steps - step)
            # As the collectives of an update do: ranks that are not at the same call notice here.
            assert (
                dist.gathered(("trained", step), self.world)
                == [("trained", step)] * self.world.size
            )
            self.trained.append(batch)
            self.uses.append([lot.uses for lot in batch.lots])
            self.supply.trained(batch)
            each()
        return self

    @property
    def positions(self) -> list[list[int]]:
        return [batch.positions for batch in self.trained]

    @property
    def first(self) -> list[int]:
        """Positions in the order of their first training."""
        pairs = zip(self.trained, self.uses, strict=True)
        return [
            position
            for batch, uses in pairs
            for position, before in zip(batch.positions, uses, strict=True)
            if before == 0
        ]

    @property
    def dropped(self) -> int:
        return int(sum(batch.sums["staleness/dropped_groups"][0] for batch in self.trained))

    @property
    def trained_groups(self) -> int:
        """Each once."""
        return sum(
            len(lot.groups or ())
            for batch, uses in zip(self.trained, self.uses, strict=True)
            for lot, before in zip(batch.lots, uses, strict=True)
            if before == 0
        )

    def rows(self) -> list[dict[str, Any]]:
        """Through the file of a checkpoint."""
        return unpacked(packed(self.supply.rows()), "test")


def keys_at(stream: Stream, position: int) -> set[tuple[int, str, int]]:
    trunk = dealt_trunks(stream, position, 1, CFG, SEED, 20, alone())[1][0]
    return {prompt.key for prompt in prompts_of(trunk, CFG, MARKERS)}


def num_groups(stream: Stream, position: int) -> int:
    return len(keys_at(stream, position))


def versions_of(group: Group) -> list[list[int]]:
    return [each.version.tolist() for each in group.rollouts]


def alone() -> dist.World:
    return dist.World(0, 1, torch.device("cpu"))


def drawn_config(seed: int) -> tuple[RolloutConfig, int, int]:
    """A configuration, documents per step and the engine's pace."""
    draw = np.random.default_rng(seed)
    staleness, reuse = int(draw.integers(0, 5)), int(draw.integers(1, 4))
    table: dict[str, Any] = {"max_staleness": staleness, "max_reuse": reuse}
    if staleness and draw.random() < 0.6:
        table["ahead"] = int(draw.integers(0, staleness + 3))
    if reuse > 1 and draw.random() < 0.6:
        table["max_age"] = int(draw.integers(0, 7))
    return RolloutConfig(**table), int(draw.integers(1, 5)), int(draw.integers(0, 4))


# ---- one rank ------------------------------------------------------------------------------------


class Watched(Run):
    """A run of 60 steps that notes what it holds."""

    def watch(self) -> "Watched":
        self.holds: list[tuple[int, set[int], set[int]]] = []
        """After each step: the cursor, and the positions that wait and that are kept."""
        self.usable: list[int] = []
        """Before each step: documents that may be trained again."""
        self.ages: list[int] = []
        """Of all groups when they were collected."""
        self.asked: set[tuple[int, str, int]] = set()
        """Keys of all prompts that were collected."""
        collect, supply = self.engine.collect, self.supply

        def collected(tickets: Sequence[str]) -> list[Group]:
            found = collect(tickets)
            # Of every rollout and token: the fake has one version for all siblings.
            self.ages += [
                self.engine.version - min(min(versions) for versions in versions_of(group))
                for group in found
            ]
            self.asked |= {group.prompt.key for group in found}
            return found

        self.engine.collect = collected
        for step in range(60):
            young = [lot for lot in supply.kept if step - lot.oldest <= self.cfg.oldest_reused]
            self.usable.append(len(young))
            self.go(step, step + 1)
            held = ({lot.position for lot in lots} for lots in (supply.waiting, supply.kept))
            self.holds.append((supply.next, *held))
        return self


@pytest.fixture(scope="module")
def runs(stream: Stream) -> list[Watched]:
    """Of drawn configurations, engines and steps."""
    found = []
    for seed in range(24):
        cfg, documents, pace = drawn_config(seed)
        found.append(Watched(stream, cfg, stage_of(documents, 60), seed=seed, pace=pace).watch())
    return found


def test_these_runs_drop_and_reuse_enough_to_be_worth_something(runs: list[Watched]) -> None:
    assert sum(run.dropped > 0 for run in runs) >= 4
    assert {max(max(uses) for uses in run.uses) for run in runs} == {0, 1, 2}
    assert {run.cfg.max_staleness for run in runs} == {0, 1, 2, 3, 4}


def test_a_document_is_not_dispatched_waiting_trained_or_dropped(
    stream: Stream, runs: list[Watched]
) -> None:
    keys = [keys_at(stream, p) for p in range(max(run.supply.next for run in runs))]
    for run in runs:
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


def test_first_trainings_are_in_the_order_of_the_stream(runs: list[Watched]) -> None:
    for run in runs:
        assert run.first == sorted(set(run.first))


def test_every_step_has_its_documents_and_none_more_often_than_allowed(
    runs: list[Watched],
) -> None:
    for run in runs:
        documents = run.stage.documents_per_step
        assert all(len(each) == len(set(each)) == documents for each in run.positions)
        uses = Counter(position for each in run.positions for position in each)
        assert set(uses) == set(run.first)
        assert max(uses.values()) <= run.cfg.max_reuse


def test_nothing_is_dispatched_that_could_not_be_trained(runs: list[Watched]) -> None:
    for run in runs:
        assert not run.supply.waiting
        assert not run.engine.open


def test_groups_trained_and_groups_dropped_are_all_that_were_asked_for(
    stream: Stream, runs: list[Watched]
) -> None:
    count = [num_groups(stream, p) for p in range(max(run.supply.next for run in runs))]
    for run in runs:
        assert run.trained_groups + run.dropped == sum(count[: run.supply.next])


def test_nothing_trained_is_older_than_allowed_and_nothing_younger_is_dropped(
    runs: list[Watched],
) -> None:
    for run in runs:
        for step, (batch, uses) in enumerate(zip(run.trained, run.uses, strict=True)):
            for lot, n in zip(batch.lots, uses, strict=True):
                limit = run.cfg.oldest_reused if n else run.cfg.max_staleness
                assert step - lot.oldest <= limit
        assert run.dropped == sum(age > run.cfg.max_staleness for age in run.ages)


def test_as_many_are_trained_again_as_leave_every_document_its_uses(runs: list[Watched]) -> None:
    for run in runs:
        documents = run.stage.documents_per_step
        most = documents - math.ceil(documents / run.cfg.max_reuse)
        for uses, usable in zip(run.uses, run.usable, strict=True):
            assert sum(n > 0 for n in uses) == min(most, usable)


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
def test_steps_by_hand(stream: Stream, table, expected) -> None:
    run = Run(stream, RolloutConfig(**table), stage_of(2, 5)).go(0, 5)
    assert run.positions == expected


def test_dispatch_runs_ahead_by_so_many_steps_and_stops_before_the_end(stream: Stream) -> None:
    run = Run(stream, RolloutConfig(max_staleness=3, ahead=2), stage_of(2, 6))
    reached: list[int] = []
    run.go(0, 6, lambda: reached.append(run.supply.next))
    assert reached == [6, 8, 10, 12, 12, 12]
    assert run.positions == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [10, 11]]


def test_a_fast_engine_too_far_ahead_is_dropped_and_made_up_for(stream: Stream) -> None:
    """A group of version 0 is two old at step 2, where one may be: all waiting ones go, and fresh ones come."""
    run = Run(stream, RolloutConfig(max_staleness=1, ahead=2), stage_of(1, 4), pace=TOKENS)
    run.engine.draw = type("Always", (), {"integers": lambda *_: TOKENS})()
    reached: list[int] = []
    run.go(0, 4, lambda: reached.append(run.supply.next))
    # Step 0 dispatches 0, 1, 2. Step 1 trains 1 and dispatches 3. Step 2 finds 2 of version 0 and 3 of version 1.
    assert run.positions == [[0], [1], [3], [4]]
    assert reached == [3, 4, 4, 5]
    assert run.dropped == num_groups(stream, 2)


def test_strictly_on_policy_steps_are_what_they_always_were(stream: Stream) -> None:
    run = Run(stream, RolloutConfig(), stage_of(6, 5)).go(0, 5)
    for step, batch in enumerate(run.trained):
        _, trunks = dealt_trunks(stream, 6 * step, 6, CFG, SEED, 20, alone())
        prompts = [prompt for trunk in trunks for prompt in prompts_of(trunk, CFG, MARKERS)]
        assert batch.positions == list(range(6 * step, 6 * step + 6))
        assert [group.prompt.key for group in batch.groups] == [each.key for each in prompts]
        for group, prompt in zip(batch.groups, prompts, strict=True):
            assert group.prompt.policy_ids.tolist() == prompt.policy_ids.tolist()
        assert batch.sums["staleness/worst"][0] == 0.0
    assert run.supply.next == 30


def test_ages_are_of_tokens_and_of_groups(stream: Stream) -> None:
    run = Run(stream, RolloutConfig(max_staleness=4, ahead=0), stage_of(1, 9))
    given = {0: [[7, 7, 8], [8]], 1: [[5, 9], [9]]}

    def collect(tickets: Sequence[str]) -> list[Group]:
        found = []
        for n, ticket in enumerate(tickets):
            prompt = run.engine.open.pop(ticket)[0]
            found.append(Group(prompt, tuple(rollout(v, 0) for v in given[n % 2])))
        return found

    run.engine.collect = collect
    run.supply.next = next(p for p in range(99) if num_groups(stream, p) == 2)
    sums = run.supply.take(9, 1).sums
    # Ages 2 2 1 1 and 4 0 0.
    assert sums["staleness/mean"] == (10.0, 7.0)
    assert sums["staleness/newest"] == (1.0 + 0.0, 2.0)
    assert sums["staleness/worst"] == (2.0 + 4.0, 2.0)
    assert sums["staleness/dropped_groups"][0] == 0.0


def test_a_document_some_of_whose_groups_are_too_old_is_trained_without_them(
    stream: Stream,
) -> None:
    run = Run(stream, RolloutConfig(max_staleness=3, ahead=0), stage_of(1, 9))
    ages = iter([3, 4])

    def collect(tickets: Sequence[str]) -> list[Group]:
        prompts = [run.engine.open.pop(ticket)[0] for ticket in tickets]
        # The oldest token is neither the first nor the first rollout's.
        return [Group(p, (rollout([9], 1), rollout([9, 9 - next(ages)], 0))) for p in prompts]

    run.engine.collect = collect
    run.supply.next = position = next(p for p in range(99) if num_groups(stream, p) == 2)
    batch = run.supply.take(9, 1)
    assert batch.positions == [position]
    assert [oldest(group) for group in batch.groups] == [6]
    assert batch.sums["staleness/dropped_groups"][0] == 1.0


def test_the_end_of_a_stage_cancels_what_is_under_way(stream: Stream) -> None:
    run = Run(stream, RolloutConfig(max_staleness=2), stage_of(3, 9)).go(0, 4)
    assert len(run.engine.open) == sum(num_groups(stream, p) for p in range(12, 18))
    run.supply.close()
    assert not run.engine.open
    assert run.supply.rows() == []


# ---- checkpoints and ranks -----------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(10))
def test_a_run_that_is_cut_off_goes_on_with_the_same_documents(stream: Stream, seed: int) -> None:
    cfg, documents, _ = drawn_config(seed)
    stage = stage_of(documents, 16)
    # An engine that samples at the last moment: what is under way does not age.
    whole = Run(stream, cfg, stage).go(0, 16)
    for at in (1, 9):
        first = Run(stream, cfg, stage).go(0, at)
        second = Run(stream, cfg, stage)
        second.engine.version = at
        second.supply.restore(first.rows(), first.supply.next, "test")
        second.go(at, 16)
        assert first.positions + second.positions == whole.positions
        assert first.uses + second.uses == whole.uses
        assert second.supply.next == whole.supply.next
        for mine, known in zip(second.trained, whole.trained[at:], strict=True):
            assert list(map(versions_of, mine.groups)) == list(map(versions_of, known.groups))


class Meeting:
    """Collectives between threads."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=30)
        self.items: list[Any] = [None] * size

    def gathered(self, item: Any, world: dist.World) -> list[Any]:
        if world.size == 1:
            return [item]
        self.items[world.rank] = item
        self.barrier.wait()
        found = list(self.items)
        self.barrier.wait()
        return found

    def largest(self, value: int, world: dist.World) -> int:
        return max(self.gathered(value, world))


@pytest.fixture
def on_ranks(monkeypatch: pytest.MonkeyPatch) -> Callable:
    """Run a body on so many ranks, each a thread; its results in their order."""

    def run(size: int, body: Callable[[dist.World], Any]) -> list[Any]:
        meeting = Meeting(size)
        monkeypatch.setattr(dist, "gathered", meeting.gathered)
        monkeypatch.setattr(dist, "largest", meeting.largest)
        found: list[Any] = [None] * size

        def rank(number: int) -> None:
            try:
                found[number] = body(dist.World(number, size, torch.device("cpu")))
            except BaseException as error:
                found[number] = error
                meeting.barrier.abort()

        threads = [threading.Thread(target=rank, args=(number,)) for number in range(size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for each in found:
            if isinstance(each, BaseException) and not isinstance(
                each, threading.BrokenBarrierError
            ):
                raise each
        return found

    return run


def together(runs: Sequence[Run], step: int) -> list[int]:
    return sorted(p for run in runs for p in run.trained[step].positions)


@pytest.mark.parametrize("table", [{}, {"max_staleness": 2}, {"max_reuse": 2}, {"max_reuse": 3}])
def test_two_ranks_train_the_documents_of_one_step_by_step(stream: Stream, on_ranks, table) -> None:
    cfg, stage = RolloutConfig(**table), stage_of(4, 12)
    (one,) = on_ranks(1, lambda world: Run(stream, cfg, stage, world).go(0, 12))
    two = on_ranks(2, lambda world: Run(stream, cfg, stage, world).go(0, 12))
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
    stream: Stream, on_ranks, seed: int
) -> None:
    cfg, documents, pace = drawn_config(seed)
    stage = stage_of(2 * documents, 20)
    two = on_ranks(
        2, lambda world: Run(stream, cfg, stage, world, seed + world.rank, pace).go(0, 20)
    )
    first = [position for run in two for position in run.first]
    waiting = [lot.position for run in two for lot in run.supply.waiting]
    assert len(set(first + waiting)) == len(first) + len(waiting)
    assert set(first + waiting) <= set(range(two[0].supply.next))
    assert two[0].supply.next == two[1].supply.next
    kept = sum(run.trained_groups for run in two)
    open_groups = sum(len(lot.prompts) for run in two for lot in run.supply.waiting)
    told = sum(run.dropped for run in two)
    every = sum(num_groups(stream, p) for p in range(two[0].supply.next))
    assert kept + told + open_groups == every
    if not told:
        assert not waiting
    for run in two:
        assert run.first == sorted(run.first)
        assert all(len(each) == documents for each in run.positions)


def test_a_rank_whose_groups_are_too_old_gets_others_and_the_other_rank_waits(
    stream: Stream, on_ranks
) -> None:
    """The engine of rank 0 samples two steps ahead, where one is allowed; that of rank 1 at the last moment."""
    cfg, stage = RolloutConfig(max_staleness=1, ahead=2), stage_of(4, 10)

    def body(world: dist.World) -> Run:
        run = Run(stream, cfg, stage, world, pace=TOKENS)
        steps = TOKENS if world.rank == 0 else 0
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
    assert sum(num_groups(stream, position) for position in lost) == fast.dropped


def test_a_rank_that_loses_all_its_groups_in_a_step_is_given_others_in_that_step(
    stream: Stream, on_ranks
) -> None:
    """What rank 0 collects first is two versions old; nothing is left in its hands."""
    cfg, stage = RolloutConfig(max_staleness=1, ahead=0), stage_of(4, 10)

    def body(world: dist.World) -> Run:
        run = Run(stream, cfg, stage, world)
        collect, calls = run.engine.collect, itertools.count()

        def collected(tickets: Sequence[str]) -> list[Group]:
            found, old = collect(tickets), world.rank == 0 and next(calls) == 0
            aged = (rollout([run.engine.version - 2] * TOKENS, 0),)
            return [Group(group.prompt, aged) for group in found] if old else found

        run.engine.collect = collected
        return run.go(0, 3)

    first, other = on_ranks(2, body)
    lost = set(range(4)) - set(other.positions[0])
    assert first.dropped == sum(num_groups(stream, position) for position in lost)
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
    stream: Stream, on_ranks, before: int, after: int, table
) -> None:
    cfg, stage = RolloutConfig(**table), stage_of(6, 20)
    runs = on_ranks(before, lambda world: Run(stream, cfg, stage, world, 1, 3).go(0, 8))
    rows = [row for run in runs for row in run.rows()]
    cursor = runs[0].supply.next
    groups = {row["position"]: row["groups"] for row in rows}

    def resumed(world: dist.World) -> tuple[list[tuple], Run]:
        run = Run(stream, cfg, stage, world)
        run.engine.version = 8
        run.supply.restore(rows, cursor, "test")
        held = run.rows()
        assert all(row["groups"] == groups[row["position"]] for row in held)
        # Thoughts under way are asked for again, by the rank that has the document.
        asked = sum(num_groups(stream, r["position"]) for r in held if r["place"] == "waiting")
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
