"""A supply of groups whose engine is a fake: what it has sampled at a publication is drawn, or given."""

import functools
import itertools
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import torch

from rlpt import dist
from rlpt.config import PromptConfig
from rlpt.engines import RolloutConfig
from rlpt.lots import Batch
from rlpt.prompts import Stream, dealt_trunks, prompts_of
from rlpt.reward.base import Rewarded
from rlpt.rollout.records import packed, unpacked
from rlpt.stages import RLStage
from rlpt.supply import Supply
from rlpt.types import Group, Markers, Prompt, Rollout

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

    def submit(
        self, prompts: Sequence[Prompt], group_size: int, purpose: str, budget: int | None = None
    ) -> list[str]:
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
    return _rollout(tuple(versions), g)


@functools.cache
def _rollout(versions: tuple[int, ...], g: int) -> Rollout:
    ids = np.array([g, *range(1, len(versions))], dtype=np.int64)
    logp = -np.arange(len(ids), dtype=np.float32) / 8
    actions = np.ones(len(ids), dtype=bool)
    return Rollout(ids, actions, logp, np.array(versions), len(ids) - 1, "closer")


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
    reward: Callable[[Sequence[Group]], Rewarded] | None = None
    trained: list[Batch] = field(default_factory=list)
    uses: list[list[int]] = field(default_factory=list)
    """Times that each document of a step was trained before."""

    def __post_init__(self) -> None:
        self.engine = PacedEngine(self.seed, self.pace)
        self.supply = Supply(
            *(self.engine, self.stream, CFG, self.cfg, self.stage, MARKERS, SEED, 20, self.world),
            self.reward,
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
            if self.reward is not None:
                self.supply.rated(batch, self.reward(batch.groups))
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


@functools.cache
def keys_at(stream: Stream, position: int) -> set[tuple[int, str, int]]:
    trunk = dealt_trunks(stream, [position], CFG, SEED, 20, alone())[1][0]
    return {prompt.key for prompt in prompts_of(trunk, CFG, MARKERS)}


def num_groups(stream: Stream, position: int) -> int:
    return len(keys_at(stream, position))


def versions_of(group: Group) -> list[list[int]]:
    return [each.version.tolist() for each in group.rollouts]


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


def on_ranks(monkeypatch: Any, size: int, body: Callable[[dist.World], Any]) -> list[Any]:
    """Run a body on so many ranks, each a thread; its results in their order."""
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
        if isinstance(each, BaseException) and not isinstance(each, threading.BrokenBarrierError):
            raise each
    return found


def alone() -> dist.World:
    return dist.World(0, 1, torch.device("cpu"))


def config(**table: Any) -> RolloutConfig:
    """Unchecked: no run may ask for thoughts so far ahead that they get too old, and here some have to."""
    return RolloutConfig.model_construct(**table)


def drawn_config(seed: int) -> tuple[RolloutConfig, int, int]:
    """A configuration, documents per step and the engine's pace."""
    draw = np.random.default_rng(seed)
    staleness, reuse = int(draw.integers(0, 5)), int(draw.integers(1, 4))
    table: dict[str, Any] = {"max_staleness": staleness, "max_reuse": reuse}
    if staleness and draw.random() < 0.6:
        table["ahead"] = int(draw.integers(0, staleness + 3))
    if reuse > 1 and draw.random() < 0.6:
        table["max_age"] = int(draw.integers(0, 7))
    return config(**table), int(draw.integers(1, 5)), int(draw.integers(0, 4))


class Watched(Run):
    """A whole run that notes what it holds."""

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
        for step in range(self.stage.steps):
            young = [lot for lot in supply.kept if step - lot.oldest <= self.cfg.oldest_reused]
            self.usable.append(len(young))
            self.go(step, step + 1)
            held = ({lot.position for lot in lots} for lots in (supply.waiting, supply.kept))
            self.holds.append((supply.next, *held))
        return self
