"""Exact float32 without N x V: vocabulary slabs, an online softmax, a backward that recomputes.

The forward keeps per row the running maximum m, the sum s = sum_v exp(z_v - m), the moment
u = sum_v exp(z_v - m) (z_v - m) and the target's score. When the maximum moves by d, s becomes
s e^-d and u becomes e^-d (u - d s). Then log p = (z_target - m) - log s and H = log s - u / s:
differences to the maximum, so large scores cost no digits.

The backward visits the slabs again, with p = exp(z - m) / s:
dz = p (g_lse - g_logp - g_H (log p + H)) + g_logp [v = target].
Each slab of dW is written once; dH is accumulated in float32.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlpt_kernels.head import (
    Head,
    LogProb,
    Wanted,
    compute_dtype,
    logits,
    over_temperature,
    scores,
)

SLAB = 2048
"""Ids per slab. Constant: every batch then sums over the vocabulary in the same order."""


def linear_logprob_slabs(
    hidden_ND: Float[Tensor, "N D"],
    weight_VD: Float[Tensor, "V D"],
    bias_V: Float[Tensor, " V"] | None,
    target_N: Int[Tensor, " N"],
    head: Head,
    wanted: Wanted,
) -> LogProb:
    """See ``linear_logprob``; ``check`` has passed."""
    with torch.autocast(hidden_ND.device.type, enabled=False):
        found = _Slabs.apply(hidden_ND, weight_VD, bias_V, target_N, head, wanted)
    return LogProb(*found)


@dataclass
class _Softmax:
    """The running softmax of N rows over the slabs seen so far."""

    max_N: Float[Tensor, " N"]
    sum_N: Float[Tensor, " N"]
    target_N: Float[Tensor, " N"]
    moment_N: Float[Tensor, " N"] | None
    argmax_N: Int[Tensor, " N"] | None

    @classmethod
    def empty(cls, hidden_ND: Tensor, dtype: torch.dtype, wanted: Wanted) -> "_Softmax":
        zero_N = torch.zeros(len(hidden_ND), dtype=dtype, device=hidden_ND.device)
        lowest_N = torch.full_like(zero_N, -torch.inf)
        moment_N = zero_N if wanted.entropy else None
        argmax_N = torch.zeros_like(zero_N, dtype=torch.long) if wanted.argmax else None
        return cls(lowest_N, zero_N, lowest_N, moment_N, argmax_N)

    def add(self, score_NS: Float[Tensor, "N S"], target_N: Int[Tensor, " N"], start: int) -> None:
        """Fold in the ids from ``start``. Overwrites the scores."""
        inside_N, column_N1 = _columns(target_N, start, score_NS.shape[1])
        self.target_N = torch.where(inside_N, score_NS.gather(1, column_N1)[:, 0], self.target_N)
        best_N = score_NS.amax(dim=1)
        if self.argmax_N is not None:
            # Strictly above: the lowest of equal ids wins, as in the reference.
            where_N = score_NS.argmax(dim=1) + start
            self.argmax_N = torch.where(best_N > self.max_N, where_N, self.argmax_N)
        self._raise_max(torch.maximum(self.max_N, best_N))
        self._add_shifted(score_NS.sub_(_finite(self.max_N)[:, None]))

    def _raise_max(self, max_N: Float[Tensor, " N"]) -> None:
        # Before the first finite score, sum and moment are 0 and the shift does not matter.
        shift_N = torch.where(torch.isneginf(self.max_N), 0.0, max_N - self.max_N)
        scale_N = (-shift_N).exp()
        if self.moment_N is not None:
            self.moment_N = scale_N * (self.moment_N - shift_N * self.sum_N)
        self.sum_N = scale_N * self.sum_N
        self.max_N = max_N

    def _add_shifted(self, shifted_NS: Float[Tensor, "N S"]) -> None:
        if self.moment_N is not None:
            # p log p is 0 at p = 0, where exp(-inf) * -inf would be NaN.
            weighted_NS = _finite(shifted_NS) * shifted_NS.exp()
            self.moment_N = self.moment_N + weighted_NS.sum(dim=1)
        self.sum_N = self.sum_N + shifted_NS.exp_().sum(dim=1)


def _finite(value: Tensor) -> Tensor:
    return value.masked_fill(torch.isneginf(value), 0.0)


def _columns(
    target_N: Int[Tensor, " N"], start: int, width: int
) -> tuple[Bool[Tensor, " N"], Int[Tensor, "N 1"]]:
    """Rows whose target is among the ids from ``start``, and a column that is safe to gather."""
    inside_N = (target_N >= start) & (target_N < start + width)
    return inside_N, torch.where(inside_N, target_N - start, 0)[:, None]


class _Slabs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        target_N: Tensor,
        head: Head,
        wanted: Wanted,
    ) -> tuple[Tensor | None, ...]:
        target_N = target_N.long()
        softmax = _Softmax.empty(hidden_ND, compute_dtype(hidden_ND, weight_VD), wanted)
        for start, _, score_NS in _walk(hidden_ND, weight_VD, bias_V, head):
            softmax.add(score_NS, target_N, start)
        ignored_N, dead_N = target_N == head.ignore_index, torch.isneginf(softmax.target_N)
        log_sum_N = softmax.sum_N.log()
        logp_N = torch.where(dead_N, -torch.inf, softmax.target_N - softmax.max_N - log_sum_N)
        entropy_N = None
        if softmax.moment_N is not None:
            entropy_N = log_sum_N - softmax.moment_N / softmax.sum_N
        rank_N = None
        if wanted.rank:
            rank_N = _rank(hidden_ND, weight_VD, bias_V, head, softmax.target_N)
            rank_N = rank_N.masked_fill(ignored_N, -1)
        ctx.head, ctx.live_N = head, ~(ignored_N | dead_N)
        ctx.save_for_backward(
            hidden_ND, weight_VD, bias_V, target_N, softmax.max_N, softmax.sum_N, entropy_N
        )
        ctx.mark_non_differentiable(*(x for x in (softmax.argmax_N, rank_N) if x is not None))
        ctx.set_materialize_grads(False)
        logp_N = logp_N.masked_fill(ignored_N, 0.0)
        return logp_N, softmax.max_N + log_sum_N, entropy_N, softmax.argmax_N, rank_N

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] (the decorator hides names)
        ctx: Any, *grads: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        hidden_ND, weight_VD, bias_V, target_N, max_N, sum_N, entropy_N = ctx.saved_tensors
        dtype = compute_dtype(hidden_ND, weight_VD)
        wide_ND = hidden_ND.to(dtype)
        pull = _Pull(target_N, ctx.live_N, max_N, sum_N, entropy_N, *grads[:3])
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        # Gradients of half-precision inputs are rounded once, at the end.
        d_hidden_ND = torch.zeros_like(hidden_ND, dtype=dtype) if need_hidden else None
        d_weight_VD = torch.empty_like(weight_VD) if need_weight else None
        d_bias_V = torch.empty_like(bias_V) if need_bias else None
        with torch.autocast(hidden_ND.device.type, enabled=False):
            for start, raw_NS, score_NS in _walk(hidden_ND, weight_VD, bias_V, ctx.head):
                d_raw_NS = _through_head(pull.scores(score_NS, start), raw_NS, ctx.head)
                slab = slice(start, start + d_raw_NS.shape[1])
                if d_hidden_ND is not None:
                    d_hidden_ND.addmm_(d_raw_NS, weight_VD[slab].to(dtype))
                if d_weight_VD is not None:
                    d_weight_VD[slab] = d_raw_NS.T @ wide_ND
                if d_bias_V is not None:
                    d_bias_V[slab] = d_raw_NS.sum(dim=0)
        d_hidden_ND = d_hidden_ND.to(hidden_ND.dtype) if d_hidden_ND is not None else None
        return d_hidden_ND, d_weight_VD, d_bias_V, None, None, None


@dataclass(frozen=True)
class _Pull:
    """Gradients of the outputs, ready to be pulled back to the scores of one slab."""

    target_N: Int[Tensor, " N"]
    live_N: Bool[Tensor, " N"]
    max_N: Float[Tensor, " N"]
    sum_N: Float[Tensor, " N"]
    entropy_N: Float[Tensor, " N"] | None
    d_logp_N: Float[Tensor, " N"] | None
    d_logsumexp_N: Float[Tensor, " N"] | None
    d_entropy_N: Float[Tensor, " N"] | None

    def scores(self, score_NS: Float[Tensor, "N S"], start: int) -> Float[Tensor, "N S"]:
        """The gradient of one slab of scores, which it overwrites."""
        shifted_NS = score_NS.sub_(self.max_N[:, None])
        factor_N1 = self._softmax_factor()[:, None]
        if self.d_entropy_N is not None and self.entropy_N is not None:
            surprise_NS = _finite(shifted_NS) + (self.entropy_N - self.sum_N.log())[:, None]
            factor_N1 = factor_N1 - self.d_entropy_N[:, None] * surprise_NS
        d_score_NS = shifted_NS.exp_().mul_(factor_N1 / self.sum_N[:, None])
        inside_N, column_N1 = _columns(self.target_N, start, score_NS.shape[1])
        return d_score_NS.scatter_add_(1, column_N1, (self._live() * inside_N)[:, None])

    def _softmax_factor(self) -> Float[Tensor, " N"]:
        """g_lse - g_logp: what both send through every id of a row, in proportion to p."""
        return -self._live() if self.d_logsumexp_N is None else self.d_logsumexp_N - self._live()

    def _live(self) -> Float[Tensor, " N"]:
        if self.d_logp_N is None:
            return torch.zeros_like(self.max_N)
        return torch.where(self.live_N, self.d_logp_N, 0.0)


def _walk(
    hidden_ND: Float[Tensor, "N D"],
    weight_VD: Float[Tensor, "V D"],
    bias_V: Float[Tensor, " V"] | None,
    head: Head,
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield (start, logits, scores) of one slab of the vocabulary after another."""
    hidden_ND = hidden_ND.to(compute_dtype(hidden_ND, weight_VD))
    for start in range(0, len(weight_VD), SLAB):
        slab = slice(start, start + SLAB)
        raw_NS = logits(hidden_ND, weight_VD[slab], None if bias_V is None else bias_V[slab])
        yield start, raw_NS, scores(raw_NS, head, start)


def _through_head(
    d_score_NS: Float[Tensor, "N S"], raw_NS: Float[Tensor, "N S"], head: Head
) -> Float[Tensor, "N S"]:
    """From scores back through temperature and softcap to logits."""
    d_raw_NS = over_temperature(d_score_NS, head.temperature)
    if head.softcap is None:
        return d_raw_NS
    return d_raw_NS * (1 - torch.tanh(raw_NS / head.softcap).square())


def _rank(
    hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, head: Head, target_N: Tensor
) -> Int[Tensor, " N"]:
    """A second walk: the target's score must be known before scores above it can be counted."""
    above_N = torch.zeros(len(hidden_ND), dtype=torch.long, device=hidden_ND.device)
    for _, _, score_NS in _walk(hidden_ND, weight_VD, bias_V, head):
        above_N += (score_NS > target_N[:, None]).sum(dim=1)
    return above_N
