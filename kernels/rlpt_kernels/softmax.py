"""A softmax in parts: what one part of the vocabulary knows of N rows, how parts merge, and how gradients come back.

Per row: the maximum m, the sum s = sum_v exp(z_v - m), the moment u = sum_v exp(z_v - m)(z_v - m)
and the target's score. When the maximum moves by d, s becomes s e^-d and u becomes e^-d (u - d s). Then
log p = (z_target - m) - log s and H = log s - u / s: differences to the maximum, so large scores cost no digits.
Back: with p = exp(z - m) / s, dz = p (g_lse - g_logp - g_H (log p + H)) + g_logp [v = target].
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlpt_kernels.head import Problem

BASE_E, BASE_2 = 1.0, math.log(2.0)
"""Units of scores, in nats: kernels on the GPU count in base 2, torch in base e."""


@dataclass
class Softmax:
    """The running softmax of N rows over the ids seen so far. Scores are in units of ``unit`` nats."""

    max_N: Float[Tensor, " N"]
    sum_N: Float[Tensor, " N"]
    target_N: Float[Tensor, " N"]
    """The target's score; -inf while it has not been seen, or where it is banned."""
    moment_N: Float[Tensor, " N"] | None
    argmax_N: Int[Tensor, " N"] | None
    unit: float = BASE_E

    @classmethod
    def empty(cls, problem: Problem, entropy: bool, argmax: bool) -> "Softmax":
        """Nothing seen yet."""
        zero_N = problem.hidden_ND.new_zeros(len(problem.hidden_ND), dtype=problem.dtype)
        lowest_N = torch.full_like(zero_N, -torch.inf)
        argmax_N = torch.zeros_like(zero_N, dtype=torch.long) if argmax else None
        return cls(lowest_N, zero_N, lowest_N, zero_N if entropy else None, argmax_N)

    def add(self, score_NS: Float[Tensor, "N S"], target_N: Int[Tensor, " N"], start: int) -> None:
        """Fold in the ids from ``start``. Overwrites the scores."""
        inside_N, column_N1 = columns(target_N, start, score_NS.shape[1])
        self.target_N = torch.where(inside_N, score_NS.gather(1, column_N1)[:, 0], self.target_N)
        best_N = score_NS.amax(dim=1)
        if self.argmax_N is not None:
            # Strictly above: the lowest of equal ids wins, as in the reference.
            where_N = score_NS.argmax(dim=1) + start
            self.argmax_N = torch.where(best_N > self.max_N, where_N, self.argmax_N)
        self.raise_max(torch.maximum(self.max_N, best_N))
        self._add_shifted(score_NS.sub_(finite(self.max_N)[:, None]))

    def merge(self, other: "Softmax") -> None:
        """Fold in another part of the vocabulary; its ids come after those seen so far."""
        if self.argmax_N is not None and other.argmax_N is not None:
            above_N = other.max_N > self.max_N
            self.argmax_N = torch.where(above_N, other.argmax_N, self.argmax_N)
        max_N = torch.maximum(self.max_N, other.max_N)
        self.raise_max(max_N)
        other.raise_max(max_N)
        self.sum_N = self.sum_N + other.sum_N
        self.target_N = torch.maximum(self.target_N, other.target_N)
        if self.moment_N is not None and other.moment_N is not None:
            self.moment_N = self.moment_N + other.moment_N

    def raise_max(self, max_N: Float[Tensor, " N"]) -> None:
        """Count from a new maximum."""
        # Before the first finite score, sum and moment are 0 and the shift does not matter.
        shift_N = torch.where(torch.isneginf(self.max_N), 0.0, max_N - self.max_N)
        scale_N = (-shift_N * self.unit).exp()
        if self.moment_N is not None:
            self.moment_N = scale_N * (self.moment_N - shift_N * self.sum_N)
        self.sum_N = scale_N * self.sum_N
        self.max_N = max_N

    def _add_shifted(self, shifted_NS: Float[Tensor, "N S"]) -> None:
        if self.moment_N is not None:
            # p log p is 0 at p = 0, where exp(-inf) * -inf would be NaN.
            weighted_NS = finite(shifted_NS) * shifted_NS.exp()
            self.moment_N = self.moment_N + weighted_NS.sum(dim=1)
        self.sum_N = self.sum_N + shifted_NS.exp_().sum(dim=1)

    def logp(self) -> Float[Tensor, " N"]:
        """log p of the target in nats; -inf where it has no score."""
        found_N = (self.target_N - self.max_N) * self.unit - self.sum_N.log()
        # A maximum may pass over a NaN; a sum never does, and must not be hidden by a target that was not found.
        dead_N = torch.isneginf(self.target_N) & ~torch.isnan(self.sum_N)
        return torch.where(dead_N, -torch.inf, found_N)

    def logsumexp(self) -> Float[Tensor, " N"]:
        """In nats."""
        return self.max_N * self.unit + self.sum_N.log()

    def entropy(self) -> Float[Tensor, " N"] | None:
        """In nats; None where it was not asked for."""
        if self.moment_N is None:
            return None
        return self.sum_N.log() - self.moment_N * self.unit / self.sum_N


def concatenated(parts: list[Softmax]) -> Softmax:
    """The same softmax over the rows of all parts."""
    if len(parts) == 1:
        return parts[0]

    def joined(name: str) -> Tensor | None:
        values = [getattr(part, name) for part in parts]
        return None if values[0] is None else torch.cat(values)

    names = ("max_N", "sum_N", "target_N", "moment_N", "argmax_N")
    return Softmax(*(joined(name) for name in names), unit=parts[0].unit)  # pyright: ignore


@dataclass(frozen=True)
class Pull:
    """Gradients of the outputs, ready to be pulled back to the scores of one slab."""

    target_N: Int[Tensor, " N"]
    max_N: Float[Tensor, " N"]
    sum_N: Float[Tensor, " N"]
    factor_N: Float[Tensor, " N"]
    """g_lse - g_logp: what both send through every id of a row, in proportion to p."""
    live_N: Float[Tensor, " N"]
    """g_logp where the target is scored and possible, else 0."""
    entropy_factor_N: Float[Tensor, " N"] | None
    """g_H; None where the entropy has no gradient."""
    entropy_N: Float[Tensor, " N"] | None
    unit: float

    def scores(self, score_NS: Float[Tensor, "N S"], start: int) -> Float[Tensor, "N S"]:
        """The gradient of one slab of scores, which it overwrites."""
        shifted_NS = score_NS.sub_(self.max_N[:, None])
        factor_N1 = self.factor_N[:, None]
        if self.entropy_factor_N is not None and self.entropy_N is not None:
            surprise_NS = finite(shifted_NS) + (self.entropy_N - self.sum_N.log())[:, None]
            factor_N1 = factor_N1 - self.entropy_factor_N[:, None] * surprise_NS
        d_score_NS = shifted_NS.exp_().mul_(factor_N1 / self.sum_N[:, None])
        inside_N, column_N1 = columns(self.target_N, start, score_NS.shape[1])
        return d_score_NS.scatter_add_(1, column_N1, (self.live_N * inside_N)[:, None])

    def of_rows(self, index_K: Int[Tensor, " K"] | slice) -> "Pull":
        """The same for some of the rows."""

        def picked(value_N: Tensor | None) -> Tensor | None:
            return None if value_N is None else value_N[index_K]

        values = (self.target_N, self.max_N, self.sum_N, self.factor_N, self.live_N)
        rest = (self.entropy_factor_N, self.entropy_N)
        return Pull(*(x[index_K] for x in values), *map(picked, rest), unit=self.unit)

    def packed(self) -> Float[Tensor, "6 N"]:
        """max, log2 sum, factor, live, entropy factor, entropy: as the kernels read them, base 2."""
        zero_N = torch.zeros_like(self.max_N)
        extra = [zero_N if x is None else x for x in (self.entropy_factor_N, self.entropy_N)]
        return torch.stack([self.max_N, self.sum_N.log2(), self.factor_N, self.live_N, *extra])


def finite(value: Tensor) -> Tensor:
    """0 in place of -inf."""
    return value.masked_fill(torch.isneginf(value), 0.0)


def columns(
    target_N: Int[Tensor, " N"], start: int, width: int
) -> tuple[Bool[Tensor, " N"], Int[Tensor, "N 1"]]:
    """Rows whose target is among the ids from ``start``, and a column that is safe to gather."""
    inside_N = (target_N >= start) & (target_N < start + width)
    return inside_N, torch.where(inside_N, target_N - start, 0)[:, None]
