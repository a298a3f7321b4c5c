"""What every reward is: groups in, one number per rollout out. Scorers are handed in; nothing here knows about ranks,
engines or files.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float

from rlpt.types import Branch, Group, Ids, Markers, Prompt, Scores, Sums, Trunk, bare_branch
from rlpt_data.strict import Strict


@runtime_checkable
class Scorer(Protocol):
    """Log-probabilities of given tokens under one model, markers removed from the softmax, T = 1."""

    def branches(self, pairs: Sequence[tuple[Trunk, Branch]]) -> list[Scores]: ...

    def trunks(self, spans: Sequence[tuple[Trunk, int, int]]) -> list[Scores]: ...


@dataclass(frozen=True)
class Rewarded:
    """Rewards of this rank's groups, and what is worth logging, as sums and counts."""

    reward_PG: Float[np.ndarray, "P G"]
    sums: Sums
    detail: dict[str, list] = field(default_factory=dict)
    """For the rollout dump: per-token log-probabilities, where the reward has them."""
    kept_PG: Bool[np.ndarray, "P G"] | None = None
    """Rollouts that count; the others are neither compared with nor trained on. None: all."""
    gold_PG: Float[np.ndarray, "P G"] | None = None
    """log p(y | x, opener, z, closer) under the current policy, where it is known: the gold term is weighted by it."""


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


class RewardBase(Strict):
    """What a stage asks of every reward's configuration. The defaults are of a reward that looks at predictions."""

    predicts: ClassVar[bool] = True
    """Whether the policy writes a prediction after the closer."""
    within_text: ClassVar[bool] = True
    """Whether a prediction longer than the held-out text could not be compared with it."""

    @property
    def signed(self) -> bool:
        """Whether rewards may be negative: advantages that divide by their mean refuse them."""
        return False

    @property
    def relative(self) -> bool:
        """Whether rounding is a share of the reward, as of a probability, and not a number of nats."""
        return False

    @property
    def compares(self) -> bool:
        """Whether a rollout's reward depends on its siblings."""
        return False

    @property
    def averages(self) -> bool:
        """Whether it is a mean over the continuation tokens, of which rounding is known."""
        return False

    def replicas(self, centred: bool) -> frozenset[str]:
        """Of "ema" and "frozen", the copies of the policy that it needs. ``centred``: see `Kit`."""
        return frozenset()

    def skips(self, centred: bool) -> str | None:
        """What is left out because it cannot matter, in words."""
        return None

    def why_separate(self, centred: bool) -> str | None:
        """Why the policy's scores cannot be read off the forward that is trained; None where they can."""
        return f"reward {self.kind} scores no held-out text"  # pyright: ignore[reportAttributeAccessIssue]

    def passes(self, read: bool, centred: bool) -> tuple[int, int]:
        """How often all thoughts are scored, and all trunks; ``read``: the policy's scores come with the training."""
        return 0, 0

    def refuse_unready(self) -> None:
        """Raises UserError where something outside that the reward needs is not there."""


@dataclass(frozen=True)
class Kit:
    """What a reward may be built from."""

    scorers: Mapping[str, Scorer]
    """By name: "policy", and of "ema", "frozen" and "foreign" those that the stage's configuration asks for."""
    markers: Markers
    centred: bool
    """Whether advantages subtract a statistic of the group: a number per prompt then drops out, and is skipped."""
    token_bytes: Callable[[], Sequence[bytes]] = tuple
    """Bytes of every id, b"" for ids that stand for no text."""
    separator: Ids | None = None
    """What stands for both markers where "foreign" has none of its own."""
    noise: float = 0.0
    """Standard deviation that rounding alone gives a mean over the continuation; 0: exact."""


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
    whole = (
        _whole([getattr(part, name) for part in parts], order) for name in ("kept_PG", "gold_PG")
    )
    return Rewarded(np.concatenate([part.reward_PG for part in parts])[order], sums, detail, *whole)


def _whole(parts: Sequence[np.ndarray | None], order: np.ndarray) -> np.ndarray | None:
    """All parts have the array, or none does."""
    present = [part for part in parts if part is not None]
    return np.concatenate(present)[order] if present else None


def bare_scores(scorer: Scorer, prompts: Sequence[Prompt]) -> list[Scores]:
    """log p(y | x): off the trunk, or where a frame stands between text and answer, off a branch without a thought."""
    if any(prompt.frame.between for prompt in prompts):
        return scorer.branches([(prompt.trunk, bare_branch(prompt)) for prompt in prompts])
    return scorer.trunks([(p.trunk, p.cut, p.cut + p.horizon) for p in prompts])


def mean_of(name: str, value: np.ndarray) -> Sums:
    """A metric that is the mean of all values of all ranks."""
    return {name: (float(value.sum()), float(value.size))}
