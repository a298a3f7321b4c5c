"""The policy-gradient loss of tokens straight from hidden states: log-probabilities, ratio, trust region and gradients."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.distributed import ProcessGroup

from rlpt_kernels.checks import check, check_shares, check_vector
from rlpt_kernels.head import Head, Needs
from rlpt_kernels.linear_logprob import (
    Implementation,
    announce,
    check_implementation,
    linear_logprob,
)
from rlpt_kernels.objective import TRUST_REGIONS, Ratio, TrustRegion, coefficients
from rlpt_kernels.policy_op import linear_policy_loss_op


class PolicyLoss(NamedTuple):
    """The loss, and what a monitor wants to know of its tokens (constants, float32)."""

    loss: Float[Tensor, ""]
    """-sum_n coefficient_n log pi_n; its gradient is that of the objective."""
    logp: Float[Tensor, " N"]
    """log pi of the target; 0 where the mask is 0 or the target is ignored."""
    coefficient: Float[Tensor, " N"]
    """mask * M * min(pi / behaviour, max_ratio) * advantage; 0 where nothing is learned."""
    entropy: Float[Tensor, " N"] | None
    """Of the policy at each token, in nats; 0 where the mask is 0. None unless asked for."""


def linear_policy_loss(
    hidden_MD: Float[Tensor, "M D"],
    weight_VD: Float[Tensor, "V D"],
    target_N: Int[Tensor, " N"],
    behaviour_logp_N: Float[Tensor, " N"],
    advantage_N: Float[Tensor, " N"],
    mask_N: Float[Tensor, " N"] | Bool[Tensor, " N"],
    *,
    trust_region: TrustRegion = "none",
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    tv_delta: float = 0.2,
    max_ratio: float | None = None,
    temperature: float | Float[Tensor, " N"] = 1.0,
    bias: Float[Tensor, " V"] | None = None,
    softcap: float | None = None,
    ignore_index: int = -100,
    banned: Sequence[int] = (),
    rows: Int[Tensor, " N"] | None = None,
    entropy: bool = False,
    vocab_start: int = 0,
    vocab_stop: int | None = None,
    group: ProcessGroup | None = None,
    impl: Implementation = "auto",
) -> PolicyLoss:
    """-sum_n mask_n M_n sg(min(rho_n, max_ratio)) A_n log pi_n with rho = pi / behaviour.

    The unified form of DPPO (arXiv 2602.04879, Eq. 23): REINFORCE, PPO/GRPO clipping, CISPO, TV masking. ``mask`` is the
    weight of each token, denominators included; 0 is padding, whatever else the row holds. Token-local by construction,
    so the forward can leave the gradients: `chunked`, which `auto` takes whenever a gradient is asked for and one rank
    holds the vocabulary, costs 6NDV and a float32 gradient of the weight. Every other ``impl`` recomputes in the
    backward (8NDV, no more memory than its slab). Rows without mask or advantage are dropped before any matmul of a
    gradient, and those without mask before the first of all (`chunked`). Other arguments and errors: `linear_logprob`.
    """
    stop = vocab_start + len(weight_VD) if vocab_stop is None else vocab_stop
    head = Head(temperature, softcap, tuple(banned))
    ratio = Ratio(trust_region, clip_low, clip_high, tv_delta, max_ratio)
    check(hidden_MD, weight_VD, bias, target_N, rows, head)
    check_shares(weight_VD, vocab_start, stop, group is not None, head.banned)
    _check_terms(hidden_MD, behaviour_logp_N, advantage_N, mask_N, len(target_N))
    check_ratio(ratio)
    needs = Needs(*(_wants_gradient(x) for x in (hidden_MD, weight_VD, bias)))
    one_pass = impl == "chunked" or (impl == "auto" and any(needs) and group is None)
    if impl == "auto":
        announce("linear_policy_loss", "one pass (chunked)" if one_pass else "recomputation", str(hidden_MD.dtype))
    check_implementation("chunked" if one_pass else impl, hidden_MD, weight_VD, group is not None)
    weight_N = mask_N.to(advantage_N.dtype)
    if one_pass and group is not None:
        raise ValueError("impl = 'chunked' holds the whole vocabulary; with a group choose slabs or triton")
    if one_pass:
        per_row = temperature if isinstance(temperature, Tensor) else None
        found = linear_policy_loss_op(
            hidden_MD, weight_VD, bias, target_N, rows, per_row, behaviour_logp_N.detach(), advantage_N.detach(),
            weight_N.detach(), 1.0 if per_row is not None else temperature, softcap, ignore_index, head.banned, stop,
            trust_region, clip_low, clip_high, tv_delta, max_ratio, entropy, *needs,
        )  # fmt: skip
        return PolicyLoss(found[0], found[1].detach(), found[2].detach(), found[3].detach() if entropy else None)
    scored = linear_logprob(
        hidden_MD, weight_VD, torch.where(weight_N != 0, target_N, ignore_index), temperature=temperature, bias=bias,
        softcap=softcap, ignore_index=ignore_index, banned=banned, rows=rows, entropy=entropy, vocab_start=vocab_start,
        vocab_stop=vocab_stop, group=group, impl=impl,
    )  # fmt: skip
    return _recomputed(scored.logp, scored.entropy, target_N != ignore_index, behaviour_logp_N, advantage_N, weight_N, ratio)


def _recomputed(
    logp_N: Tensor, entropy_N: Tensor | None, known_N: Tensor, behaviour_logp_N: Tensor, advantage_N: Tensor,
    weight_N: Tensor, ratio: Ratio,
) -> PolicyLoss:  # fmt: skip
    """The loss by autograd through log-probabilities."""
    weight_N = torch.where(known_N, weight_N, 0.0)
    value_N = coefficients(logp_N, behaviour_logp_N, advantage_N, weight_N, ratio).coefficient_N
    # A target of probability 0 stays -inf and sends no gradient.
    value_N = value_N.masked_fill(torch.isneginf(logp_N), 0.0)
    loss = -(value_N * torch.where(value_N != 0, logp_N, 0.0)).sum()
    if entropy_N is not None:
        entropy_N = torch.where(weight_N != 0, entropy_N.detach(), 0.0)
    return PolicyLoss(loss, logp_N.detach(), value_N.detach(), entropy_N)


def _wants_gradient(value: Tensor | None) -> bool:
    return value is not None and value.requires_grad and torch.is_grad_enabled()


def _check_terms(
    hidden_MD: Tensor, behaviour_logp_N: Tensor, advantage_N: Tensor, mask_N: Tensor, count: int
) -> None:
    floats = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    check_vector("behaviour_logp", behaviour_logp_N, count, hidden_MD.device, floats)
    check_vector("advantage", advantage_N, count, hidden_MD.device, floats)
    check_vector("mask", mask_N, count, hidden_MD.device, (*floats, torch.bool))


def check_ratio(ratio: Ratio) -> None:
    """Refuse settings that would mask or scale by nonsense."""
    if ratio.trust_region not in TRUST_REGIONS:
        raise ValueError(f"trust_region = {ratio.trust_region!r} is unknown; choose one of {', '.join(TRUST_REGIONS)}")
    for name in ("clip_low", "clip_high", "tv_delta"):
        if not getattr(ratio, name) >= 0:
            raise ValueError(f"{name} must be 0 or more; got {getattr(ratio, name)}")
    if ratio.max_ratio is not None and not ratio.max_ratio > 0:
        raise ValueError(f"max_ratio must be > 0 or None; got {ratio.max_ratio}")
