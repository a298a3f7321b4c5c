"""Match rewards: is what the policy predicts the held-out text? 0 or 1, compared as raw bytes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Literal

import numpy as np

from rlpt.reward.base import Kit, PolicyScores, RewardBase, Rewarded, mean_of
from rlpt.types import Group


class MatchReward(RewardBase):
    """1 where the prediction's bytes match the held-out text's, else 0. An empty prediction scores 0."""

    kind: Literal["match"]
    how: Literal["prefix", "first_token", "span"] = "prefix"
    """prefix: the prediction is a prefix of the held-out bytes that ends where a gold token ends (RPT). first_token: it
    begins with the first gold token's bytes. span: it is the whole held-out text, but for spaces around it."""

    def build(self, kit: Kit) -> "Compared":
        return Compared(self.kind, MATCHES[self.how], kit)


def prefix_match(prediction: bytes, gold_tokens: Sequence[bytes]) -> float:
    """1 iff the prediction is a prefix of the gold bytes and ends where a gold token ends, else 0.

    RPT, arXiv 2506.08007, Eq. 3. Bytes, so that another tokenisation of the right text is right. An
    empty prediction scores 0. The caller keeps the gold at least as long as any prediction.
    """
    if not prediction or not b"".join(gold_tokens).startswith(prediction):
        return 0.0
    return float(len(prediction) in set(accumulate(len(token) for token in gold_tokens)))


def first_token_match(prediction: bytes, gold_tokens: Sequence[bytes]) -> float:
    """1 iff the prediction begins with the bytes of the first gold token (RPT, appendix A)."""
    first = next((token for token in gold_tokens if token), b"")
    return float(bool(first) and prediction.startswith(first))


def span_match(prediction: bytes, gold_tokens: Sequence[bytes]) -> float:
    """1 iff prediction and gold are the same text, but for spaces around them (PretrainZero, arXiv 2512.03442)."""
    gold = b"".join(gold_tokens).strip()
    return float(bool(gold) and prediction.strip() == gold)


MATCHES: dict[str, Callable[[bytes, Sequence[bytes]], float]] = {
    "prefix": prefix_match,
    "first_token": first_token_match,
    "span": span_match,
}


@dataclass(frozen=True)
class Compared:
    """A reward that is a function of the predicted bytes and the bytes of the gold tokens; logged under its name."""

    name: str
    compare: Callable[[bytes, Sequence[bytes]], float]
    kit: Kit

    @cached_property
    def _token_bytes(self) -> Sequence[bytes]:
        return self.kit.token_bytes()

    def __call__(self, groups: Sequence[Group], policy: PolicyScores | None = None) -> Rewarded:
        width = len(groups[0].rollouts) if groups else 0
        values = [self._value(group, g) for group in groups for g in range(width)]
        reward_PG = np.array(values, dtype=np.float64).reshape(len(groups), width)
        return Rewarded(reward_PG, mean_of(f"reward/{self.name}", reward_PG))

    def _value(self, group: Group, g: int) -> float:
        prediction = predicted(group, g, self.kit.markers.closer, self._token_bytes)
        gold = [self._token_bytes[int(index)] for index in group.prompt.continuation_ids]
        return self.compare(prediction, gold)


def predicted(group: Group, g: int, closer: int, token_bytes: Sequence[bytes]) -> bytes:
    """The bytes of what a rollout predicts, without the closer that ends it; in a chat, of what is marked as answer."""
    ids = [int(index) for index in group.rollouts[g].prediction_ids if index != closer]
    said = b"".join(token_bytes[index] for index in ids)
    marks = group.prompt.frame.answer
    return said if marks is None else answer(said, *marks)


def answer(said: bytes, opened: bytes, closed: bytes) -> bytes:
    """What stands in the last whole pair of marks; nothing where there is none."""
    before, found, _ = said.rpartition(closed)
    _, mark, inside = before.rpartition(opened)
    if not found or not mark:
        return b""
    return inside.partition(closed)[0]
