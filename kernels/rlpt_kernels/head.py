"""How hidden states become scores: the one definition that every implementation shares.

score = softcap * tanh((hidden @ weight + bias) / softcap) / temperature, and -inf where an id is
banned. All of it happens in float32 (float64 where an input is float64), under autocast too: a
reward is a difference of log-probabilities, and bfloat16 logits are wrong by more than many rewards
are large.
"""

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor


class LogProb(NamedTuple):
    """What is known of N targets. Everything is natural-log, float32 unless an input is float64."""

    logp: Float[Tensor, " N"]
    """log softmax(score)[target]; 0 where the target is ignored, -inf where it is banned."""
    logsumexp: Float[Tensor, " N"]
    """log sum_v exp(score_v), defined for every row: it does not depend on the target."""
    entropy: Float[Tensor, " N"] | None
    """-sum_v p_v log p_v in nats, for every row."""
    argmax: Int[Tensor, " N"] | None
    """The likeliest id that is not banned; the lowest of equals."""
    rank: Int[Tensor, " N"] | None
    """How many ids score strictly above the target: 0 is the best, -1 means ignored."""


@dataclass(frozen=True)
class Head:
    """What happens to ``hidden @ weight`` on its way to the softmax."""

    temperature: float | Float[Tensor, " N"] = 1.0
    softcap: float | None = None
    banned: tuple[int, ...] = ()
    """Rows of the weight at hand that are outside the softmax: probability 0, and no gradient. In order."""
    banned_B: Int[Tensor, " B"] | None = None
    """The same on the device, copied there once a call; None without bans."""

    @classmethod
    def of(
        cls,
        temperature: float | Float[Tensor, " N"],
        softcap: float | None,
        banned: Iterable[int],
        device: torch.device,
    ) -> "Head":
        """With its bans in order and on the device."""
        ordered = tuple(sorted(set(banned)))
        banned_B = torch.tensor(ordered, device=device) if ordered else None
        return cls(temperature, softcap, ordered, banned_B)

    def columns(self, start: int, width: int) -> Int[Tensor, " B"] | None:
        """Which of the ids from ``start`` are banned, counted from there; None where none are."""
        first, last = bisect_left(self.banned, start), bisect_left(self.banned, start + width)
        if self.banned_B is None or first == last:
            return None
        return self.banned_B[first:last] - start

    def scale(self, like_ND: Float[Tensor, "N D"], unit: float) -> Float[Tensor, " N"]:
        """1 / (temperature * unit) of every row, float32: kernels multiply."""
        if isinstance(self.temperature, Tensor):
            return (1.0 / (self.temperature.double() * unit)).float().contiguous()
        one = 1.0 / (self.temperature * unit)
        return torch.full((len(like_ND),), one, dtype=torch.float32, device=like_ND.device)

    def of_rows(self, index_K: Int[Tensor, " K"] | slice) -> "Head":
        """The head of some of the rows."""
        if not isinstance(self.temperature, Tensor):
            return self
        return replace(self, temperature=self.temperature[index_K])


@dataclass(frozen=True)
class Wanted:
    """Which optional outputs were asked for."""

    entropy: bool = False
    argmax: bool = False
    rank: bool = False


@dataclass(frozen=True)
class Problem:
    """One head over the vocabulary (or this rank's part of it), and the rows it is asked about."""

    hidden_ND: Float[Tensor, "N D"]
    weight_VD: Float[Tensor, "V D"]
    bias_V: Float[Tensor, " V"] | None
    target_N: Int[Tensor, " N"]
    """int64 rows of ``weight_VD``; -1 where a target is ignored or belongs to another rank."""
    head: Head

    @property
    def dtype(self) -> torch.dtype:
        """float32, or float64 where an input is: logits are never kept in half precision."""
        inputs = (self.hidden_ND, self.weight_VD)
        return torch.float64 if any(x.dtype == torch.float64 for x in inputs) else torch.float32

    @property
    def operand_dtype(self) -> torch.dtype:
        """What is multiplied: half precision where tensor cores multiply it exactly, else upcast first."""
        same = self.hidden_ND.dtype == self.weight_VD.dtype
        half = self.hidden_ND.dtype in (torch.float16, torch.bfloat16)
        return self.hidden_ND.dtype if self.hidden_ND.is_cuda and same and half else self.dtype

    def of_rows(self, index_K: Int[Tensor, " K"] | slice) -> "Problem":
        """The same head, asked about some of the rows."""
        return Problem(
            self.hidden_ND[index_K],
            self.weight_VD,
            self.bias_V,
            self.target_N[index_K],
            self.head.of_rows(index_K),
        )


class Needs(NamedTuple):
    """Which inputs want a gradient."""

    hidden: bool
    weight: bool
    bias: bool


@dataclass
class Gradients:
    """What a backward owes; None where nobody asked. dH and db are sums in progress, dW is final."""

    hidden_ND: Float[Tensor, "N D"] | None
    weight_VD: Float[Tensor, "V D"] | None
    bias_V: Float[Tensor, " V"] | None

    @classmethod
    def zeros(cls, problem: Problem, needs: Needs) -> "Gradients":
        """Sums in the problem's dtype; the weight's gradient in the weight's."""
        hidden_ND, weight_VD, dtype = problem.hidden_ND, problem.weight_VD, problem.dtype
        return cls(
            hidden_ND.new_zeros(hidden_ND.shape, dtype=dtype) if needs.hidden else None,
            weight_VD.new_zeros(weight_VD.shape) if needs.weight else None,
            weight_VD.new_zeros(len(weight_VD), dtype=dtype) if needs.bias else None,
        )


def scores(raw_NS: Float[Tensor, "N S"], head: Head, start: int) -> Float[Tensor, "N S"]:
    """Logits after softcap, temperature and bans: what the softmax sees. Without a softcap, in ``raw_NS`` itself."""
    score_NS = raw_NS
    if head.softcap is not None:
        score_NS = head.softcap * torch.tanh(raw_NS / head.softcap)
    score_NS = over_temperature(score_NS, head.temperature)
    columns = head.columns(start, score_NS.shape[1])
    return score_NS if columns is None else score_NS.index_fill_(1, columns, -torch.inf)


def over_temperature(
    value_NS: Float[Tensor, "N S"], temperature: float | Float[Tensor, " N"]
) -> Float[Tensor, "N S"]:
    """Divide rows by their temperature, in place."""
    if isinstance(temperature, Tensor):
        return value_NS.div_(temperature.to(value_NS.dtype)[:, None])
    return value_NS if temperature == 1.0 else value_NS.div_(temperature)


def through_head(
    d_score_NS: Float[Tensor, "N S"], raw_NS: Float[Tensor, "N S"], head: Head
) -> Float[Tensor, "N S"]:
    """From the gradient of scores back through temperature and softcap to that of logits, in place."""
    d_raw_NS = over_temperature(d_score_NS, head.temperature)
    if head.softcap is None:
        return d_raw_NS
    return d_raw_NS.mul_(1 - torch.tanh(raw_NS / head.softcap).square())
