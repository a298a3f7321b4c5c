"""The definition of correct: full float32 logits, gradients by autograd. Memory N x V."""

from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlpt_kernels.head import LogProb, Problem, Wanted, scores
from rlpt_kernels.matmul import exact


class _Product(torch.autograd.Function):
    """hidden @ weight.T whose backward is as exact as its forward, wherever and whenever that runs."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor) -> Tensor:
        ctx.save_for_backward(hidden_ND, weight_VD)
        with exact(hidden_ND.device):
            return hidden_ND @ weight_VD.T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        hidden_ND, weight_VD = ctx.saved_tensors
        needs_hidden, needs_weight = ctx.needs_input_grad
        with exact(hidden_ND.device):
            d_hidden_ND = grads[0] @ weight_VD if needs_hidden else None
            return d_hidden_ND, grads[0].T @ hidden_ND if needs_weight else None


def linear_logprob_reference(problem: Problem, ignored_N: Tensor, wanted: Wanted) -> LogProb:
    """See ``linear_logprob``; the checks have passed."""
    with exact(problem.hidden_ND.device):
        wide = (problem.hidden_ND.to(problem.dtype), problem.weight_VD.to(problem.dtype))
        raw_NV = cast(Tensor, _Product.apply(*wide))
        if problem.bias_V is not None:
            raw_NV = raw_NV + problem.bias_V.to(problem.dtype)
        score_NV = scores(raw_NV, problem.head, 0)
        logp_NV = torch.log_softmax(score_NV, dim=1)
        index_N1 = problem.target_N.clamp(min=0)[:, None]
        return LogProb(
            _pick(logp_NV.gather(1, index_N1)[:, 0], ignored_N),
            torch.logsumexp(score_NV, dim=1),
            _entropy(score_NV) if wanted.entropy else None,
            score_NV.argmax(dim=1) if wanted.argmax else None,
            _rank(score_NV, index_N1, ignored_N) if wanted.rank else None,
        )


def _pick(logp_N: Float[Tensor, " N"], ignored_N: Tensor) -> Float[Tensor, " N"]:
    """0 where ignored; a target of probability 0 stays -inf and sends no gradient."""
    dead_N = torch.isneginf(logp_N) & ~ignored_N
    # Filled again so that the gradient stops here: passed on, it would reach the other ids.
    return logp_N.masked_fill(ignored_N, 0.0).masked_fill(dead_N, -torch.inf)


def _entropy(score_NV: Float[Tensor, "N V"]) -> Float[Tensor, " N"]:
    """log sum exp(z - m) - E[z - m]: summing p log p would add up the roundings of log p instead."""
    shifted_NV = score_NV - score_NV.detach().amax(dim=1, keepdim=True)
    finite_NV = shifted_NV.masked_fill(torch.isneginf(shifted_NV), 0.0)
    mean_N = (torch.softmax(shifted_NV, dim=1) * finite_NV).sum(dim=1)
    return torch.logsumexp(shifted_NV, dim=1) - mean_N


def _rank(
    score_NV: Float[Tensor, "N V"], index_N1: Int[Tensor, "N 1"], ignored_N: Tensor
) -> Int[Tensor, " N"]:
    above_N = (score_NV > score_NV.gather(1, index_N1)).sum(dim=1)
    return above_N.masked_fill(ignored_N, -1)
