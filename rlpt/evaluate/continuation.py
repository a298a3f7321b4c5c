"""Prompts -> records: sample thoughts, then score the held-out continuation with and without them
and under controls.

Every rank calls the engine and the scorer equally often, with its strided share of every chunk of prompts, and
ends up with all records in the order of the prompts. A record does not depend on the batch, the chunk or the number of
ranks, beyond the rounding of matrix products of other shapes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeVar, runtime_checkable

import numpy as np

from rlpt import dist
from rlpt.config import Control
from rlpt.evaluate.controls import ANY_SAMPLE, Lineup, Partners, named_prefix
from rlpt.evaluate.records import NO_THINK, OWN, Record
from rlpt.reward.base import bare_scores
from rlpt.types import Branch, Group, Markers, Prompt, Rollout, Scores, Trunk, concat

T = TypeVar("T")


@runtime_checkable
class Scorer(Protocol):
    """What evaluation needs of `rlpt.policy.scoring.Scorer`."""

    def branches(self, pairs: Sequence[tuple[Trunk, Branch]]) -> list[Scores]: ...
    def trunks(self, spans: Sequence[tuple[Trunk, int, int]]) -> list[Scores]: ...


@runtime_checkable
class Engine(Protocol):
    """What evaluation needs of an engine: thoughts that depend on the prompt's key and the purpose
    alone.
    """

    def submit(
        self, prompts: Sequence[Prompt], group_size: int, purpose: str, budget: int | None = None
    ) -> list[str]: ...
    def collect(self, tickets: Sequence[str]) -> list[Group]: ...


@dataclass(frozen=True)
class Procedure:
    """How thoughts are sampled and what they are compared with."""

    markers: Markers
    neutral_ids: tuple[int, ...]
    """Tokens that say nothing, for the filler control."""
    thoughts: int
    """Sampled per prompt."""
    controls: tuple[Control, ...]
    seed: int
    batch: int = 32
    """Prompts scored together on one rank; changes memory, never a number."""
    purpose: str = "evaluate"
    budget: int | None = None
    """Most tokens of a thought; 0: thoughts are empty; None: as the engine was told."""
    chunk: int | None = None
    """Prompts that are kept together; None: all of them."""


@runtime_checkable
class Keep(Protocol):
    """Remembers what was computed under a name: a job that was killed goes on from there. Collective."""

    def __call__(self, name: str, compute: Callable[[], T], /) -> T: ...


def afresh(_name: str, compute: Callable[[], T]) -> T:
    """Remembers nothing."""
    return compute()


def measure(
    scorer: Scorer,
    engine: Engine,
    prompts: Sequence[Prompt],
    procedure: Procedure,
    world: dist.World,
    unbanned: Scorer | None = None,
    keep: Keep = afresh,
) -> list[Record]:
    """Records of all ``prompts`` (the same global list on every rank), thought by thought, on every
    rank.

    ``unbanned`` scores with the markers left in the softmax; with it every record has its opener
    mass. Thoughts and records are kept chunk by chunk.
    """
    size = procedure.chunk or len(prompts)
    chunks = [
        range(start, min(start + size, len(prompts))) for start in range(0, len(prompts), size)
    ]
    groups: list[Group] = []
    for chunk in chunks:
        asked = [prompts[i] for i in chunk]
        rollouts = keep(
            f"thoughts_{chunk.start:07d}", partial(_rollouts, engine, asked, procedure, world)
        )
        groups += map(Group, asked, rollouts)
    lineup = Lineup(
        prompts,
        [[rollout.thought_ids for rollout in group.rollouts] for group in groups],
        Partners(prompts, procedure.seed),
        procedure.markers,
        procedure.neutral_ids,
        procedure.controls,
        procedure.seed,
    )
    score = partial(_chunk_records, scorer, unbanned, lineup, groups, procedure.batch, world)
    found = [keep(f"records_{chunk.start:07d}", partial(score, chunk)) for chunk in chunks]
    return [record for part in found for record in part]


def _rollouts(
    engine: Engine, prompts: Sequence[Prompt], procedure: Procedure, world: dist.World
) -> list[tuple[Rollout, ...]]:
    """The sampled thoughts of every prompt, on every rank; of a budget of nothing, empty ones."""
    if procedure.budget == 0:
        nothing = empty_rollout(procedure.markers)
        return [(nothing,) * procedure.thoughts for _ in prompts]
    mine = dist.share(prompts, world)
    tickets = engine.submit(mine, procedure.thoughts, procedure.purpose, procedure.budget)
    return dist.unshare([group.rollouts for group in engine.collect(tickets)], world)


def empty_rollout(markers: Markers) -> Rollout:
    """A thought that was cut off before its first token."""
    return Rollout(
        ids=concat([markers.closer]),
        action=np.zeros(1, dtype=bool),
        logp=np.zeros(1, dtype=np.float32),
        version=np.zeros(1, dtype=np.int64),
        thought_len=0,
        finish="budget",
    )


def _chunk_records(
    scorer: Scorer,
    unbanned: Scorer | None,
    lineup: Lineup,
    groups: Sequence[Group],
    batch: int,
    world: dist.World,
    chunk: range,
) -> list[Record]:
    """Records of some prompts, on every rank. Collective: every rank scores equally often."""
    mine = dist.share(chunk, world)
    scored: list[list[Record]] = []
    for start in range(0, -(-len(chunk) // world.size), batch):
        chosen = mine[start : start + batch]
        frames = _score(scorer, lineup, chosen)
        masses = _opener_masses(unbanned, [lineup.prompts[i] for i in chosen], lineup.markers)
        scored += map(_records, [groups[i] for i in chosen], frames, masses)
    return [record for part in dist.unshare(scored, world) for record in part]


def _score(
    scorer: Scorer, lineup: Lineup, indices: Sequence[int]
) -> list[dict[tuple[str, int], Scores]]:
    """Scores of every frame of the chosen prompts: one call without thoughts, one with them."""
    prompts = [lineup.prompts[i] for i in indices]
    bare = bare_scores(scorer, prompts)
    branches = [lineup.branches(i) for i in indices]
    flat = [
        (p.trunk, branch)
        for p, named in zip(prompts, branches, strict=True)
        for branch in named.values()
    ]
    scores = iter(scorer.branches(flat))
    return [
        {(NO_THINK, ANY_SAMPLE): own, **{name: next(scores) for name in named}}
        for own, named in zip(bare, branches, strict=True)
    ]


def _opener_masses(
    unbanned: Scorer | None, prompts: Sequence[Prompt], markers: Markers
) -> list[float | None]:
    if unbanned is None:
        return [None] * len(prompts)
    before = markers.frame.tail + markers.frame.lead
    ids = concat(before, [markers.opener])
    scores = unbanned.branches([(p.trunk, Branch(p.cut, ids, len(before))) for p in prompts])
    return [float(np.exp(score.total)) for score in scores]


def _records(
    group: Group, frames: dict[tuple[str, int], Scores], opener_mass: float | None
) -> list[Record]:
    return [_record(group, sample, frames, opener_mass) for sample in range(len(group.rollouts))]


def _record(
    group: Group, sample: int, frames: dict[tuple[str, int], Scores], mass: float | None
) -> Record:
    prompt, rollout = group.prompt, group.rollouts[sample]
    mine = {
        frame: scores for (frame, owner), scores in frames.items() if owner in (sample, ANY_SAMPLE)
    }
    continuation = prompt.continuation_ids
    epoch, document, cut = prompt.key
    return Record(
        epoch=epoch,
        document=document,
        domain=prompt.trunk.domain,
        cut=cut,
        sample=sample,
        num_bytes=prompt.continuation_bytes,
        continuation_ids=continuation,
        logp={frame: scores.logp for frame, scores in mine.items()},
        first_correct_no_think=bool(mine[NO_THINK].argmax[0] == continuation[0]),
        first_correct_thought=bool(mine[OWN].argmax[0] == continuation[0]),
        thought_ids=rollout.thought_ids,
        finish=rollout.finish,
        named_prefix=named_prefix(rollout.thought_ids, continuation),
        opener_mass=mass,
    )
