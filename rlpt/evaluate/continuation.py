"""Prompts -> records: sample thoughts, then score the held-out continuation with and without them
and under controls.

Every rank calls the engine and the scorer equally often, with its strided share of every chunk of prompts, and
ends up with all records in the order of the prompts. A record does not depend on the batch, the chunk or the number of
ranks, beyond the rounding of matrix products of other shapes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol, TypeVar, runtime_checkable

import numpy as np

from rlpt import dist
from rlpt.evaluate.controls import ANY_SAMPLE, Lineup, Partners, named_prefix
from rlpt.evaluate.predictions import prediction
from rlpt.evaluate.records import GREEDY, NO_THINK, OWN, First, Greedy, Record
from rlpt.observe import Control
from rlpt.reward.base import bare_scores
from rlpt.rollout.engine import Sampler
from rlpt.types import Branch, Group, Markers, Prompt, Rollout, Scores, Trunk, concat
from rlpt_data.strict import UserError

T = TypeVar("T")


@runtime_checkable
class Scorer(Protocol):
    """What evaluation needs of `rlpt.policy.scoring.Scorer`."""

    def branches(self, pairs: Sequence[tuple[Trunk, Branch]]) -> list[Scores]: ...
    def trunks(self, spans: Sequence[tuple[Trunk, int, int]]) -> list[Scores]: ...


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
    greedy: bool = False
    """Also one thought a prompt at temperature 0, with a frame of its own."""
    leak_prompts: int = 0
    """The first so many prompts are asked again with other text after the cut (`rlpt.evaluate.leak`)."""
    token_bytes: Sequence[bytes] = ()
    """Bytes of every id, where the policy writes predictions; empty where it does not."""
    annotated: Mapping[tuple[int, str, int], float] = field(default_factory=dict)
    """Entropy at the cut by the proxy of annotations, nats, by the prompt's key; empty: there is none."""


@runtime_checkable
class Keep(Protocol):
    """Remembers what was computed under a name: a job that was killed goes on from there. Collective."""

    def __call__(self, name: str, compute: Callable[[], T], /) -> T: ...


def afresh(_name: str, compute: Callable[[], T]) -> T:
    """Remembers nothing."""
    return compute()


def measure(
    scorer: Scorer,
    engine: Sampler,
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
    likeliest: list[Group] = []
    for chunk in chunks:
        asked = [prompts[i] for i in chunk]
        sampled = partial(_rollouts, engine, asked, procedure, world)
        groups += map(Group, asked, keep(f"thoughts_{chunk.start:07d}", sampled))
        if procedure.greedy:
            likely = partial(sampled, greedy=True)
            likeliest += map(Group, asked, keep(f"greedy_{chunk.start:07d}", likely))
    lineup = Lineup(
        prompts,
        [[rollout.thought_ids for rollout in group.rollouts] for group in groups],
        Partners(prompts, procedure.seed),
        procedure.markers,
        procedure.neutral_ids,
        procedure.controls,
        procedure.seed,
        [group.rollouts[0].thought_ids for group in likeliest],
    )
    of_prompt = partial(_records, groups, likeliest, procedure)
    score = partial(_chunk_records, scorer, unbanned, lineup, of_prompt, procedure.batch, world)
    found = [keep(f"records_{chunk.start:07d}", partial(score, chunk)) for chunk in chunks]
    return [record for part in found for record in part]


def _rollouts(
    engine: Sampler,
    prompts: Sequence[Prompt],
    procedure: Procedure,
    world: dist.World,
    greedy: bool = False,
) -> list[tuple[Rollout, ...]]:
    """The sampled thoughts of every prompt, or its greedy one, on every rank; of a budget of nothing, empty ones."""
    count = 1 if greedy else procedure.thoughts
    if procedure.budget == 0:
        return [(empty_rollout(procedure.markers),) * count for _ in prompts]
    mine = dist.share(prompts, world)
    purpose, budget = procedure.purpose, procedure.budget
    tickets = engine.submit(mine, count, purpose, budget, greedy=greedy)
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
    of_prompt: Callable[[int, dict[tuple[str, int], Scores], float | None], list[Record]],
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
        scored += map(of_prompt, chosen, frames, masses)
    found = [record for part in dist.unshare(scored, world) for record in part]
    _refuse_no_numbers(found)
    return found


def _refuse_no_numbers(records: Sequence[Record]) -> None:
    """On every rank alike. Raises UserError where a policy says NaN."""
    for record in records:
        if strange := [name for name, logp in record.logp.items() if np.isnan(logp).any()]:
            raise UserError(
                f"evaluation: log p of document {record.document}, cut {record.cut} ({strange[0]}) is NaN: "
                "the policy's weights are damaged, or its training diverged; name another checkpoint"
            )


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
    groups: Sequence[Group],
    likeliest: Sequence[Group],
    procedure: Procedure,
    index: int,
    frames: dict[tuple[str, int], Scores],
    opener_mass: float | None,
) -> list[Record]:
    """Of every thought of prompt ``index``. ``likeliest`` is empty where nothing was asked greedily."""
    group = groups[index]
    greedy = _greedy(likeliest[index], procedure) if likeliest else None
    return [
        _record(group, sample, frames, procedure, opener_mass, greedy)
        for sample in range(len(group.rollouts))
    ]


def _greedy(group: Group, procedure: Procedure) -> Greedy:
    thought = tuple(group.rollouts[0].thought_ids.tolist())
    said = prediction(group, 0, procedure.markers.closer, procedure.token_bytes)
    return Greedy(thought, said)


def _record(
    group: Group,
    sample: int,
    frames: dict[tuple[str, int], Scores],
    procedure: Procedure,
    opener_mass: float | None,
    greedy: Greedy | None,
) -> Record:
    prompt, rollout = group.prompt, group.rollouts[sample]
    mine = {
        frame: scores for (frame, owner), scores in frames.items() if owner in (sample, ANY_SAMPLE)
    }
    epoch, document, cut = prompt.key
    sampled = rollout.action[: rollout.thought_len + 1]
    return Record(
        epoch=epoch,
        document=document,
        domain=prompt.trunk.domain,
        cut=cut,
        sample=sample,
        num_bytes=prompt.continuation_bytes,
        continuation_ids=prompt.continuation_ids,
        logp={frame: scores.logp for frame, scores in mine.items()},
        firsts={name: _first(mine[name]) for name in (NO_THINK, OWN, GREEDY) if name in mine},
        thought_ids=rollout.thought_ids,
        finish=rollout.finish,
        named_prefix=named_prefix(rollout.thought_ids, prompt.continuation_ids),
        thought_nats=-float(rollout.logp[: len(sampled)][sampled].sum(dtype=np.float64)),
        thought_actions=int(sampled.sum()),
        opener_mass=opener_mass,
        annotated_entropy=procedure.annotated.get(prompt.key),
        prediction=prediction(group, sample, procedure.markers.closer, procedure.token_bytes),
        greedy=greedy,
    )


def _first(scores: Scores) -> First:
    sure = scores.certainty
    likeliest = int(scores.argmax[0])
    return First(likeliest) if sure is None else First(likeliest, sure.confidence, sure.entropy)
