"""Where a step's groups come from: prompts are dispatched in the order of the stream, ahead of training where the
configuration allows it, and trained in that order; afterwards they may be trained again.

Every position of the stream is at any time in exactly one place: not dispatched, waiting, trained (and perhaps kept for
another time), or dropped and counted.
"""

import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from rlpt import dist
from rlpt.config import PromptConfig
from rlpt.engines import RolloutConfig
from rlpt.exits import FaultError
from rlpt.prompts import Samples, dealt_trunks, prompts_of, trunk
from rlpt.rollout.engine import Engine
from rlpt.rollout.records import Row, group_row, groups_of, unpacked
from rlpt.stages import RLStage
from rlpt.types import Group, Markers, Prompt, Sums
from rlpt_data.strict import UserError

_ROUNDS = 3
"""What waited, what is dispatched in its stead, and once more."""


@dataclass
class Lot:
    """One document of the stream with the groups of its cuts."""

    position: int
    prompts: list[Prompt]
    tickets: list[str] = field(default_factory=list)
    groups: list[Group] | None = None
    """Absent until they are collected."""
    uses: int = 0
    """Times it was trained."""

    @property
    def oldest(self) -> int:
        """Version of the weights that sampled its oldest token."""
        return min(oldest(group) for group in self.groups or ())


def oldest(group: Group) -> int:
    return min(int(rollout.version.min()) for rollout in group.rollouts)


@dataclass(frozen=True)
class Batch:
    """This rank's share of a step."""

    positions: list[int]
    """Of its documents in the stage's order, each once."""
    groups: list[Group]
    sums: Sums
    lots: list[Lot] = field(repr=False)


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
    ) -> None:
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
        self.waiting: deque[Lot] = deque()
        self.kept: deque[Lot] = deque()
        self.share = stage.documents_per_step // world.size

    # ---- a step --------------------------------------------------------------------------------

    def take(self, step: int, steps_left: int) -> Batch:
        """The documents of the step that trains version ``step``: fresh ones in dispatch order, and some again.

        Collective. ``steps_left`` counts this one: nothing is dispatched that could not be trained.
        """
        started = time.perf_counter()
        again = self._again(step)
        fresh = self.share - len(again)
        most_ahead = min(self.rollout.steps_ahead, steps_left - 1)
        self._dispatch(fresh + most_ahead * self._fresh_share - len(self.waiting))
        lots, dropped = self._collected(fresh, step)
        lots += again
        groups = [group for lot in lots for group in lot.groups or ()]
        sums = _ages(groups, step) | {
            "staleness/dropped_groups": (float(dropped), 1.0 / self.world.size),
            "replay/share": (float(len(again)), float(len(lots))),
            "time/wait": (time.perf_counter() - started, 1.0),
        }
        return Batch([lot.position for lot in lots], groups, sums, lots)

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

    def _collected(self, wanted: int, step: int) -> tuple[list[Lot], int]:
        """``wanted`` documents with groups that are fresh enough; how many groups were too old. Collective.

        Raises FaultError where thoughts that were asked for just now are too old: the engine lacks the weights.
        """
        lots: list[Lot] = []
        dropped = 0
        for _ in range(_ROUNDS):
            while len(lots) < wanted and self.waiting:
                next_ones = [
                    self.waiting.popleft()
                    for _ in range(min(wanted - len(lots), len(self.waiting)))
                ]
                self._collect(next_ones)
                dropped += sum(self._drop_old(lot, step) for lot in next_ones)
                lots += [lot for lot in next_ones if lot.groups]
            # Every rank must have its documents before any goes on.
            if not (missing := dist.largest(wanted - len(lots), self.world)):
                return lots, dropped
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
        total = count * self.world.size
        positions, trunks = dealt_trunks(
            self.stream, self.next, total, self.cfg, self.seed, self.branch_tokens, self.world
        )
        lots = [
            Lot(self.next + position, prompts_of(each, self.cfg, self.markers))
            for position, each in zip(positions, trunks, strict=True)
        ]
        self.next += total
        self._submit(lots)
        self.waiting += lots

    def _submit(self, lots: Sequence[Lot]) -> None:
        prompts = [prompt for lot in lots for prompt in lot.prompts]
        purpose = f"rollout/{self.stage.name}"
        tickets = iter(self.engine.submit(prompts, self.stage.group_size, purpose))
        for lot in lots:
            lot.tickets = [next(tickets) for _ in lot.prompts]

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
        return [lot_row(lot, "waiting") for lot in self.waiting] + [
            lot_row(lot, "kept") for lot in self.kept
        ]

    def restore(self, rows: Iterable[Row], cursor: int, where: str) -> None:
        """Take this rank's share of all ranks' documents, however many ranks saved them."""
        self.next = cursor
        ordered = sorted(rows, key=lambda row: row["position"])
        for place, into in (("waiting", self.waiting), ("kept", self.kept)):
            mine = dist.share([row for row in ordered if row["place"] == place], self.world)
            into += [
                lot_of(row, self.stream, self.cfg, self.markers, self.seed, where) for row in mine
            ]
        self._submit([lot for lot in self.waiting if lot.groups is None])


class SavedSupply:
    """Every step's groups as a run wrote them: no engine samples anything.

    Another run's (``own`` false) come from weights that this one never had: their versions are none of its own.
    """

    samples = False

    def __init__(
        self,
        run_dir: Path,
        own: bool,
        stream: Samples,
        cfg: PromptConfig,
        stage: RLStage,
        markers: Markers,
        seed: int,
        world: dist.World,
    ) -> None:
        self.run_dir = run_dir
        self.own = own
        self.stream = stream
        self.cfg = cfg
        self.stage = stage
        self.markers = markers
        self.seed = seed
        self.world = world
        self.next = 0

    def take(self, step: int, steps_left: int) -> Batch:
        """The groups that trained version ``step`` there. Raises UserError where there are none, or others."""
        path = groups_path(self.run_dir, step + 1)
        if not path.is_file():
            raise UserError(
                f"rollout.saved = {self.run_dir}: has no {path.name}, so no groups for step {step + 1}; save them "
                "with rollout.save_groups = true, or lower the stage's steps"
            )
        rows = sorted(unpacked(path.read_bytes(), str(path)), key=lambda row: row["position"])
        self._check(rows, path)
        lots = [
            lot_of(row, self.stream, self.cfg, self.markers, self.seed, str(path))
            for row in dist.share(rows, self.world)
        ]
        self.next += self.stage.documents_per_step
        groups = [group for lot in lots for group in lot.groups or ()]
        positions = [lot.position for lot in lots]
        if not self.own:
            return Batch(positions, [foreign(group) for group in groups], {}, lots)
        return Batch(positions, groups, _ages(groups, step), lots)

    def _check(self, rows: Sequence[Row], path: Path) -> None:
        sizes = {len(group["rollouts"]) for row in rows for group in row["groups"] or ()}
        for name, found in (("documents_per_step", {len(rows)}), ("group_size", sizes)):
            if found != {getattr(self.stage, name)}:
                raise UserError(
                    f"{path}: holds steps of {name} = {sorted(found)}, stage {self.stage.name} has "
                    f"{getattr(self.stage, name)}; use the saved run's"
                )

    def trained(self, batch: Batch) -> None:
        """Saved groups are trained as often as they were saved."""

    def rows(self) -> list[Row]:
        return []

    def restore(self, rows: Iterable[Row], cursor: int, where: str) -> None:
        self.next = cursor

    def close(self) -> None:
        """Nothing is under way."""


def foreign(group: Group) -> Group:
    """A group whose tokens no version of this run sampled."""
    rollouts = (replace(r, version=np.full_like(r.version, -1)) for r in group.rollouts)
    return Group(group.prompt, tuple(rollouts))


def groups_path(run_dir: Path, step: int) -> Path:
    """The groups of a step, named like its line of metrics."""
    return run_dir / "groups" / f"step_{step:06d}.jsonl.zst"


def lot_of(
    row: Row, stream: Samples, cfg: PromptConfig, markers: Markers, seed: int, where: str
) -> Lot:
    """A document in hand from its row; its text is cut again as it was."""
    epoch, document = stream.at(row["position"])
    prompts = prompts_of(trunk(document, epoch, cfg, seed), cfg, markers)
    groups = None if row["groups"] is None else groups_of(row["groups"], prompts, where)
    return Lot(row["position"], prompts, [], groups, row["uses"])


def lot_row(lot: Lot, place: str) -> Row:
    groups = None if lot.groups is None else [group_row(group) for group in lot.groups]
    return {"place": place, "position": lot.position, "uses": lot.uses, "groups": groups}


def _ages(groups: Sequence[Group], step: int) -> Sums:
    """Versions between the weights that sampled a token and those that are trained: mean over tokens, and over groups
    the mean of their newest and of their oldest token."""
    ages = [step - np.concatenate([r.version for r in group.rollouts]) for group in groups]
    count = float(len(ages))
    return {
        "staleness/mean": (
            float(sum(age.sum() for age in ages)),
            float(sum(len(age) for age in ages)),
        ),
        "staleness/newest": (float(sum(age.min() for age in ages)), count),
        "staleness/worst": (float(sum(age.max() for age in ages)), count),
    }
