"""Choice: does the thought make the held-out text likelier than other stretches of the same document?"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import numpy as np
from jaxtyping import Float
from pydantic import Field

from rlpt.reward.base import Kit, PolicyScores, RewardBase, Rewarded, mean_of
from rlpt.types import Group, Ids, thought_branch


class ChoiceReward(RewardBase):
    """1 where, after the thought, the held-out text is the likeliest of ``options`` stretches of its document, else 0.

    A multiple choice whose wrong options nobody has to write: they are cut evenly from the text before the cut, and
    are as long as the right one (after Golden Goose, arXiv 2601.22975, which has a model write nine).
    """

    kind: Literal["choice"]
    options: Annotated[int, Field(ge=2)] = 4

    predicts: ClassVar[bool] = False

    def why_separate(self, centred: bool) -> str | None:
        return "reward choice scores other texts, too"

    def passes(self, read: bool, centred: bool) -> tuple[int, int]:
        return self.options, 0

    def build(self, kit: Kit) -> "Choice":
        return Choice(self.options, kit)


def likeliest(
    gold_G: Float[np.ndarray, " G"], other_GK: Float[np.ndarray, "G K"]
) -> Float[np.ndarray, " G"]:
    """1 where the gold option's log-probability exceeds all others', else 0; a tie is no choice."""
    return (gold_G > other_GK.max(axis=1)).astype(np.float64)


def distractors(group: Group, count: int) -> list[Ids]:
    """Stretches before the cut, evenly spread, as long as the continuation; fewer where the context is short."""
    prompt = group.prompt
    context = prompt.context_ids
    last = len(context) - prompt.horizon
    starts = (
        sorted({round(last * k / max(1, count - 1)) for k in range(count)}) if last >= 0 else []
    )
    spans = [context[start : start + prompt.horizon] for start in starts]
    return [span for span in spans if not np.array_equal(span, prompt.continuation_ids)]


@dataclass(frozen=True)
class Choice:
    """See `ChoiceReward`. A prompt without any other option gives 0 to all: its group teaches nothing."""

    options: int
    kit: Kit

    def __call__(self, groups: Sequence[Group], policy: PolicyScores | None = None) -> Rewarded:
        others = [distractors(group, self.options - 1) for group in groups]
        pairs = [
            (
                group.prompt.trunk,
                thought_branch(group.prompt, self.kit.markers, r.thought_ids, target),
            )
            for group, wrong in zip(groups, others, strict=True)
            for r in group.rollouts
            for target in (group.prompt.continuation_ids, *wrong)
        ]
        totals = iter([score.total for score in self.kit.scorers["policy"].branches(pairs)])
        rows = [
            self._group(
                np.array([[next(totals) for _ in range(1 + len(wrong))] for _ in g.rollouts])
            )
            for g, wrong in zip(groups, others, strict=True)
        ]
        reward_PG = np.stack(rows) if rows else np.zeros((0, 1))
        return Rewarded(reward_PG, mean_of("reward/choice", reward_PG))

    def _group(self, total_GO: Float[np.ndarray, "G O"]) -> Float[np.ndarray, " G"]:
        if total_GO.shape[1] < 2:
            return np.zeros(len(total_GO))
        return likeliest(total_GO[:, 0], total_GO[:, 1:])
