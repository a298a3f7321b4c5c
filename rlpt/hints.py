"""STaR's hint pass: groups without a right rollout are asked again with the answer in the prompt.

What comes back is trained after the plain prompt, so it is marked: its log-probabilities are those of the other one.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import numpy as np
from jaxtyping import Bool

from rlpt.config import PolicyConfig
from rlpt.curriculum import HintPass
from rlpt.lots import Batch, Lot
from rlpt.policy.chat import check_text
from rlpt.policy.load import Blueprint
from rlpt.reward.base import Reward, Rewarded
from rlpt.supply import Supply
from rlpt.types import Group, Prompt, concat
from rlpt_data.shards import ShardFolder


@dataclass(frozen=True)
class Hint:
    """The ids around the held-out text where a prompt shows it, between the context and what opens the thought."""

    before: tuple[int, ...]
    after: tuple[int, ...]

    def __call__(self, prompt: Prompt) -> Prompt:
        context, opened = prompt.policy_ids[: prompt.cut], prompt.policy_ids[prompt.cut :]
        shown = concat(context, self.before, prompt.continuation_ids, self.after, opened)
        return replace(prompt, policy_ids=shown)


def hint_of(cfg: HintPass, policy: PolicyConfig, shards: ShardFolder, plan: Blueprint) -> Hint:
    """Raises UserError where a text spells a special token."""
    added = {token["content"] for token in plan.tokenizer.get("added_tokens") or []}
    for name in ("before", "after"):
        check_text(f"hint.{name}", getattr(cfg, name), {policy.opener, policy.closer, *added})
    before, after = (tuple(shards.encode(text).tolist()) for text in (cfg.before, cfg.after))
    return Hint(before, after)


class HintedSupply(Supply):
    """A supply whose groups without a right rollout are those of the hinted prompt, where one of these is right."""

    def __init__(self, hint: Hint, reward: Reward, *parts: Any) -> None:
        super().__init__(*parts)
        self.hint = hint
        self.reward = reward
        self.asked = 0
        self.right = 0
        """Rollouts of the current step."""

    def take(self, step: int, steps_left: int) -> Batch:
        self.asked = self.right = 0
        batch = super().take(step, steps_left)
        each = 1.0 / self.world.size
        counts = {"hint/asked": (float(self.asked), each), "hint/right": (float(self.right), each)}
        return replace(batch, sums=batch.sums | counts)

    def _collect(self, lots: Sequence[Lot]) -> None:
        """All at once; then, of those that failed, all at once again."""
        fresh = [lot for lot in lots if lot.groups is None]
        super()._collect(fresh)
        answered = iter(self._answered([group for lot in fresh for group in lot.groups or ()]))
        for lot in fresh:
            lot.groups = [next(answered) for _ in lot.prompts]

    def _answered(self, groups: Sequence[Group]) -> Sequence[Group]:
        """The groups, hinted ones in the place of those that failed."""
        failed = np.flatnonzero(failing(self.reward(groups))).tolist() if groups else []
        if not failed:
            return groups
        again = [
            replace(found, prompt=groups[p].prompt, hinted=True)
            for p, found in zip(failed, self._ask([groups[p] for p in failed]), strict=True)
        ]
        right_PG = right(self.reward(again))
        self.asked += right_PG.size
        self.right += int(right_PG.sum())
        better = {p: again[n] for n, p in enumerate(failed) if right_PG[n].any()}
        return [better.get(p, group) for p, group in enumerate(groups)]

    def _ask(self, groups: Sequence[Group]) -> list[Group]:
        purpose = f"rollout/{self.stage.name}/hint"
        tickets: list[str] = []
        for budget, alike in groupby(groups, key=lambda group: group.budget):
            prompts = [self.hint(group.prompt) for group in alike]
            tickets += self.engine.submit(prompts, self.stage.group_size, purpose, budget)
        return self.engine.collect(tickets)


def right(rewarded: Rewarded) -> Bool[np.ndarray, "P G"]:
    """Rollouts that count and are rewarded."""
    right_PG = rewarded.reward_PG > 0
    return right_PG if rewarded.kept_PG is None else right_PG & rewarded.kept_PG


def failing(rewarded: Rewarded) -> Bool[np.ndarray, " P"]:
    """Groups in which none is right and one at least counts."""
    failing_P = np.logical_not(right(rewarded).any(axis=1))
    return failing_P if rewarded.kept_PG is None else failing_P & rewarded.kept_PG.any(axis=1)
