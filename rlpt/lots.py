"""A document of a stage with its groups: in hand, in a step, or as a row of a file."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import numpy as np

from rlpt.config import PromptConfig
from rlpt.prompts import Samples, prompts_of, trunk_at
from rlpt.rollout.records import Row, group_row, groups_of
from rlpt.types import Group, Markers, Prompt, Sums
from rlpt_data.strict import UserError


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
    budget: int | None = None
    """Most tokens of its thoughts, where the stage has a schedule."""

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

    @property
    def places(self) -> dict[int, range]:
        """Of every document's groups among ``groups``, by its position."""
        ends = accumulate(len(lot.groups or ()) for lot in self.lots)
        pairs = zip(self.lots, ends, strict=True)
        return {lot.position: range(end - len(lot.groups or ()), end) for lot, end in pairs}


def lot_of(
    row: Row, stream: Samples, cfg: PromptConfig, markers: Markers, seed: int, where: str
) -> Lot:
    """A document in hand from its row; its text is cut again as it was. Raises UserError where it is another text."""
    every = prompts_of(trunk_at(stream, row["position"], cfg, seed), cfg, markers)
    prompts = [prompt for prompt in every if prompt.key[2] in row["cuts"]]
    groups = None if row["groups"] is None else groups_of(row["groups"], prompts, where)
    if sorted(prompt.key[2] for prompt in prompts) != sorted(row["cuts"]):
        raise UserError(
            f"{where}: holds the document at position {row['position']} with cuts at {row['cuts']}, where these shards "
            f"and this seed have {[prompt.key[2] for prompt in every]}; use the run's own shards, prompts and seed"
        )
    return Lot(row["position"], prompts, [], groups, row["uses"], row["budget"])


def lot_row(lot: Lot, place: str) -> Row:
    groups = None if lot.groups is None else [group_row(group) for group in lot.groups]
    held = {"position": lot.position, "uses": lot.uses, "budget": lot.budget}
    held["cuts"] = [prompt.key[2] for prompt in lot.prompts]
    return {"place": place, **held, "groups": groups}


def ages(groups: Sequence[Group], step: int) -> Sums:
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
