"""The learned masker (PretrainZero, arXiv 2512.03442): the policy proposes spans of a paragraph, and predicts them.

A proposal is a rollout of a prompt that holds nothing out (horizon 0); its prediction is a span, copied. Equal ones of
a group share one mask, whose own group of predictions is in the same call of the reward.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Annotated, NamedTuple

import numpy as np
from pydantic import Field, model_validator

from rlpt.reward.base import PolicyScores, Reward, Rewarded, mean_of
from rlpt.reward.match import predicted
from rlpt.types import Group, Sums
from rlpt_data.strict import Strict

Positive = Annotated[int, Field(gt=0)]

REASONS = ("empty", "absent", "frequent", "torn", "short", "long", "edge")
"""Why a proposal is refused: it says nothing; is no text of the paragraph; occurs too often; does not begin and end
where tokens do; has too few or too many tokens; stands too near an end of the paragraph."""


class MaskerConfig(Strict):
    """The policy chooses what it predicts: a group of proposals a paragraph, and a group of predictions a mask."""

    instruction: Annotated[str, Field(pattern=r"\S")]
    """What asks for a proposal. In a chat the instruction in the place of `prompts.frame.instruction`; inline, where
    there is none, text between the paragraph and the thought."""
    min_tokens: Positive = 1
    max_tokens: Positive = 16
    """Of a span."""
    edge_tokens: Positive = 1
    """Least tokens of the paragraph before a span, and after it."""
    most_occurrences: Positive = 7
    """A span that occurs more often in its paragraph is refused; of several places the first that fits is masked."""

    @model_validator(mode="after")
    def _spans_exist(self) -> "MaskerConfig":
        if self.min_tokens > self.max_tokens:
            raise ValueError(
                f"masker.min_tokens = {self.min_tokens} exceeds max_tokens = {self.max_tokens}"
            )
        return self


class Span(NamedTuple):
    """Tokens [start, stop) of a paragraph."""

    start: int
    stop: int


def place(said: bytes, tokens: Sequence[bytes], cfg: MaskerConfig) -> Span | str:
    """The tokens of a paragraph that a proposal names, or which of `REASONS` speaks against it.

    Spaces around it do not count: those of its tokens that it leaves out are in the span.
    """
    wanted = said.strip()
    if not wanted:
        return "empty"
    # Looked ahead for: places may overlap.
    sought = b"(?=" + re.escape(wanted) + b")"
    at = [match.start() for match in re.finditer(sought, b"".join(tokens))]
    if not at:
        return "absent"
    if len(at) > cfg.most_occurrences:
        return "frequent"
    found = [_fitting(tokens, start, start + len(wanted), cfg) for start in at]
    return next((each for each in found if isinstance(each, Span)), found[0])


def _fitting(tokens: Sequence[bytes], at: int, end: int, cfg: MaskerConfig) -> Span | str:
    """The tokens that cover the bytes [at, end)."""
    edges = np.array([0, *accumulate(map(len, tokens))])
    start = int(np.searchsorted(edges, at, side="right")) - 1
    stop = int(np.searchsorted(edges, end, side="left"))
    whole, first = b"".join(tokens[start:stop]), at - edges[start]
    if (whole[:first] + whole[first + end - at :]).strip():
        return "torn"
    if stop - start < cfg.min_tokens:
        return "short"
    if stop - start > cfg.max_tokens:
        return "long"
    inside = cfg.edge_tokens <= start and stop <= len(tokens) - cfg.edge_tokens
    return Span(start, stop) if inside else "edge"


def difficulty(mean: float) -> float:
    """1 - the mean match of a mask's predictions, and 0 where none matches: noise is hard, too (PretrainZero)."""
    return 1.0 - mean if mean > 0 else 0.0


@dataclass(frozen=True)
class Placing:
    """Proposals -> places, alike for who asks for predictions and for who rewards."""

    cfg: MaskerConfig
    closer: int
    token_bytes: Callable[[], Sequence[bytes]]

    @cached_property
    def _token_bytes(self) -> Sequence[bytes]:
        return self.token_bytes()

    def __call__(self, group: Group) -> list[Span | str]:
        """Of every proposal of a paragraph."""
        tokens = [self._token_bytes[int(index)] for index in group.prompt.context_ids]
        said = (
            predicted(group, g, self.closer, self._token_bytes) for g in range(len(group.rollouts))
        )
        return [place(each, tokens, self.cfg) for each in said]


Mask = tuple[int, str, int, int]
"""Epoch, document, its first token there, and how many."""


@dataclass(frozen=True)
class Coupled:
    """Predictions get their own reward, proposals the difficulty of their mask, and 0 where they are refused."""

    reward: Reward
    placing: Placing

    def __call__(self, groups: Sequence[Group], policy: PolicyScores | None = None) -> Rewarded:
        """``groups``: paragraphs with the predictions of all their masks."""
        asked = [p for p, group in enumerate(groups) if not group.prompt.horizon]
        answered = [p for p, group in enumerate(groups) if group.prompt.horizon]
        rewarded = self.reward([groups[p] for p in answered], policy)
        solved = {
            (*groups[p].prompt.key, groups[p].prompt.horizon): float(reward_G.mean())
            for p, reward_G in zip(answered, rewarded.reward_PG, strict=True)
        }
        places = [self.placing(groups[p]) for p in asked]
        reward_PG = np.zeros((len(groups), len(groups[0].rollouts)))
        for p, reward_G in zip(answered, rewarded.reward_PG, strict=True):
            reward_PG[p] = reward_G
        for p, found in zip(asked, places, strict=True):
            reward_PG[p] = [self._worth(groups[p], each, solved) for each in found]
        sums = mean_of("reward/proposal", reward_PG[asked]) | _sums(places, solved)
        return Rewarded(reward_PG, rewarded.sums | sums)

    def _worth(self, group: Group, found: Span | str, solved: dict[Mask, float]) -> float:
        return difficulty(solved[mask_at(group, found)]) if isinstance(found, Span) else 0.0


def mask_at(group: Group, span: Span) -> Mask:
    """The name of a paragraph's mask."""
    trunk = group.prompt.trunk
    start = trunk.start + trunk.head + span.start
    return trunk.epoch, trunk.document, start, span.stop - span.start


def _sums(places: Sequence[Sequence[Span | str]], solved: dict[Mask, float]) -> Sums:
    """What became of the proposals, and of their masks."""
    counts = Counter(each for found in places for each in found if isinstance(each, str))
    every, masks = float(sum(map(len, places))), float(len(solved))
    means = list(solved.values())
    refused = {f"masker/{reason}": (float(counts[reason]), every) for reason in REASONS}
    return refused | {
        "masker/accepted": (every - counts.total(), every),
        "masker/masks": (masks, float(len(places))),
        "masker/tokens": (float(sum(mask[3] for mask in solved)), masks),
        "masker/never_solved": (float(means.count(0.0)), masks),
        "masker/always_solved": (float(means.count(1.0)), masks),
    }
