"""The definition of correct: full float32 logits, gradients by autograd. Memory N x V."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rlpt_kernels.head import Head, LogProb, Wanted, compute_dtype, logits, scores


def linear_logprob_reference(
    hidden_ND: Float[Tensor, "N D"],
    weight_VD: Float[Tensor, "V D"],
    bias_V: Float[Tensor, " V"] | None,
    target_N: Int[Tensor, " N"],
    head: Head,
    wanted: Wanted,
) -> LogProb:
    """See ``linear_logprob``; ``check`` has passed."""
    dtype = compute_dtype(hidden_ND, weight_VD)
    with torch.autocast(hidden_ND.device.type, enabled=False):
        score_NV = scores(logits(hidden_ND.to(dtype), weight_VD, bias_V), head, 0)
        logp_NV = torch.log_softmax(score_NV, dim=1)
        index_N1 = target_N.long().masked_fill(target_N == head.ignore_index, 0)[:, None]
        return LogProb(
            _pick(logp_NV.gather(1, index_N1)[:, 0], target_N == head.ignore_index),
            torch.logsumexp(score_NV, dim=1),
            _entropy(logp_NV) if wanted.entropy else None,
            score_NV.argmax(dim=1) if wanted.argmax else None,
            _rank(score_NV, index_N1, target_N == head.ignore_index) if wanted.rank else None,
        )


def _pick(logp_N: Float[Tensor, " N"], ignored_N: Tensor) -> Float[Tensor, " N"]:
    """0 where ignored; a target of probability 0 stays -inf and sends no gradient."""
    dead_N = torch.isneginf(logp_N) & ~ignored_N
    # Filled again so that the gradient stops here: passed on, it would reach the other ids.
    return logp_N.masked_fill(ignored_N, 0.0).masked_fill(dead_N, -torch.inf)


def _entropy(logp_NV: Float[Tensor, "N V"]) -> Float[Tensor, " N"]:
    return -(logp_NV.exp() * logp_NV.masked_fill(torch.isneginf(logp_NV), 0.0)).sum(dim=1)


def _rank(
    score_NV: Float[Tensor, "N V"], index_N1: Int[Tensor, "N 1"], ignored_N: Tensor
) -> Int[Tensor, " N"]:
    above_N = (score_NV > score_NV.gather(1, index_N1)).sum(dim=1)
    return above_N.masked_fill(ignored_N, -1)
