"""Groups -> rewards: each reward asks the scorers it needs and leaves the arithmetic to its pure file.

Scorers are handed in; nothing here knows about ranks, engines or files.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float

from rlpt.reward.gain import gain
from rlpt.reward.prefix_match import prefix_match
from rlpt.types import Branch, Group, Markers, Scores, Sums, Trunk, thought_branch


@runtime_checkable
class Scorer(Protocol):
    """Log-probabilities of given tokens under one policy, markers removed from the softmax, T = 1."""

    def branches(self, pairs: Sequence[tuple[Trunk, Branch]]) -> list[Scores]: ...

    def trunks(self, spans: Sequence[tuple[Trunk, int, int]]) -> list[Scores]: ...


@dataclass(frozen=True)
class Rewarded:
    """Rewards of this rank's groups, and what is worth logging, as sums and counts."""

    reward_PG: Float[np.ndarray, "P G"]
    sums: Sums
    detail: dict[str, list] = field(default_factory=dict)
    """For the rollout dump: per-token log-probabilities, where the reward has them."""


def joined(parts: Sequence[Rewarded], places: Sequence[Sequence[int]]) -> Rewarded:
    """The rewards of micro-batches as those of the whole step: group ``places[i][k]`` is the k-th of part i."""
    order = np.argsort(np.concatenate([np.asarray(place) for place in places]))
    sums: Sums = {}
    for part in parts:
        for name, (value, count) in part.sums.items():
            total, counted = sums.get(name, (0.0, 0.0))
            sums[name] = (total + value, counted + count)
    detail = {}
    for name in parts[0].detail:
        # One entry per group, or one per rollout: as many for every group.
        flat = [entry for part in parts for entry in part.detail[name]]
        width = len(flat) // len(order)
        detail[name] = [flat[p * width + g] for p in order for g in range(width)]
    return Rewarded(np.concatenate([part.reward_PG for part in parts])[order], sums, detail)


class PolicyScores(NamedTuple):
    """What the current policy says of the held-out text, read off the forward that is trained."""

    thought: list[Scores]
    """Of every rollout, group by group."""
    no_think: list[Scores]
    """Of every group, without a thought."""


@runtime_checkable
class Reward(Protocol):
    def __call__(self, groups: Sequence[Group], policy: PolicyScores | None = None) -> Rewarded:
        """Rewards of groups. ``policy`` spares the scoring pass of the current policy."""
        ...


def no_think_spans(groups: Sequence[Group]) -> list[tuple[Trunk, int, int]]:
    return [(g.prompt.trunk, g.prompt.cut, g.prompt.cut + g.prompt.horizon) for g in groups]


@dataclass(frozen=True)
class GainReward:
    """See `rlpt.stages.GainReward`. Gain against the policy itself is measured beside any reward."""

    scorers: Mapping[str, Scorer]
    markers: Markers
    scorer: str
    baseline: str
    clip: float | None
    centred: bool
    """Whether advantages subtract a statistic of the group; then an unclipped baseline cancels and is skipped."""

    def __call__(self, groups: Sequence[Group], policy: PolicyScores | None = None) -> Rewarded:
        num_P = np.array([group.prompt.horizon for group in groups], dtype=np.float64)
        thought, no_think = policy if policy is not None else self._policy(groups)
        own = thought if self.scorer == "policy" else self._thoughts(self.scorer, groups)
        gain_PG = gain(_totals(thought, groups), _sums(no_think), num_P, clip=None)
        reward_PG = gain(
            _totals(own, groups), self._baseline(groups, no_think), num_P, clip=self.clip
        )
        sums = {
            "gain/mean": (
                float((gain_PG * num_P[:, None]).sum()),
                float(num_P.sum()) * gain_PG.shape[1],
            ),
            "reward/baseline_skipped": (float(self._cancels), 1.0),
        }
        return Rewarded(
            reward_PG, sums, {"thought": thought, "no_think": no_think, "gain": gain_PG.tolist()}
        )

    @property
    def _cancels(self) -> bool:
        """Whether another model's baseline is left out: the reward is then the log-probability per token alone."""
        return self.centred and self.clip is None and self.baseline in ("ema", "frozen")

    def _policy(self, groups: Sequence[Group]) -> PolicyScores:
        no_think = self.scorers["policy"].trunks(no_think_spans(groups))
        return PolicyScores(self._thoughts("policy", groups), no_think)

    def _thoughts(self, name: str, groups: Sequence[Group]) -> list[Scores]:
        pairs = [
            (group.prompt.trunk, thought_branch(group.prompt, self.markers, rollout.thought_ids))
            for group in groups
            for rollout in group.rollouts
        ]
        return self.scorers[name].branches(pairs)

    def _baseline(
        self, groups: Sequence[Group], no_think: list[Scores]
    ) -> Float[np.ndarray, " P"] | None:
        if self.baseline == "none" or self._cancels:
            return None
        if self.baseline == "policy":
            return _sums(no_think)
        return _sums(self.scorers[self.baseline].trunks(no_think_spans(groups)))


@dataclass(frozen=True)
class PrefixMatchReward:
    """See `rlpt.stages.PrefixMatchReward`."""

    token_bytes: Sequence[bytes]
    closer: int

    def __call__(self, groups: Sequence[Group], policy: PolicyScores | None = None) -> Rewarded:
        reward_PG = np.array(
            [[self._match(group, g) for g in range(len(group.rollouts))] for group in groups]
        )
        return Rewarded(
            reward_PG, {"reward/match": (float(reward_PG.sum()), float(reward_PG.size))}
        )

    def _match(self, group: Group, g: int) -> float:
        predicted = [
            int(index) for index in group.rollouts[g].prediction_ids if index != self.closer
        ]
        gold = [self.token_bytes[int(index)] for index in group.prompt.continuation_ids]
        return prefix_match(b"".join(self.token_bytes[index] for index in predicted), gold)


def _totals(scores: Sequence[Scores], groups: Sequence[Group]) -> Float[np.ndarray, "P G"]:
    width = len(groups[0].rollouts) if groups else 1
    return _sums(scores).reshape(len(groups), width)


def _sums(scores: Sequence[Scores]) -> Float[np.ndarray, " P"]:
    return np.array([score.total for score in scores], dtype=np.float64)
