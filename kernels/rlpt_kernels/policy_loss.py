"""The policy-gradient loss of tokens straight from hidden states: log-probabilities, ratio, trust region and
gradients.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.distributed import ProcessGroup

from rlpt_kernels.checks import check, check_shares, check_vector
from rlpt_kernels.head import Head, LogProb, Needs
from rlpt_kernels.linear_logprob import Implementation, linear_logprob
from rlpt_kernels.notes import once
from rlpt_kernels.objective import TRUST_REGIONS, Ratio, TrustRegion
from rlpt_kernels.policy_op import linear_policy_loss_op
from rlpt_kernels.rows import Terms


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

    The unified form of DPPO (arXiv 2602.04879, Eq. 23): REINFORCE, PPO/GRPO clipping, CISPO, TV masking.
    ``mask`` is the weight of each token, denominators included; 0 is padding, whatever else the row holds.
    Token-local by construction, so the forward can leave the gradients: `chunked`, which `auto` takes
    whenever a gradient is asked for and one rank holds the vocabulary, costs 6NDV and a float32 gradient of
    the weight. Every other ``impl`` recomputes in the backward (8NDV, no more memory than its slab). Rows
    without mask or advantage are dropped before any matmul of a gradient, and those without mask before the
    first of all (`chunked`). Other arguments and errors: `linear_logprob`.
    """
    head = Head(temperature, softcap, tuple(banned))
    check(hidden_MD, weight_VD, bias, target_N, rows, head)
    stop = check_shares(weight_VD, vocab_start, vocab_stop, group is not None, head.banned)
    ratio = Ratio(trust_region, clip_low, clip_high, tv_delta, max_ratio)
    terms = _terms(target_N, behaviour_logp_N, advantage_N, mask_N, ratio)
    target_N = target_N.masked_fill(mask_N == 0, ignore_index)
    needs = _needs(hidden_MD, weight_VD, bias)
    if _one_pass(impl, needs, group, hidden_MD, weight_VD):
        return _left_by_the_forward(
            hidden_MD, weight_VD, target_N, bias, rows, head, ignore_index, stop, terms, needs,
            entropy,
        )  # fmt: skip
    scored = linear_logprob(
        hidden_MD, weight_VD, target_N,
        temperature=temperature, bias=bias, softcap=softcap, ignore_index=ignore_index, banned=banned, rows=rows,
        entropy=entropy, vocab_start=vocab_start, vocab_stop=vocab_stop, group=group, impl=impl,
    )  # fmt: skip
    return _recomputed(scored, target_N != ignore_index, terms)


def _one_pass(
    impl: Implementation,
    needs: Needs,
    group: ProcessGroup | None,
    hidden_MD: Tensor,
    weight_VD: Tensor,
) -> bool:
    """Whether the forward leaves the gradients; says what `auto` takes.

    Not for float16: a loss scale that comes from above would come after gradients have underflowed.
    """
    if impl == "chunked" and group is not None:
        raise ValueError(
            "impl = 'chunked' needs the whole vocabulary on one rank; with a group choose slabs or triton"
        )
    if impl != "auto":
        return impl == "chunked"
    scaled = torch.float16 in (hidden_MD.dtype, weight_VD.dtype)
    one_pass = any(needs) and group is None and not scaled
    how = "one pass (chunked)" if one_pass else "recomputation"
    once(f"linear_policy_loss: auto takes {how} for {hidden_MD.dtype} on {hidden_MD.device.type}")
    return one_pass


def _left_by_the_forward(
    hidden_MD: Tensor, weight_VD: Tensor, target_N: Tensor, bias: Tensor | None, rows: Tensor | None,
    head: Head, ignore_index: int, stop: int, terms: Terms, needs: Needs, entropy: bool,
) -> PolicyLoss:  # fmt: skip
    per_row = head.temperature if isinstance(head.temperature, Tensor) else None
    temperature = 1.0 if isinstance(head.temperature, Tensor) else head.temperature
    ratio = terms.ratio
    loss, *rest = linear_policy_loss_op(
        hidden_MD, weight_VD, bias, target_N, rows, per_row, terms.behaviour_logp_N,
        terms.advantage_N, terms.weight_N, temperature, head.softcap, ignore_index, head.banned,
        stop, ratio.trust_region, ratio.clip_low, ratio.clip_high, ratio.tv_delta, ratio.max_ratio,
        entropy, *needs,
    )  # fmt: skip
    logp_N, value_N, entropy_N = (x.detach() for x in rest[:3])
    return PolicyLoss(loss, logp_N, value_N, entropy_N if entropy else None)


def _recomputed(scored: LogProb, known_N: Bool[Tensor, " N"], terms: Terms) -> PolicyLoss:
    """The loss by autograd through log-probabilities."""
    weight_N = torch.where(known_N, terms.weight_N, torch.zeros_like(terms.weight_N))
    terms = replace(terms, weight_N=weight_N).to(scored.logp.dtype)
    found = terms.coefficients(scored.logp)
    entropy_N = None
    if scored.entropy is not None:
        entropy_N = torch.where(weight_N != 0, scored.entropy.detach(), 0.0)
    loss = found.loss(scored.logp)
    return PolicyLoss(loss, scored.logp.detach(), found.coefficient_N, entropy_N)


def _needs(*inputs: Tensor | None) -> Needs:
    on = torch.is_grad_enabled()
    return Needs(*(on and x is not None and x.requires_grad for x in inputs))


def _terms(
    target_N: Tensor, behaviour_logp_N: Tensor, advantage_N: Tensor, mask_N: Tensor, ratio: Ratio
) -> Terms:
    """Checked, and cut off from whatever made them: the objective takes them for constants."""
    floats = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    device, count = target_N.device, len(target_N)
    check_vector("behaviour_logp", behaviour_logp_N, count, device, floats)
    check_vector("advantage", advantage_N, count, device, floats)
    check_vector("mask", mask_N, count, device, (*floats, torch.bool))
    check_ratio(ratio)
    return Terms(behaviour_logp_N.detach(), advantage_N.detach(), mask_N.detach(), ratio)


def check_ratio(ratio: Ratio) -> None:
    """Refuse settings that would mask or scale by nonsense."""
    if ratio.trust_region not in TRUST_REGIONS:
        known = ", ".join(TRUST_REGIONS)
        raise ValueError(f"trust_region = {ratio.trust_region!r} is unknown; choose one of {known}")
    for name in ("clip_low", "clip_high", "tv_delta"):
        if not getattr(ratio, name) >= 0:
            raise ValueError(f"{name} must be 0 or more; got {getattr(ratio, name)}")
    if ratio.max_ratio is not None and not ratio.max_ratio > 0:
        raise ValueError(f"max_ratio must be > 0 or None; got {ratio.max_ratio}")
