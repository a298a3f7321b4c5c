"""Where a step's groups come from: prompts are dispatched in the order of the stream, ahead of training where the
configuration allows it, and trained in that order; afterwards they may be trained again.

Every position of the stream is at any time in exactly one place: not dispatched, waiting, trained (and perhaps kept for
another time), or passed over or dropped, and counted.
"""

import time
from collections import deque
from collections.abc import Iterable, Sequence
from itertools import groupby

from rlpt import dist
from rlpt.config import PromptConfig
from rlpt.engines import RolloutConfig
from rlpt.exits import FaultError
from rlpt.lots import Batch, Lot, ages, lot_of, lot_row, oldest
from rlpt.pool import PLACE, Pool
from rlpt.prompts import Samples, dealt_trunks, prompts_of, trunk_at
from rlpt.reward.base import Reward, Rewarded
from rlpt.rollout.engine import Engine
from rlpt.rollout.records import Row
from rlpt.screen import Screen
from rlpt.stages import RLStage
from rlpt.types import Markers, Prompt, Sums, Trunk
from rlpt_data.strict import UserError

_ROUNDS = 3
"""What waited, what is dispatched in its stead, and once more."""


class Supply:
    """This rank's documents of one stage: waiting for their thoughts, ready, or kept for another time."""

    samples = True
    """Whether it asks the engine, which then needs the weights."""

    def __init__(
        self,
        engine: Engine,
        stream: Samples,
        cfg: PromptConfig,
        rollout: RolloutConfig,
        stage: RLStage,
        markers: Markers,
        seed: int,
        branch_tokens: int,
        world: dist.World,
        reward: Reward | None = None,
    ) -> None:
        """``reward``: the stage's, for `stage.sampling`, which looks at rewards before the step."""
        self.engine = engine
        self.stream = stream
        self.cfg = cfg
        self.rollout = rollout
        self.stage = stage
        self.markers = markers
        self.seed = seed
        self.branch_tokens = branch_tokens
        self.world = world
        self.next = 0
        """First position that no rank has dispatched."""
        self.budget: int | None = None
        """Most tokens of the thoughts that are asked for now."""
        self.waiting: deque[Lot] = deque()
        self.kept: deque[Lot] = deque()
        self.share = stage.documents_per_step // world.size
        self.pool = Pool(stage.sampling, stage.difficulty, world)
        self.screened_by = reward if stage.sampling is not None else None
        self.rounds = stage.sampling.rounds if stage.sampling is not None else 0

    # ---- a step --------------------------------------------------------------------------------

    def take(self, step: int, steps_left: int) -> Batch:
        """The documents of the step that trains version ``step``: fresh ones in dispatch order, and some again.

        Collective. ``steps_left`` counts this one: nothing is dispatched that could not be trained.
        """
        started = time.perf_counter()
        self._begin(self.stage.steps - steps_left)
        again = self._again(step)
        fresh = self.share - len(again)
        most_ahead = min(self.rollout.steps_ahead, steps_left - 1)
        self._dispatch(fresh + most_ahead * self._fresh_share - len(self.waiting))
        lots, dropped, screened = self._collected(fresh, step)
        lots += again
        groups = [group for lot in lots for group in lot.groups or ()]
        sums = ages(groups, step) | {
            "staleness/dropped_groups": (float(dropped), 1.0 / self.world.size),
            "replay/share": (float(len(again)), float(len(lots))),
            "time/wait": (time.perf_counter() - started, 1.0),
        }
        positions = [lot.position for lot in lots]
        sums |= self.pool.sums() | screened | self.stream.sums(positions)
        return Batch(positions, groups, sums, lots)

    def _begin(self, stage_step: int) -> None:
        """What is asked for after so many steps of the stage."""
        if self.stage.budget is not None:
            self.budget = self.stage.budget.at(stage_step, self.stage.steps)

    @property
    def _fresh_share(self) -> int:
        return -(-self.share // self.rollout.max_reuse)

    def _again(self, step: int) -> list[Lot]:
        """The first of those kept, up to the share that leaves every document `max_reuse` uses; too old ones go."""
        self.kept = deque(
            lot for lot in self.kept if step - lot.oldest <= self.rollout.oldest_reused
        )
        return [
            self.kept.popleft() for _ in range(min(self.share - self._fresh_share, len(self.kept)))
        ]

    def _collected(self, wanted: int, step: int) -> tuple[list[Lot], int, Sums]:
        """``wanted`` documents with groups that are fresh enough, and as far as sampling goes on for them, whose
        rewards differ; how many groups were too old, and what was sampled and used. Collective.

        Raises FaultError where thoughts that were asked for just now are too old: the engine lacks the weights.
        """
        lots: list[Lot] = []
        screen = Screen(self.screened_by, self.pool)
        dropped = 0
        for turn in range(self.rounds + _ROUNDS):
            while len(lots) < wanted and self.waiting:
                next_ones = [
                    self.waiting.popleft()
                    for _ in range(min(wanted - len(lots), len(self.waiting)))
                ]
                self._collect(next_ones)
                dropped += sum(self._drop_old(lot, step) for lot in next_ones)
                lots += screen.passed([lot for lot in next_ones if lot.groups])
            if turn >= self.rounds:
                lots += screen.fill(wanted - len(lots))
            # Every rank must have its documents before any goes on.
            if not (missing := dist.largest(wanted - len(lots), self.world)):
                lots.sort(key=lambda lot: lot.position)
                return lots, dropped, screen.sums(self.stage.group_size, self.world.size)
            self._dispatch(missing)
        raise FaultError(
            f"rollouts: {dropped} groups of weights older than version {step} - {self.rollout.max_staleness} "
            "(rollout.max_staleness), those just sampled among them; the engine says it has version "
            f"{self.engine.version}"
        )

    def _collect(self, lots: Sequence[Lot]) -> None:
        """All at once: engines decode them together."""
        open_lots = [lot for lot in lots if lot.groups is None]
        groups = iter(self.engine.collect([ticket for lot in open_lots for ticket in lot.tickets]))
        for lot in open_lots:
            lot.groups = [next(groups) for _ in lot.prompts]

    def _drop_old(self, lot: Lot, step: int) -> int:
        """Whole groups: their siblings are what an advantage compares."""
        before = lot.groups or []
        lot.groups = [
            group for group in before if step - oldest(group) <= self.rollout.max_staleness
        ]
        return len(before) - len(lot.groups)

    def _dispatch(self, count: int) -> None:
        """As many more documents for every rank as the neediest one lacks. Collective."""
        count = dist.largest(max(count, 0), self.world)
        if not count:
            return
        due = self._due(count * self.world.size)
        positions, trunks = dealt_trunks(
            self.stream, due, self.cfg, self.seed, self.branch_tokens, self.world
        )
        lots = [
            Lot(at, self._prompts(each), budget=self.budget)
            for at, each in zip(positions, trunks, strict=True)
        ]
        self._submit(lots)
        self.waiting += lots

    def _prompts(self, trunk: Trunk) -> list[Prompt]:
        return prompts_of(self.pool.left(trunk), self.cfg, self.markers)

    def _due(self, count: int) -> list[int]:
        """The next positions that the pool does not pass over, the same on every rank."""
        found: list[int] = []
        last = self.next
        while len(found) < count:
            position, self.next = self.next, self.next + 1
            if not self.pool.looks or self.pool.is_due(
                trunk_at(self.stream, position, self.cfg, self.seed)
            ):
                found.append(position)
                last = position
            elif position - last > self.pool.longest_wait * self.stream.period:
                raise UserError(
                    f"stage {self.stage.name}: every document is passed over; widen difficulty, raise "
                    "sampling.no_positive_resampling, or end the stage here"
                )
        return found

    def _submit(self, lots: Sequence[Lot]) -> None:
        purpose = f"rollout/{self.stage.name}"
        for budget, alike in groupby(lots, key=lambda lot: lot.budget):
            same = list(alike)
            prompts = [prompt for lot in same for prompt in lot.prompts]
            tickets = iter(self.engine.submit(prompts, self.stage.group_size, purpose, budget))
            for lot in same:
                lot.tickets = [next(tickets) for _ in lot.prompts]

    def rated(self, batch: Batch, rewarded: Rewarded) -> None:
        """What a step's groups were worth, those trained before left out. Collective."""
        if not self.pool.looks:
            return
        if self.screened_by is None:
            first = [lot.uses == 0 for lot in batch.lots for _ in lot.groups or ()]
            self.pool.rate(batch.groups, rewarded, first)
        self.pool.merge()

    def trained(self, batch: Batch) -> None:
        """The batch is in the weights: what may be trained again is kept."""
        for lot in batch.lots:
            lot.uses += 1
        self.kept += [lot for lot in batch.lots if lot.uses < self.rollout.max_reuse]
        # In an order that a checkpoint has, too: a resumed run takes them up as this one would have.
        self.kept = deque(sorted(self.kept, key=lambda lot: lot.position))

    def close(self) -> None:
        """The stage is over."""
        self.engine.cancel(
            [ticket for lot in self.waiting if lot.groups is None for ticket in lot.tickets]
        )
        self.waiting.clear()
        self.kept.clear()

    # ---- checkpoints ---------------------------------------------------------------------------

    def rows(self) -> list[Row]:
        """This rank's documents in hand. Thoughts under way are not in them: they are sampled again."""
        held = [lot_row(lot, "waiting") for lot in self.waiting]
        return [*held, *(lot_row(lot, "kept") for lot in self.kept), *self.pool.rows()]

    def restore(self, rows: Iterable[Row], cursor: int, where: str) -> None:
        """Take this rank's share of all ranks' documents, however many ranks saved them."""
        self.next = cursor
        ordered = sorted(rows, key=lambda row: row["position"])
        self.pool.restore(row for row in ordered if row["place"] == PLACE)
        for place, into in (("waiting", self.waiting), ("kept", self.kept)):
            mine = dist.share([row for row in ordered if row["place"] == place], self.world)
            into += [
                lot_of(row, self.stream, self.cfg, self.markers, self.seed, where) for row in mine
            ]
        self._submit([lot for lot in self.waiting if lot.groups is None])
