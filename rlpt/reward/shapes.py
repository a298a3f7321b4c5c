"""Shapes: what a reward goes through, one after the other, before advantages are taken. Pure, float64.

A shape is affine where it adds or multiplies numbers that all thoughts of a prompt share: a baseline then still drops
out of centred advantages.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import numpy as np
from jaxtyping import Float
from pydantic import Field, model_validator

from rlpt.types import Group
from rlpt_data.strict import Strict

Values = Float[np.ndarray, "P G"]
Rate = Annotated[float, Field(gt=0.0)]


@dataclass(frozen=True)
class Lengths:
    """Of every prompt's continuation."""

    tokens_P: Float[np.ndarray, " P"]
    bytes_P: Float[np.ndarray, " P"]
    noise: float = 0.0
    """Standard deviation that rounding alone gives a mean over the continuation."""

    @classmethod
    def of(cls, groups: Sequence[Group], noise: float = 0.0) -> "Lengths":
        prompts = [group.prompt for group in groups]
        tokens = np.array([prompt.horizon for prompt in prompts], dtype=np.float64)
        held_out = np.array([p.continuation_bytes for p in prompts], dtype=np.float64)
        return cls(tokens, held_out, noise)


class Relu(Strict):
    """max(0, r - threshold): RLPR's threshold_0, NRT's max(0, R - R_base)."""

    kind: Literal["relu"]
    threshold: float = 0.0
    affine: ClassVar[bool] = False

    def __call__(self, reward_PG: Values, lengths: Lengths) -> Values:
        return np.maximum(0.0, reward_PG - self.threshold)


class Clip(Strict):
    """The reward inside +-limit, before any centring."""

    kind: Literal["clip"]
    limit: Rate
    affine: ClassVar[bool] = False

    def __call__(self, reward_PG: Values, lengths: Lengths) -> Values:
        return np.clip(reward_PG, -self.limit, self.limit)


class Tanh(Strict):
    """tanh(r / scale)."""

    kind: Literal["tanh"]
    scale: Rate = 1.0
    affine: ClassVar[bool] = False

    def __call__(self, reward_PG: Values, lengths: Lengths) -> Values:
        return np.tanh(reward_PG / self.scale)


class Improvement(Strict):
    """100 (1 - exp(-r)): a gain in nats per token as the per cent that perplexity falls (VR-CLI, arXiv 2503.22828)."""

    kind: Literal["improvement"]
    affine: ClassVar[bool] = False

    def __call__(self, reward_PG: Values, lengths: Lengths) -> Values:
        return -100.0 * np.expm1(-reward_PG)


class Buckets(Strict):
    """values[k] where k of the edges are reached (r >= edge)."""

    kind: Literal["buckets"]
    edges: Annotated[tuple[float, ...], Field(min_length=1)]
    values: tuple[float, ...]
    affine: ClassVar[bool] = False

    @model_validator(mode="after")
    def _one_more_value(self) -> "Buckets":
        if list(self.edges) != sorted(set(self.edges)):
            raise ValueError(f"edges = {list(self.edges)} must rise")
        if len(self.values) != len(self.edges) + 1:
            raise ValueError(
                f"{len(self.edges)} edges make {len(self.edges) + 1} buckets; got {len(self.values)} values"
            )
        return self

    def __call__(self, reward_PG: Values, lengths: Lengths) -> Values:
        return np.asarray(self.values)[np.searchsorted(self.edges, reward_PG, side="right")]


class Rank(Strict):
    """The share of the group that a thought is not below: (G - rank) / G, rank 0 the best (NOVER, arXiv 2505.16022).

    Thoughts that tie share the mean of their ranks.
    """

    kind: Literal["rank"]
    ties: Literal["exact", "noise"] = "exact"
    """noise: any two that the rounding of the policy's dtype might make of one mean over the continuation tie."""
    affine: ClassVar[bool] = False

    def __call__(self, reward_PG: Values, lengths: Lengths) -> Values:
        ahead_PGG = reward_PG[:, None, :] - reward_PG[:, :, None]
        least = lengths.noise if self.ties == "noise" else 0.0
        above_PG = (ahead_PGG > least).sum(axis=2)
        tied_PG = (np.abs(ahead_PGG) <= least).sum(axis=2) - 1
        size = reward_PG.shape[1]
        return (size - above_PG - tied_PG / 2) / size


class PerByte(Strict):
    """A reward per token as one per byte: times tokens, over bytes."""

    kind: Literal["per_byte"]
    affine: ClassVar[bool] = True

    def __call__(self, reward_PG: Values, lengths: Lengths) -> Values:
        return reward_PG * (lengths.tokens_P / lengths.bytes_P)[:, None]


class Scale(Strict):
    """factor x r."""

    kind: Literal["scale"]
    factor: float
    affine: ClassVar[bool] = True

    def __call__(self, reward_PG: Values, lengths: Lengths) -> Values:
        return self.factor * reward_PG


Shape = Annotated[
    Relu | Clip | Tanh | Improvement | Buckets | Rank | PerByte | Scale, Field(discriminator="kind")
]


def shaped(reward_PG: Values, shapes: Sequence[Shape], lengths: Lengths) -> Values:
    """Through all shapes, in order."""
    for shape in shapes:
        reward_PG = shape(reward_PG, lengths)
    return reward_PG
